"""What a function's code can reach: the names it looks up, the modules it takes things of, what its calls are made of."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import pyro

from pplgrad.pyro._reuse import known_code as known
from pplgrad.pyro._reuse.names_in_code import Names, names_of
from pplgrad.pyro._reuse.probes import (
    MISSING,
    Probe,
    alike,
)
from pplgrad.pyro._reuse.reads import (
    content_of,
    function_state,
    is_module_in,
    is_own,
    partial_state,
    times_taken,
)


class Unwatchable(Exception):
    """The program reaches state whose changes cannot be seen."""


class CodeVisits:
    """The part of a guard that goes into functions; what they reach is put before the rest of it."""

    _probes: list[Probe]
    _seen: dict[int, Any]
    _ahead: list[Any]
    _namespaces: dict[int, tuple[Mapping, dict[str, Any]]]
    _modules: list[types.ModuleType]
    _attributes: set[str]
    _taken: set[tuple[int, str]]
    _compares: bool
    _see: Callable[..., Any]
    _mapping: Callable[..., None]
    _attributes_of: Callable[[Any], None]

    def _atom(self, value: Any) -> None:
        owner = getattr(value, "__objclass__", None)
        if owner is not None and isinstance(value, (types.MethodDescriptorType, types.ClassMethodDescriptorType)):
            if not known.allowed(owner.__module__):
                raise Unwatchable(f"{value.__qualname__} of the module {owner.__module__}")

    # Functions and names.

    def _function(self, function: types.FunctionType) -> None:
        module, home, name = function.__globals__.get("__name__", ""), function.__module__, function.__qualname__
        if not known.allowed(module):
            if known.excepted_function(f"{module}.{name}"):
                return
            self._code(function)
        elif known.allowed(home) and is_own(function):
            if name == "get_param_store":
                self._ahead.append(pyro.get_param_store())
            elif not known.allowed_function(home, name):
                raise Unwatchable(f"{home}.{name}()")
            return
        elif function.__closure__ is None:
            return
        state = (function.__code__, function.__defaults__, function.__kwdefaults__)
        read = function_state
        self._probes.append(lambda: read(function) == state)
        self._ahead += [function.__defaults__, function.__kwdefaults__]
        self._mapping(function.__dict__)
        for cell in function.__closure__ or ():
            self._cell(cell)

    def _cell(self, cell: types.CellType) -> None:
        self._seen[id(cell)] = cell
        found = content_of(cell)
        if isinstance(found, types.ModuleType):
            # The code that takes its attributes is looked at; here is only whether it is the same.
            mark = found
        else:
            mark = self._see(found, content_of, cell) if found is not MISSING else found
        self._probes.append(lambda: alike(mark, content_of(cell)))

    def _code(self, function: types.FunctionType) -> None:
        names = names_of(function.__code__)
        if not known.HIDDEN.isdisjoint(names.attributes):
            self._hidden(names, function)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        imported = self._imports(names, function.__globals__)
        for is_global, name, chain in names.chains:
            if is_global and name == "hash" and function.__name__ == "__hash__":
                continue
            if is_global:
                self._global(function.__globals__, name, chain)
            elif name in imported:
                self._of_module(imported[name], chain)
            elif name in cells and isinstance(content_of(cells[name]), types.ModuleType):
                self._of_module(content_of(cells[name]), chain)
        self._attributes |= names.attributes
        self._compares |= names.compares

    def _hidden(self, names: Names, function: types.FunctionType) -> None:
        """Refuse attributes that show what cannot be watched, unless they are functions of modules (`torch.autograd.grad`)."""
        for name in names.attributes & known.HIDDEN:
            owners = [(root, chain) for _, root, chain in names.chains if name in chain]
            found = function.__globals__
            if not owners or not all(isinstance(found.get(root), types.ModuleType) for root, _ in owners):
                raise Unwatchable(f"the attribute {name}")
            if times_taken(function.__code__, name) > len(owners):
                raise Unwatchable(f"the attribute {name}")

    def _imports(self, names: Names, namespace: Mapping) -> dict[str, types.ModuleType]:
        found: dict[str, types.ModuleType] = {}
        for name, level, wanted, local in names.imports:
            full = importlib.util.resolve_name("." * level + name, namespace.get("__package__")) if level else name
            module = sys.modules.get(full)
            if module is None:
                raise Unwatchable(f"an import of {full}, which has not run yet")
            self._probes.append(lambda full=full, module=module: sys.modules.get(full) is module)  # type: ignore[misc]
            for each in wanted or ():
                if each == "*":
                    raise Unwatchable(f"an import of all of {full}")
                self._of_module(module, (each,))
            if wanted is None and (not local or local in found):
                self._modules.append(module)
            elif wanted is None:
                found[local] = module
        return found

    def _global(self, namespace: dict, name: str, chain: tuple[str, ...]) -> None:
        found = namespace.get(name, MISSING)
        if found is MISSING:
            self._names(namespace)[name] = MISSING
            inside = namespace.get("__builtins__", {})
            inside = vars(inside) if isinstance(inside, types.ModuleType) else inside
            found = inside.get(name, MISSING)
            if found is MISSING:
                return
            if not known.allowed_builtin(name):
                raise Unwatchable(f"{name}()")
            self._names(inside)[name] = found
            if name in known.LOOKING_UP:
                self._attributes.add(name)
        elif isinstance(found, types.ModuleType):
            self._names(namespace)[name] = found
            self._of_module(found, chain)
        elif name not in self._names(namespace):
            self._names(namespace)[name] = self._see(found, namespace.get, name)

    def _of_module(self, module: types.ModuleType, chain: tuple[str, ...]) -> None:
        """Go into what is taken of a module, or remember that the program holds the module itself."""
        if known.denied(module.__name__):
            self._deny(module, chain)
        if not chain:
            if (id(module), "") not in self._taken:
                self._taken.add((id(module), ""))
                self._modules.append(module)
            return
        name, *others = chain
        if name == "__class__":
            return
        if name in known.LOOKING_UP or name in ("__dict__", "__builtins__", "__loader__"):
            raise Unwatchable(f"{module.__name__}.{name}")
        namespace = vars(module)
        found = namespace[name] if name in namespace else getattr(module, name, MISSING)
        if found is MISSING:
            self._names(namespace)[name] = MISSING
        elif isinstance(found, types.ModuleType):
            if name in namespace:
                self._names(namespace)[name] = found
            self._of_module(found, tuple(others))
        elif name in namespace:
            if name not in self._names(namespace):
                self._deny(module, chain)
                self._names(namespace)[name] = self._see(found, namespace.get, name)
        elif not known.allowed(module.__name__):
            raise Unwatchable(f"{module.__name__}.{name}, which is made up when it is read")
        else:
            self._ahead.append(found)

    def _deny(self, module: types.ModuleType, chain: tuple[str, ...]) -> None:
        full = ".".join((module.__name__, *chain[:1]))
        if known.denied_function(full) and chain[:1] != ("get_param_store",):
            raise Unwatchable(full)
        if known.denied(module.__name__) and not known.excepted_function(full) and not is_module_in(module, chain):
            raise Unwatchable(full)

    def _names(self, namespace: Mapping) -> dict[str, Any]:
        return self._namespaces.setdefault(id(namespace), (namespace, {}))[1]

    def _builtin(self, function: types.BuiltinFunctionType) -> None:
        owner = function.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            module = function.__module__ or getattr(owner, "__name__", "")
            if not known.allowed_function(module, function.__name__):
                raise Unwatchable(f"{module}.{function.__name__}()")
        elif isinstance(owner, type):
            if function.__module__ is not None and not known.allowed_function(function.__module__, function.__name__):
                raise Unwatchable(f"{function.__module__}.{function.__name__}()")
            self._ahead.append(owner)
        else:
            self._ahead.append(owner)

    def _method(self, method: types.MethodType) -> None:
        self._ahead += [method.__func__, method.__self__]

    def _partial(self, value: functools.partial) -> None:
        state = partial_state(value)
        self._probes.append(lambda: all(x is y for x, y in zip(partial_state(value), state, strict=True)))
        self._ahead += state
        self._attributes_of(value)

    def _wrapped(self, value: Any) -> None:
        """Look into a static or class method, or a property."""
        parts = ("__func__",) if isinstance(value, (staticmethod, classmethod)) else ("fget", "fset", "fdel")
        self._ahead += [getattr(value, part) for part in parts]
        self._attributes_of(value)

    def _cached(self, value: Any) -> None:
        function = value.__wrapped__
        if not known.allowed(getattr(function, "__module__", None)):
            raise Unwatchable(f"the cache of {function.__qualname__}")
