"""Quick comparisons of the Python state that a program reads with what it was."""

from __future__ import annotations

import abc
import math
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import numpy as np
import pyro
import torch
import torch.nn.modules.module as _module
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger

from pplgrad.pyro._compat import constraints, unconstrained

Probe = Callable[[], bool]
_LEARNED = attrgetter("requires_grad")
MISSING: Any = object()

SIMPLE = frozenset(
    {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        range,
        type(Ellipsis),
        type(NotImplemented),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch.Size,
        torch.finfo,
        torch.iinfo,
    }
)
"""Types whose objects never change, and mean the same if they are equal."""
_LARGE = 1 << 26
"""The bytes of an array from which on its hash is kept, and no copy."""


class Kind:
    """What of a tensor can steer a program that never reads its numbers."""

    __slots__ = ("kind",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.kind = kind_of(tensor)


def kind_of(x: torch.Tensor) -> tuple:
    """Return what of a tensor can steer a program that never reads its numbers, nor where they stand."""
    return (*form_of(x), bool(x.__dict__))


def form_of(x: torch.Tensor) -> tuple:
    """Return the same without attributes that were set on the tensor."""
    return (type(x), x.shape, x.dtype, x.device, x.requires_grad, x.is_leaf, x.layout)


def strides_of(x: Any) -> tuple[int, ...]:
    """Return where a tensor's numbers stand, if it is a tensor whose numbers have such places."""
    return x.stride() if isinstance(x, torch.Tensor) and x.layout is torch.strided else ()


def alike(kept: Any, found: Any) -> bool:
    """Return whether what is found means the same to a program as what was kept."""
    if kept is found:
        return True
    kind = type(kept)
    if kind is Kind:
        return isinstance(found, torch.Tensor) and kind_of(found) == kept.kind
    if kind is not type(found):
        return False
    if kind is float:
        return kept == found and math.copysign(1.0, kept) == math.copysign(1.0, found)
    if kind is complex:
        return repr(kept) == repr(found)
    if kind in SIMPLE:
        return bool(kept == found)
    if issubclass(kind, np.generic) and kind is not np.void and not kept.dtype.hasobject:
        return kept.dtype == found.dtype and kept.tobytes() == found.tobytes()
    if kind is tuple:
        return len(kept) == len(found) and all(map(alike, kept, found))
    return False


def all_alike(kept: Sequence[Any], found: Iterable[Any]) -> bool:
    """Return whether two sequences of the same length are alike, item by item."""
    return all(map(alike, kept, found))


def sequence_probe(value: Collection, items: Callable[[Any], Iterable], kept: list) -> Probe:
    """Return the comparison of a sequence."""
    count, plain = len(kept), not any(type(x) is Kind for x in kept)
    if not count:
        return lambda: not len(value)
    if plain:
        return lambda: len(value) == count and (all(map(is_, items(value), kept)) or all_alike(kept, items(value)))
    return lambda: len(value) == count and all(map(alike, kept, items(value)))


def mapping_probe(value: Mapping, keys: list, kept: list, skipped: frozenset[str] = frozenset()) -> Probe:
    """Return the comparison of a dict's keys, in their order, and of what they have, without those skipped."""
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else type(value) if type(value) is _Proxy else dict
    every, values = kind.__iter__, kind.values
    count, plain = len(keys), not any(type(x) is Kind for x in kept)
    if not skipped.isdisjoint(every(value)):
        return lambda: _without(value, skipped, keys, kept)
    if not count:
        return lambda: not len(value)
    if plain:

        def quick() -> bool:
            if len(value) != count:
                return False
            if all(map(is_, values(value), kept)) and all(map(is_, every(value), keys)):
                return True
            return list(every(value)) == keys and all_alike(keys, every(value)) and all_alike(kept, values(value))

        return quick
    return lambda: len(value) == count and all(map(alike, keys, every(value))) and all(map(alike, kept, values(value)))


def _without(value: Mapping, skipped: frozenset[str], keys: list, kept: list) -> bool:
    items: list[tuple[Any, Any]] = [(key, value[key]) for key in value if key not in skipped]
    if len(items) != len(keys):
        return False
    return all(a == key and alike(b, item) for a, b, (key, item) in zip(keys, kept, items, strict=True))


_Proxy = type(type.__dict__)


def names_probe(value: Mapping, names: Sequence[str], kept: list) -> Probe:
    """Return the comparison of some names of a namespace."""
    get = value.get

    def holds() -> bool:
        if all(map(is_, map(get, names, repeat(MISSING)), kept)):
            return True
        for name, was in zip(names, kept, strict=True):
            found = get(name, MISSING)
            if found is not was and not alike(was, found):
                return False
        return True

    return holds


def size_of(own: Mapping) -> int:
    """Return how many names a class has, but for Python's note of how its objects are pickled, which the first `torch.save` makes."""
    return len(own) - ("__slotnames__" in own)


def class_probe(own: Mapping, names: Sequence[str], kept: list) -> Probe:
    """Return the comparison of what a class has under some names, and of how many names it has."""
    values, every, count = own.values, list(own.values()), size_of(own)
    by_name = names_probe(own, names, kept)
    plain = not any(type(x) is Kind for x in kept)
    return lambda: size_of(own) == count and ((plain and all(map(is_, values(), every))) or by_name())


def array_probe(value: np.ndarray) -> Probe:
    """Return the comparison of an array's numbers, dtype, shape and strides."""
    form = (value.dtype, value.shape, value.strides)
    contents: Any = digest(value) if value.nbytes > _LARGE else bytearray(_bytes(value))

    def holds() -> bool:
        if (value.dtype, value.shape, value.strides) != form:
            return False
        return contents == (digest(value) if value.nbytes > _LARGE else _bytes(value))

    return holds


def _bytes(value: np.ndarray) -> memoryview:
    """Return an array's numbers as bytes, copied only where they lie apart."""
    return memoryview(np.ascontiguousarray(value.view(np.ndarray)).reshape(-1).view(np.uint8))


def digest(value: np.ndarray) -> bytes:
    """Return a hash of an array's numbers."""
    return blake2b(_bytes(value), digest_size=16).digest()


def contents_probe(value: Any) -> Probe:
    """Return the comparison of a buffer (bytearray, array.array, memoryview)."""
    kept = (bytes(value) if type(value) is bytearray else value.tobytes(), _form(value))
    return lambda: (bytes(value) if type(value) is bytearray else value.tobytes(), _form(value)) == kept


def _form(value: Any) -> Any:
    return getattr(value, "typecode", None) or (getattr(value, "format", None), getattr(value, "shape", None))


ITEMS: dict[type, Callable[[Any], Iterable]] = {
    list: list.__iter__,
    tuple: tuple.__iter__,
    set: set.__iter__,
    frozenset: frozenset.__iter__,
    deque: deque.__iter__,
}


def handlers() -> tuple[Any, ...]:
    """Return Pyro's handlers around a step that can change what a program does."""
    return tuple(x for x in _PYRO_STACK if type(x) not in (TraceMessenger, BlockMessenger) and not _forcing(x))


def hooks_of_all_modules() -> tuple[Any, ...]:
    """Return the hooks that torch calls at every module."""
    return (*_module._global_forward_pre_hooks.values(), *_module._global_forward_hooks.values())


def _forcing(handler: Any) -> bool:
    """Return whether a handler says that it puts values in the place of draws and steers nothing, as those of `pplgrad.testing` do."""
    return bool(getattr(handler, "only_draws", False))


def ambient() -> tuple:
    """Return what decides how any program runs, and that no name in it stands for: settings, modes, handlers."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.distributions.Distribution._validate_args,
        abc.get_cache_token(),
        sys.flags,
        torch.is_anomaly_enabled(),
        torch.is_warn_always_enabled(),
        torch.is_autocast_cache_enabled(),
        (*warnings.filters,),
        (*np.geterr().values(),),
        *(size_of(vars(kind)) for kind in (torch.Tensor, torch.nn.Parameter, torch.nn.Module)),
        *_modes(),
        *map(id, handlers()),
        *map(id, hooks_of_all_modules()),
        *(getattr(owner, name) for owner, name in _settings(len(pyro.settings._REGISTRY))),
    )


def ambient_probe() -> Probe:
    """Return the comparison of what surrounds any program."""
    kept = ambient()
    return lambda: ambient() == kept


def params_probe(shapes: bool) -> Probe:
    """Return the comparison of the param store: the names, and what of each parameter can steer a program.

    Without `shapes` that of a parameter which is still the same tensor is not asked: who reads its numbers will see.
    """
    kept = unconstrained()
    names, leaves, constrained = list(kept), list(kept.values()), constraints()
    # Pyro gives leaves an attribute when they are read first.
    kinds, learned = list(map(form_of, leaves)), list(map(_LEARNED, leaves))

    def quick() -> bool:
        now = unconstrained()
        if list(now) != names:
            return False
        same = all(map(is_, now.values(), leaves)) and list(map(_LEARNED, leaves)) == learned
        if (shapes or not same) and list(map(form_of, now.values())) != kinds:
            return False
        found = constraints()
        return all(x is found.get(name) for name, x in constrained.items())

    return quick


def _modes() -> list[Any]:
    found = torch.overrides._get_current_function_mode_stack()
    return [
        (type(mode), getattr(mode, "device", None) if type(mode) is torch.utils._device.DeviceContext else id(mode))
        for mode in found
    ]


_known_settings: list[tuple[Any, str]] = []


def _settings(count: int) -> list[tuple[Any, str]]:
    """Return where Pyro's settings stand: what holds each, and its name there."""
    if len(_known_settings) != count:
        found = []
        for module, deep, _ in pyro.settings._REGISTRY.values():
            *path, name = deep.split(".")
            owner: Any = sys.modules.get(module)
            for part in path:
                owner = getattr(owner, part)
            if owner is not None:
                found.append((owner, name))
        _known_settings[:] = found
    return _known_settings
