"""Whether a program can have changed since its dependencies were found: the Python state that it reads.

Dependencies are found by watching one run, and hold for later runs as long as the program does the same. What it
does is decided by its arguments and by the Python objects that its code can reach: closures, globals, attributes,
containers. A `Guard` remembers those that could steer it, and `holds()` looks whether they are still the same. A program
that reaches state which cannot be watched (an iterator, a random number generator) has no guard, and is watched at
every step. What a tensor holds needs no guard: a run in which a value leaves the tensors is never reused.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, slice)
_OPAQUE = {
    "torch",
    "pyro",
    "pplgrad",
    "numpy",
    "scipy",
    "pandas",
    "sklearn",
    "matplotlib",
    "array_api_compat",
    "opt_einsum",
    "tqdm",
}
_UNWATCHABLE = {"random", "time", "secrets", "uuid", "datetime", "itertools", "_io", "io", "socket", "queue"}
_LIMIT = 20_000
_MISSING = object()


class Unwatchable(Exception):
    """The program reaches state whose changes cannot be seen."""


class Guard:
    """The Python state that two callables can reach, as a flat list of quick comparisons."""

    def __init__(self, *roots: Any) -> None:
        self._probes: list[tuple[Callable[[], Any], Any, bool]] = []
        self._seen: set[int] = set()
        self._kept: list[Any] = []
        for root in roots:
            self._visit(root)

    @classmethod
    def of(cls, *roots: Any) -> Guard | None:
        """Return the guard of the callables, or None if they reach state that cannot be watched."""
        try:
            return cls(*roots)
        except (Unwatchable, RecursionError):
            return None

    def holds(self) -> bool:
        """Return whether everything is as it was."""
        for read, expected, same in self._probes:
            try:
                found = read()
            except (LookupError, ValueError, AttributeError):
                return False
            if found is expected:
                continue
            if same or type(found) is not type(expected) or found != expected:
                return False
        return True

    def _watch(self, read: Callable[[], Any]) -> None:
        """Compare what `read` returns from now on, and go on into it."""
        if len(self._probes) > _LIMIT:
            raise Unwatchable
        value = read()
        if isinstance(value, torch.Tensor):
            self._probes.append((lambda: _tensor_kind(read()), _tensor_kind(value), False))
        elif isinstance(value, _SIMPLE):
            self._probes.append((read, value, False))
        else:
            self._probes.append((read, value, True))
            self._visit(value)

    def _visit(self, value: Any) -> None:
        if isinstance(value, (torch.Tensor, *_SIMPLE)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif isinstance(value, types.MethodType):
            self._visit(value.__func__)
            self._visit(value.__self__)
        elif isinstance(value, functools.partial):
            self._visit((value.func, value.args, value.keywords))
        elif isinstance(value, (list, tuple, set, frozenset)):
            self._visit_items(value)
        elif isinstance(value, Mapping):
            self._visit_mapping(value)
        elif isinstance(value, np.ndarray):
            self._probes.append((lambda: value.tobytes() if value.nbytes < 4096 else value.shape, *_array_kind(value)))
        elif isinstance(value, type):
            self._visit_class(value)
        elif not isinstance(value, (types.ModuleType, types.BuiltinFunctionType, property)):
            self._visit_object(value)

    def _visit_function(self, function: types.FunctionType) -> None:
        if is_library(function.__globals__.get("__name__", "")):
            # A handler's wrapper: its own code is fixed, but it holds the user's function.
            self._visit_cells(function)
            self._visit(getattr(function, "__wrapped__", None))
            return
        self._visit_cells(function)
        self._visit(function.__defaults__)
        self._visit(function.__kwdefaults__)
        names = _names(function.__code__)
        for name in names & function.__globals__.keys():
            found = function.__globals__[name]
            if isinstance(found, types.ModuleType):
                self._visit_module(found, names)
            else:
                self._watch(lambda g=function.__globals__, n=name: g.get(n, _MISSING))  # type: ignore[misc]

    def _visit_cells(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            try:
                self._watch(lambda c=cell: c.cell_contents)  # type: ignore[misc]
            except ValueError:
                continue

    def _visit_module(self, module: types.ModuleType, names: set[str]) -> None:
        top = module.__name__.partition(".")[0]
        if top in _UNWATCHABLE or (top == "numpy" and ("random" in names or module.__name__ == "numpy.random")):
            raise Unwatchable
        if is_library(module.__name__):
            return
        for name in names & vars(module).keys():
            found = vars(module)[name]
            if isinstance(found, types.ModuleType):
                self._visit_module(found, names)
            else:
                self._watch(lambda d=vars(module), n=name: d.get(n, _MISSING))  # type: ignore[misc]

    def _visit_items(self, value: Any) -> None:
        self._probes.append((lambda: len(value), len(value), False))
        if isinstance(value, (list, tuple)):
            for i in range(len(value)):
                self._watch(lambda v=value, i=i: v[i])  # type: ignore[misc]
        elif not all(isinstance(item, _SIMPLE) for item in value):
            raise Unwatchable
        else:
            kept = set(value)
            self._probes.append((lambda: value == kept, True, False))

    def _visit_mapping(self, value: Mapping) -> None:
        self._probes.append((lambda: len(value), len(value), False))
        for key in list(value):
            self._watch(lambda v=value, k=key: v.get(k, _MISSING))  # type: ignore[misc]

    def _visit_class(self, cls: type) -> None:
        if is_library(cls.__module__):
            return
        for name, found in list(vars(cls).items()):
            if isinstance(found, (staticmethod, classmethod)):
                self._visit(found.__func__)
            elif isinstance(found, property):
                self._visit(found.fget)
            elif not name.startswith("__") or isinstance(found, types.FunctionType):
                self._watch(lambda c=cls, n=name: vars(c).get(n, _MISSING))  # type: ignore[misc]
        for base in cls.__bases__:
            self._visit(base)

    def _visit_object(self, value: Any) -> None:
        cls = type(value)
        if hasattr(cls, "__next__") or cls.__module__.partition(".")[0] in _UNWATCHABLE:
            raise Unwatchable
        if isinstance(value, torch.nn.Module):
            self._probes.append((lambda: value.training, value.training, False))
            for name in value._modules:
                self._watch(lambda m=value._modules, n=name: m.get(n, _MISSING))  # type: ignore[misc]
        state = getattr(value, "__dict__", None)
        if is_library(cls.__module__):
            self._visit_callables(state or {})
            return
        self._visit_class(cls)
        if state is None:
            raise Unwatchable
        skipped = {"_parameters", "_buffers", "_modules"} if isinstance(value, torch.nn.Module) else set()
        for name in list(state):
            if name not in skipped:
                self._watch(lambda s=state, n=name: s.get(n, _MISSING))  # type: ignore[misc]

    def _visit_callables(self, state: Mapping) -> None:
        """Go into the user's functions that a library's object (a handler, an autoguide) holds."""
        for held in list(state.values()):
            for item in held if isinstance(held, (list, tuple)) else [held]:
                if isinstance(item, (types.FunctionType, types.MethodType, functools.partial)):
                    self._visit(item)


def arguments_kind(value: Any, objects: list[Any]) -> Any:
    """Return what of an argument can steer a program: shapes and dtypes of arrays, all else by value or identity.

    Objects that are known by identity alone are added to `objects`, to be guarded like the program itself.
    """
    if isinstance(value, torch.Tensor):
        return _tensor_kind(value)
    if isinstance(value, slice):
        return str(value)
    if isinstance(value, _SIMPLE):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), *(arguments_kind(item, objects) for item in value))
    if isinstance(value, Mapping):
        return (type(value), *((key, arguments_kind(item, objects)) for key, item in value.items()))
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), value.tobytes() if value.nbytes < 4096 else None)
    objects.append(value)
    return (type(value), id(value))


def _tensor_kind(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return type(tensor)
    return (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)


def _array_kind(value: np.ndarray) -> tuple[Any, bool]:
    return (value.tobytes() if value.nbytes < 4096 else value.shape), False


def _names(code: types.CodeType) -> set[str]:
    """Return the global and attribute names that a function's code mentions, with the functions inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def is_library(module: str) -> bool:
    """Return whether a module is a library whose code does not change."""
    top = module.partition(".")[0]
    return top in _OPAQUE or top in sys.stdlib_module_names
