"""Reads of Python's objects by which a guard compares them."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pplgrad.pyro._reuse.probes import MISSING, alike


def which_are_one(reads: list[Callable[[], Any]]) -> list[int]:
    """Return, for each place that holds a tensor, the first place that holds the same one."""
    first: dict[int, int] = {}
    return [first.setdefault(id(read()), i) for i, read in enumerate(reads)]


def which_are_one_of(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return, for each tensor, the place of the first that is the same object; nothing if all are different ones."""
    first: dict[int, int] = {}
    places = tuple(first.setdefault(id(x), i) for i, x in enumerate(tensors))
    return places if len(first) < len(tensors) else ()


def nothing(*_: Any) -> None:
    """Stand for the place of a tensor that cannot be found again."""


def content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def slot_of(slot: Any, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return MISSING


def slots_probe(value: Any, slots: Sequence[tuple[Any, Any]]) -> Callable[[], bool]:
    """Return a probe of an object's slots, each with what was found in it."""

    def probe() -> bool:
        for slot, mark in slots:
            found = slot_of(slot, value)
            if found is not mark and not alike(mark, found):
                return False
        return True

    return probe


def function_state(function: Any) -> tuple:
    return (function.__code__, function.__defaults__, function.__kwdefaults__)


def partial_state(value: Any) -> tuple:
    get = functools.partial.__dict__
    return tuple(get[name].__get__(value) for name in ("func", "args", "keywords"))


def is_own(function: types.FunctionType) -> bool:
    """Return whether a function is what its library has under its name, and no wrapper around a user's."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def is_module_in(module: types.ModuleType, chain: tuple[str, ...]) -> bool:
    """Return whether what is taken of a module that is not allowed is the name of another module in it that is."""
    found = vars(module).get(chain[0]) if chain else None
    return isinstance(found, types.ModuleType)


def times_taken(code: types.CodeType, name: str) -> int:
    """Return how often a function's code takes an attribute."""
    count = sum(
        step.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR") and step.argval == name
        for step in dis.get_instructions(code)
    )
    return count + sum(times_taken(x, name) for x in code.co_consts if isinstance(x, types.CodeType))


def is_tensor(value: Any) -> bool:
    return issubclass(type(value), torch.Tensor)
