"""Calls of torch whose result's dependencies are known, and which therefore run where no mode sees their operations.

A mode that looks at an operation costs more than the operation does. These calls are looked at as a whole, from their arguments. The table is a
closed world: a call is known if its function is one of these very objects, its arguments are plain tensors and numbers, and nothing
else is active that could take part in it (a mode of the program's, autocast, `torch.func`, hooks of saved tensors). What is noted is what
`Provenance` would have noted of the one operation that such a call makes; any other call is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from pplgrad.pyro._compat import WithoutDispatch, is_wrapped, only_ours
from pplgrad.pyro._tracing.watchers import Watcher

WATCH = object()
"""Stands for the result of a call that is to be watched."""

_TENSORS = {torch.Tensor, torch.nn.Parameter}
_NUMBERS = {int, float, bool}
_FLOATS = {torch.float32, torch.float64}
_WHOLE = {torch.int64, torch.int32, torch.bool}
_STRIDED = torch.strided
_OPTIONS = {torch.dtype, torch.device, bool, type(None)}


class Knows(Watcher, Protocol):
    """What a call needs of what watches."""

    drawing: bool

    def give(self, *tensors: torch.Tensor) -> None:
        """Note that tensors depend on no draw."""


Call = Callable[[Any, Any, Any, Knows], Any]
"""From the function, its arguments, and what watches, to what the call returns, or `WATCH`."""


def _run(func: Any, args: Any, kwargs: Any, watcher: Knows, tensors: Sequence[Any], smooth: bool) -> Any:
    """Run a call whose tensors these are, and note what it reads. It may be `smooth`: continuous, with a derivative of its own."""
    for x in tensors:
        if type(x) not in _TENSORS or is_wrapped(x) or x.layout is not _STRIDED:
            return WATCH
        dtype = x.dtype
        if dtype not in _FLOATS:
            if dtype not in _WHOLE:
                return WATCH
            smooth = False
    if not tensors or not only_ours():
        return WATCH
    bits = watcher.read(tensors, smooth)
    if bits is None:
        return WATCH
    try:
        with WithoutDispatch():
            out = func(*args, **kwargs)
    except Exception:
        watcher.escape(bits)  # Whoever catches it knows something of the values.
        raise
    if out is NotImplemented:
        return WATCH
    if type(out) is tuple or type(out) is list:
        for view, x in zip(out, tensors, strict=True):
            watcher.result(view, [x], watcher.read([x], True) or 0)
    else:
        watcher.result(out, tensors, bits)
    return out


def _smooth(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    """Element by element, continuous, with a derivative of its own."""
    if kwargs or len(args) > 2:
        return WATCH
    return _run(func, args, kwargs, watcher, [x for x in args if type(x) not in _NUMBERS], True)


def _compared(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    """Element by element, with a truth value as result."""
    return WATCH if kwargs else _of_elements(func, args, kwargs, watcher, False)


def _of_elements(func: Any, args: Any, kwargs: Any, watcher: Knows, smooth: bool) -> Any:
    return _run(func, args, kwargs, watcher, [x for x in args if type(x) not in _NUMBERS], smooth)


def _clamped(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    """Between numbers, which may have names."""
    for name, x in kwargs.items():
        if name not in ("min", "max") or type(x) not in _NUMBERS:
            return WATCH
    return _of_elements(func, args, kwargs, watcher, True)


def _power(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    """With a number as exponent: one that is a tensor is looked into."""
    if kwargs or len(args) != 2 or type(args[1]) not in _NUMBERS:
        return WATCH
    return _run(func, args, kwargs, watcher, args[:1], True)


def _indexed(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    """A view: by whole numbers, slices of these, new axes and an ellipsis."""
    source, index = args
    for x in index if type(index) is tuple else (index,):
        if not (type(x) is int or x is None or x is Ellipsis or (type(x) is slice and _is_plain_slice(x))):
            return WATCH
    return _run(func, args, kwargs, watcher, (source,), True)


def _is_plain_slice(x: slice) -> bool:
    return all(part is None or type(part) is int for part in (x.start, x.stop, x.step))


def _expanded(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    source, *sizes = args
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    if kwargs or not all(type(size) is int for size in sizes):
        return WATCH
    return _run(func, args, kwargs, watcher, (source,), True)


def _broadcast(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    return WATCH if kwargs else _run(func, args, kwargs, watcher, args, True)


def _made(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    """What numbers and shapes alone make."""
    for x in args:
        if type(x) not in _NUMBERS and not (type(x) in (tuple, list, torch.Size) and _are_numbers(x)):
            return WATCH
    for x in kwargs.values():
        if type(x) not in _OPTIONS:
            return WATCH
    if not only_ours():
        return WATCH
    with WithoutDispatch():
        out = func(*args, **kwargs)
    watcher.give(out)
    return out


def _are_numbers(x: Sequence[Any]) -> bool:
    return len(x) <= 64 and all(type(y) in _NUMBERS for y in x)


def _setting(func: Any, args: Any, kwargs: Any, watcher: Knows) -> Any:
    """What takes no tensor and returns none."""
    return func(*args, **kwargs)


def _both(names: str) -> list[Any]:
    """Return the functions of these names, as methods of tensors and as torch's own."""
    return [getattr(where, name) for name in names.split() for where in (torch.Tensor, torch) if hasattr(where, name)]


_SMOOTH = _both("add mul sub div neg exp log log1p expm1 sigmoid tanh sqrt square abs sin cos relu erf rsub")
_COMPARED = _both("eq ne lt le gt ge logical_not logical_and logical_or")

KNOWN_CALLS: dict[Any, Call] = {
    **dict.fromkeys([*_SMOOTH, torch.Tensor.__rsub__], _smooth),
    **dict.fromkeys(_COMPARED, _compared),
    **dict.fromkeys(_both("clamp"), _clamped),
    **dict.fromkeys((torch.Tensor.pow, torch.Tensor.__pow__, torch.pow), _power),
    torch.Tensor.__getitem__: _indexed,
    torch.Tensor.expand: _expanded,
    torch.functional.broadcast_tensors: _broadcast,
    **dict.fromkeys((torch.tensor, torch.zeros, torch.ones, torch.full), _made),
    torch._C._set_grad_enabled: _setting,
}
"""By the function object that torch hands to a mode."""
