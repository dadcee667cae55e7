"""The tensors that were there before a program ran: its arguments, the param store, and what its code and objects hold.

A tensor that turns up in a run, was not there before and was made by no operation that was seen came by a way that cannot be
followed. Nothing here has to be complete: what is missed is taken for such a tensor, which is right and costs variance.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyro
import torch

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


def _within(value: Any) -> Iterator[Any]:
    """Yield what an object holds, as far as a program gets at it by names."""
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, type):
        yield from _of_class(value)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, Mapping):
        yield from list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from list(value)
    else:
        yield from list(getattr(value, "__dict__", {}).values())
        for name in (n for cls in type(value).__mro__ for n in _slots(cls)):
            yield getattr(value, name, None)
        yield from _of_class(type(value))


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _of_class(cls: type) -> Iterator[Any]:
    """Yield what the classes of a user's object hold: their methods read globals too."""
    for base in cls.__mro__:
        if not is_library(base.__module__):
            yield from list(vars(base).values())


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue
    yield function.__defaults__
    yield function.__kwdefaults__
    yield function.__dict__
    if is_library(function.__globals__.get("__name__", "")):
        return  # A handler's wrapper: it holds the user's function.
    names = names_of(function.__code__).every
    for name in names:
        held = function.__globals__.get(name)
        if isinstance(held, types.ModuleType):
            # `module.data`: any of the names may be the module's.
            yield from [vars(held)[other] for other in names & vars(held).keys()]
        else:
            yield held
