"""The ways out of torch that no dispatched operation shows: what comes out of a call and is no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from pplgrad.pyro._compat import unwrapped
from pplgrad.pyro._tracing.indexing import classes, one_hot, without_numbers
from pplgrad.pyro._tracing.known_calls import KNOWN_CALLS, WATCH, Knows
from pplgrad.pyro._tracing.operations import tensors_in

# These say something of a tensor that does not depend on its elements.
_METADATA = set(
    "shape dtype device layout ndim requires_grad grad_fn names itemsize nbytes output_nr retains_grad _version _backward_hooks "
    "size dim numel nelement stride storage_offset element_size type ndimension get_device __len__ __hash__ has_names "
    "broadcast_shapes result_type can_cast _is_view __dlpack_device__ register_hook _is_zerotensor _has_compatible_shallow_copy_type _cdata grad_dtype "
    "volatile __dir__ dim_order sparse_dim dense_dim storage_type promote_types".split()
)

# A tensor that is given to these lends its size, type or device.
_LENDING = set("expand_as view_as reshape_as type_as to resize_as_ resize_as broadcast_tensors".split())
# These compute with the numbers of their arguments, element by element, in Python.
_CALLING_BACK = set("apply_ map_ map2_".split())

_SIZES = set("shape ndim size dim numel nelement ndimension nbytes __len__".split())

# What comes out of these are numbers of Python's own; anything else may be a way into the tensor's memory.
_COPYING_OUT = set(
    "__bool__ item __int__ __index__ __float__ __complex__ tolist __format__ __repr__ __str__ __contains__ equal allclose is_nonzero "
    "__iter__ __reversed__ __deepcopy__ __reduce__ __reduce_ex__ is_same_size backward".split()
)

_READING = {torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__}


class Followed(Knows, Protocol):
    """What is known of tensors: which draws they were computed from, as bits."""

    def of(self, *trees: Any) -> int:
        """Return what tensors in nested containers read."""

    def forget(self, tensor: torch.Tensor) -> None:
        """Take what a tensor reads as unknown."""

    def expose(self, tensor: torch.Tensor) -> None:
        """Note that a tensor's memory can be read by other means than torch."""

    def is_innocent(self, bits: int, tree: Any) -> bool:
        """Return whether reading tensors steers nothing."""

    def escape(self, bits: int) -> None:
        """Note that everything from here on may read these draws."""

    def mix(self, tensors: list[torch.Tensor], bits: int) -> None:
        """Note that tensors read these draws, at any of their elements."""

    def sized(self, tensor: Any) -> None:
        """Note that the size of a tensor is read."""


class Leaving(TorchFunctionMode):
    """Sees the ways out of torch that no dispatched operation shows, and what copies elements without one."""

    def __init__(self, provenance: Followed, known_calls: Mapping[Any, Any] = KNOWN_CALLS) -> None:
        """`known_calls` are those of which all is known without a look inside."""
        super().__init__()
        self._provenance = provenance
        self._known_calls = known_calls
        self._calls: list[tuple] = []
        self._dispatched: list[set[int]] = []

    def note(self, tensor: torch.Tensor) -> None:
        """Note that an operation inside of the call that is running takes a tensor."""
        if self._dispatched:
            self._dispatched[-1].add(id(tensor))

    def note_all(self) -> None:
        """Note that what was made inside of the calls that are running is known to read all that they were given."""
        if self._dispatched:
            self._dispatched[-1].update(id(tensor) for tensor in tensors_in(self._calls))

    def bits_of_calls(self) -> int:
        """Return what the arguments of the calls that are running read."""
        return self._provenance.of(self._calls) if self._calls else 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._known_calls.get(func)
        if known is not None and not self._calls:
            found = known(func, args, kwargs, self._provenance)
            if found is not WATCH:
                return found
        if _is_metadata(func):
            if _is_size(func):
                self._provenance.sized(args[0])
            return func(*args, **kwargs)
        if func is torch.Tensor.__getitem__:
            args = without_numbers(args)
        elif func is torch.nn.functional.one_hot and classes(args, kwargs) >= 0:
            func = one_hot
        numbers_alone = (
            func is torch.Tensor.__setitem__ and isinstance(args[2], (bool, int, float)) and not _lists(args[1])
        )
        # In `x[mask] = 0` the number is made a tensor, and nothing else.
        self._calls.append(() if numbers_alone else (args, kwargs) if kwargs else args)
        self._dispatched.append(set())
        try:
            out = func(*args, **kwargs)
        finally:
            self._calls.pop()
            dispatched = self._dispatched.pop()
            if self._dispatched:
                self._dispatched[-1] |= dispatched
        if out is None:
            if getattr(func, "__name__", "") == "__set__":
                self._provenance.forget(args[0])
            return out
        if not isinstance(out, torch.Tensor):
            self._left(func, args, kwargs, out)
        lends = getattr(func, "__name__", "") in ("new", "new_tensor")
        given = args[1:] if lends else args
        if not (_all_in(given, dispatched) and _all_in(kwargs.values(), dispatched)) or _calls_back(func):
            self._read_unseen(func, (given, kwargs), out, dispatched)
        return out

    def _read_unseen(self, func: Any, given: Any, out: Any, dispatched: set[int]) -> None:
        """Note that a call read a tensor in no operation that was seen: what comes out, and how large it is, may depend on it."""
        made, back = tensors_in(out), _calls_back(func)
        if not made or getattr(func, "__name__", "") in _LENDING:
            return
        known = dispatched if back else dispatched | {id(unwrapped(x)) for x in made}
        left = [x for x in map(unwrapped, tensors_in(given)) if back or id(x) not in known]
        if left and (bits := self._provenance.of(left)):
            self._provenance.escape(bits)
            self._provenance.mix(made, bits)

    def _left(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note that something came out that is no tensor, and may have been made of elements."""
        if tensors_in(out) or not (read := tensors_in((args, kwargs))):
            return
        if getattr(func, "__name__", "") not in _COPYING_OUT:
            for tensor in read:
                self._provenance.expose(tensor)
        bits = self._provenance.of(args, list(kwargs.values()))
        if not (func in _READING and self._provenance.is_innocent(bits, args[:1])):
            self._provenance.escape(bits)


def _lists(index: Any) -> bool:
    """Return whether an index holds a list, of which torch makes a tensor."""
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(x, (list, tuple)) for x in index))


def _all_in(given: Iterable[Any], dispatched: set[int]) -> bool:
    """Return whether all tensors among arguments are known by their identity; nested ones may be said not to be."""
    for x in given:
        if isinstance(x, torch.Tensor):
            if id(x) not in dispatched:
                return False
        elif isinstance(x, (list, tuple, dict)) and not all(type(y) is int for y in x):
            return False
    return True


@cache
def _calls_back(func: Any) -> bool:
    return getattr(func, "__name__", "") in _CALLING_BACK


@cache
def _is_size(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (getattr(func.__self__, "__name__", "") if name == "__get__" else name) in _SIZES


@cache
def _is_metadata(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
    return name in _METADATA or (name.startswith("is_") and name != "is_nonzero")
