"""The tensors that were there before a program ran: its arguments, the param store, and what its code and objects hold.

A tensor that turns up in a run, was not there before and was made by no operation that was seen came by a way that cannot be
followed. Nothing here has to be complete: what is missed is taken for such a tensor, which is right and costs variance.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import pyro
import torch

from pplgrad.monitoring.watch import Watcher
from pplgrad.pyro._reuse.names_in_code import names_of
from pplgrad.pyro._tracing.callers import is_library

_LIMIT = 20_000
_PLAIN = (type(None), bool, int, float, complex, str, bytes, types.ModuleType)
_EXACTLY = frozenset(_PLAIN)  # Asked first: it is the faster question.


def tensors_before(*roots: Any) -> list[torch.Tensor]:
    """Return the tensors that the param store holds, and those that can be reached from some functions and objects."""
    store = pyro.get_param_store()
    found = [value for _, value in store.named_parameters()]
    ahead: list[Any] = list(roots)
    seen: set[int] = set()
    while ahead and len(seen) < _LIMIT:
        value = ahead.pop()
        if type(value) in _EXACTLY or id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        else:
            ahead.extend(_within(value))
    return found


def _within(value: Any) -> Iterable[Any]:
    """Return what an object holds, as far as a program gets at it by names."""
    kind = type(value)
    if kind is types.FunctionType:
        return _of_function(value)
    if kind is dict:
        return value.values()
    if kind is tuple or kind is list:
        return tuple(value)
    if isinstance(value, type):
        return _of_class(value)
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if kind is Watcher:
        return ()  # Whoever is shown the records is no part of the program.
    slots = [_attribute(value, name, None) for cls in kind.__mro__ for name in _slots(cls)]
    return [*_attribute(value, "__dict__", {}).values(), *slots, *_of_class(kind)]


def _attribute(value: Any, name: str, default: Any) -> Any:
    """Return an attribute; an object may answer any question with any error."""
    try:
        return getattr(value, name, default)
    except Exception:
        return default


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _of_class(cls: type) -> list[Any]:
    """Return what the classes of a user's object hold: their methods read globals too."""
    return [held for base in cls.__mro__ if not is_library(base.__module__) for held in vars(base).values()]


def _of_function(function: types.FunctionType) -> list[Any]:
    found: list[Any] = [function.__defaults__, function.__kwdefaults__, function.__dict__]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    around = function.__globals__
    if is_library(around.get("__name__", "")):
        return found  # A handler's wrapper: it holds the user's function.
    names = names_of(function.__code__).every
    for name in names:
        held = around.get(name)
        if isinstance(held, types.ModuleType):
            # `module.data`: any of the names may be the module's.
            inside = vars(held)
            found += [inside[other] for other in names if other in inside]
        else:
            found.append(held)
    return found
