"""What every tensor of a run was computed from: the latent sites whose values it reads.

Provenance is kept for each storage, by watching every operation below autograd, so that views, in-place writes,
`torch.vmap`, scripted functions and custom autograd functions are seen. Where a value leaves the tensors (`item()`,
`bool()`, `numpy()`, a shape that depends on it), Python control flow may depend on it, and whatever the program
does afterwards is taken to depend on the site: more cost is charged, which is unbiased, never less.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad.pyro._guards import is_library

_WATCHING = (__name__, "pplgrad.pyro._recording")
# Reading a value inside these is a check of arguments, not control flow of the user's program.
_CHECKING = ("torch.distributions", "pyro.distributions", "pyro.util", "pyro.poutine", "pyro.infer")
LEAVING = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.data_ptr,
}
# These copy the elements of a list of tensors without an operation that could be dispatched.
COPYING = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}


# What these make of a relaxed value has no gradient, or no meaning between two categories.
_COARSE = {"round", "floor", "ceil", "trunc", "sign", "argmax", "argmin", "_local_scalar_dense", "heaviside"}
_COPIES = {"clone", "_to_copy", "cat", "stack", "contiguous", "repeat", "expand_copy", "index", "index_select"}


class Provenance(TorchDispatchMode):
    """Records, while active, which sites each tensor was computed from, as bits of an integer.

    `escaped` has the bits of all sites whose values have left the tensors so far in the current program (guide or
    model), `escaped_ever` in both; `read_at` is the line where a tensor's value first left, a site's or not.
    `misused` names the relaxed sites whose value is compared, rounded or turned into whole numbers, and by what;
    `hidden_draws` says whether random numbers were drawn outside of the sites that are seen (`drawing`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.escaped = 0
        self.escaped_ever = 0
        self.read_at: str | None = None
        self.drawing = False
        self.hidden_draws = False
        self.misused: dict[str, str] = {}
        self._relaxed: dict[int, str] = {}
        self._sites: dict[str, int] = {}
        self._bits: dict[int, int] = {}
        # A freed storage's address may be used again, so every storage that has bits is kept alive.
        self._alive: list[Any] = []
        self._leaving = _Leaving(self)

    def __enter__(self) -> Provenance:
        self._leaving.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._leaving.__exit__(*exc)

    def tag(self, name: str, value: torch.Tensor, relaxed: bool = False) -> torch.Tensor:
        """Return a copy of a site's value that is known to be that site's and nothing else's."""
        bit = 1 << self._sites.setdefault(name, len(self._sites))
        value = value.clone()
        self.mark(value, bit, replace=True)
        if relaxed:
            self._relaxed[_key(value)] = name
        return value

    def _watch_relaxed(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note where a relaxed value itself is compared, rounded or turned into whole numbers, and follow its copies."""
        name = next((self._relaxed[_key(t)] for t in tensors_in((args, kwargs)) if _key(t) in self._relaxed), None)
        if name is None:
            return
        operation = func._schema.name.removeprefix("aten::")
        whole = any(not t.is_floating_point() for t in tensors_in(out))
        if operation in _COARSE or whole:
            if not is_check():
                self.misused.setdefault(name, operation)
        elif operation in _COPIES:
            for tensor in tensors_in(out):
                self._relaxed[_key(tensor)] = name
                self._alive.append(tensor.untyped_storage())

    def of(self, *tensors: Any) -> int:
        """Return the bits of the sites that tensors were computed from."""
        bits = 0
        for tensor in tensors_in(tensors):
            bits |= self._bits.get(_key(tensor), 0)
        return bits

    def names(self, bits: int) -> list[str]:
        """Return the names of the sites that bits stand for."""
        return [name for name, number in self._sites.items() if bits >> number & 1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and not self.drawing:
            self.hidden_draws = True
        bits = self.of(args, kwargs)
        if self._relaxed:
            self._watch_relaxed(func, args, kwargs, out)
        if bits:
            for tensor in (*tensors_in(out), *_written(func, args, kwargs)):
                self.mark(tensor, bits)
        if torch.Tag.data_dependent_output in func.tags or dynamic_shape(func, args):
            self.escape(bits)
        return out

    def escape(self, bits: int) -> None:
        """Note that values have left the tensors, unless a library only checks its arguments."""
        if not is_check():
            self._left(bits)

    def _left(self, bits: int) -> None:
        self.read_at = self.read_at or user_line()
        self.escaped |= bits
        self.escaped_ever |= bits

    def mark(self, tensor: torch.Tensor, bits: int, replace: bool = False) -> None:
        """Note that a tensor was computed from the sites of `bits`."""
        key = _key(tensor)
        if key == 0:
            self._left(bits)
            return
        if key not in self._bits:
            self._alive.append(tensor.untyped_storage())
        self._bits[key] = bits if replace else self._bits.get(key, 0) | bits


class _Leaving(TorchFunctionMode):
    """Sees the ways out of torch that no dispatched operation shows."""

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self._provenance = provenance

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LEAVING:
            self._provenance.escape(self._provenance.of(args))
        out = func(*args, **(kwargs or {}))
        if func in COPYING:
            self._provenance.mark(out, self._provenance.of(args))
        return out


def _key(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _collect(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(item, found)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """Yield the arguments that an in-place or out= operation writes to."""
    for position, name in _places_written(func):
        yield from tensors_in(args[position] if position < len(args) else kwargs.get(name))


@cache
def _places_written(func: Any) -> list[tuple[int, str]]:
    every = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in every if a.alias_info is not None and a.alias_info.is_write]


def dynamic_shape(func: Any, args: Any) -> bool:
    """Return whether an operation's result has a shape that depends on values: an index of whole numbers has not."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
    return True


def user_line() -> str:
    """Return the file and line of the innermost code that is neither a library's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        if not is_library(frame.f_globals.get("__name__", "")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


def is_check() -> bool:
    """Return whether a library that checks arguments is at work, and not the user's program."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_CHECKING):
            return True
        if module not in _WATCHING and module.partition(".")[0] != "torch":
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
