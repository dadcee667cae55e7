"""Whether a program can have changed since its dependencies were found: the Python state that it reads.

Dependencies are found by watching one run, and hold for later runs as long as the program does the same. What it
does is decided by its arguments and by the Python objects that its code can reach: closures, globals, attributes,
containers, arrays. A `Guard` remembers them, and `holds()` looks whether they are still the same. The world is closed: only
what is known to depend on its arguments alone (`_reuse/known_code.py`) is passed by; all else is looked into, and a program that
reaches what cannot be looked into (an iterator, a generator of random numbers, a cache, a file) has no guard, and is watched at
every step. What a tensor holds needs no guard: a run in which a value leaves the tensors is never reused.
"""

from __future__ import annotations

import array
import functools
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import getitem
from typing import Any

import numpy as np
import torch

from pplgrad.pyro._reuse import known_code as known
from pplgrad.pyro._reuse.arguments import arguments_kind
from pplgrad.pyro._reuse.guards_of_code import CodeVisits, Unwatchable
from pplgrad.pyro._reuse.probes import (
    ITEMS,
    MISSING,
    SIMPLE,
    Kind,
    Probe,
    alike,
    ambient_probe,
    array_probe,
    class_probe,
    contents_probe,
    handlers,
    hooks_of_all_modules,
    kind_of,
    mapping_probe,
    names_probe,
    params_probe,
    sequence_probe,
    strides_of,
)
from pplgrad.pyro._reuse.reads import (
    is_tensor,
    nothing,
    slot_of,
    slots_probe,
    which_are_one,
)

__all__ = ["Guard", "Unwatchable", "arguments_kind"]

_LIMIT = 20_000
_COMPARING = {"is_", "is_not", "is_set_to", "index", "count", "remove", "__contains__"}
"""Attributes by which tensors may be compared by identity."""
_PLACES = {"stride", "is_contiguous", "is_non_overlapping_and_dense", "dim_order"}
"""Attributes that tell where a tensor's numbers stand."""


class Guard(CodeVisits):
    """The Python state that some callables can reach, as a flat list of quick comparisons."""

    reads_shapes = True
    """Whether the shape of each parameter is compared."""

    def __init__(self, *roots: Any) -> None:
        self._probes: list[Probe] = [ambient_probe(), params_probe(self.reads_shapes)]
        self._seen: dict[int, Any] = {}
        self._done: set[int] = set()
        self._ahead: list[Any] = [*roots, *handlers(), *hooks_of_all_modules()]
        self._namespaces: dict[int, tuple[Mapping, dict[str, Any]]] = {}
        self._classes: list[tuple[Any, type]] = []
        # Modules that the program holds as values, and all attributes that it takes of anything.
        self._modules: list[types.ModuleType] = []
        self._attributes: set[str] = set()
        self._taken: set[tuple[int, str]] = set()
        self._compares = False
        self._tensors: list[Callable[[], Any]] = []
        self._walk()
        for namespace, names in self._namespaces.values():
            self._probes.append(names_probe(namespace, tuple(names), list(names.values())))
        if not _PLACES.isdisjoint(self._attributes) and self._tensors:
            every = self._tensors
            places = [strides_of(read()) for read in every]
            self._probes.append(lambda: [strides_of(read()) for read in every] == places)
        self._compares = self._compares or not _COMPARING.isdisjoint(self._attributes)
        if self._compares and self._tensors:
            reads = self._tensors
            same = which_are_one(reads)
            self._probes.append(lambda: which_are_one(reads) == same)
        objects, classes = [x for x, _ in self._classes], [x for _, x in self._classes]
        self._probes.append(lambda: list(map(type, objects)) == classes)

    @classmethod
    def of(cls, *roots: Any) -> Guard | None:
        """Return the guard of the callables, or None if they reach state that cannot be watched."""
        try:
            return cls(*roots)
        except Exception:  # Code of the program's own objects may run, and may raise anything.
            return None

    @classmethod
    def reason(cls, *roots: Any) -> str:
        """Return what the callables reach that cannot be watched, or nothing."""
        try:
            cls(*roots)
        except Unwatchable as error:
            return str(error)
        except Exception as error:
            return f"an object that raises {type(error).__name__}"
        return ""

    def also(self, probe: Callable[[], bool]) -> None:
        """Ask something else too, which is true now."""
        self._probes.append(probe)

    def holds(self) -> bool:
        """Return whether everything is as it was."""
        try:
            return all(probe() for probe in self._probes)
        except Exception:  # What cannot be read any more has changed.
            return False

    def meets(self, arguments: Sequence[torch.Tensor]) -> tuple:
        """Return which tensors among the arguments are which that the program holds, where it may compare them by identity.

        Where it asks for strides, these are returned too.
        """
        strides = () if _PLACES.isdisjoint(self._attributes) else tuple(map(strides_of, arguments))
        if not (self._compares and arguments):
            return strides
        held = {id(read()): number for number, read in enumerate(self._tensors)}
        return *strides, *(held.get(id(x)) for x in arguments)

    def _walk(self) -> None:
        while True:
            while self._ahead:
                if len(self._seen) > _LIMIT:
                    raise Unwatchable("too many objects")
                self._visit(self._ahead.pop())
            if not self._open_modules() and not self._open_tensors():
                return

    def _open_tensors(self) -> bool:
        """Go into what others than torch have put into the classes of tensors and modules; return whether anything was new."""
        new = False
        for kind in (torch.Tensor, torch.nn.Parameter, torch.nn.Module):
            for name in self._attributes & vars(kind).keys():
                found = vars(kind)[name]
                if (id(kind), name) not in self._taken and not _is_of_torch(found):
                    self._taken.add((id(kind), name))
                    self._names(vars(kind))[name] = self._see(found, vars(kind).get, name)
                    new = True
        return new

    def _open_modules(self) -> bool:
        """Go into what may be taken of the modules that the program holds as values; return whether anything was new."""
        if self._modules and not self._attributes.isdisjoint(known.LOOKING_UP):
            raise Unwatchable(f"attributes of the module {self._modules[0].__name__} by names that are computed")
        new = False
        for module in self._modules:
            for name in self._attributes:
                if (id(module), name) not in self._taken:
                    self._taken.add((id(module), name))
                    if hasattr(module, name):
                        self._of_module(module, (name,))
                        new = True
        return new

    # What is found in one place: its mark is compared from now on, and it is looked into.

    def _see(self, value: Any, read: Callable, *where: Any) -> Any:
        """Go on into a value, and return what is to be found in its place again."""
        kind = type(value)
        if kind in SIMPLE:
            return value
        if issubclass(kind, torch.Tensor):
            self._tensor(value, partial(read, *where))
            plain = not value.__dict__ and kind in (torch.Tensor, torch.nn.Parameter)
            return Kind(value) if plain else value
        self._ahead.append(value)
        return value

    def _tensor(self, value: torch.Tensor, read: Callable[[], Any]) -> None:
        self._tensors.append(read)
        if id(value) in self._seen:
            return
        if value.__dict__ or type(value) not in (torch.Tensor, torch.nn.Parameter):
            self._seen[id(value)] = value
            kind = kind_of(value)
            self._probes.append(lambda: kind_of(value) == kind)
            self._mapping(value.__dict__)
            self._class_of(value)

    def _visit(self, value: Any) -> None:
        kind = type(value)
        if kind in SIMPLE or id(value) in self._seen:
            return
        if issubclass(kind, torch.Tensor):
            self._see(value, lambda: value)
            return
        self._seen[id(value)] = value
        visit = _VISITS.get(kind)
        if visit is not None:
            visit(self, value)
        elif kind in known.ATOMS or kind.__module__ in ("typing", "_typing"):
            self._atom(value)
        elif issubclass(kind, np.generic) and kind is not np.void or issubclass(kind, np.dtype):
            return
        elif issubclass(kind, type):
            self._class(value)
        else:
            self._object(value)

    # Containers.

    def _sequence(self, value: Any) -> None:
        items = ITEMS[next(base for base in type(value).__mro__ if base in ITEMS)]
        indexed = isinstance(value, (list, tuple))
        kept = [
            self._see(item, *((getitem, value, i) if indexed else (nothing,))) for i, item in enumerate(items(value))
        ]
        if type(value) is not tuple or any(type(x) is Kind for x in kept):
            self._probes.append(sequence_probe(value, items, kept))

    def _mapping(self, value: Any, skipped: frozenset[str] = frozenset()) -> None:
        kind: Any = OrderedDict if issubclass(type(value), OrderedDict) else dict
        if id(value) in self._done:
            return
        self._done.add(id(value))
        self._seen[id(value)] = value
        keys = [key for key in kind.__iter__(value) if key not in skipped]
        kept = []
        for key in keys:
            if type(key) not in SIMPLE:
                self._compares = self._compares or isinstance(key, torch.Tensor)
                self._ahead.append(key)
            item = dict.__getitem__(value, key)
            kept.append(self._see(item, dict.get, value, key))
        self._probes.append(mapping_probe(value, keys, kept, skipped))

    def _default_dict(self, value: defaultdict) -> None:
        self._mapping(value)
        made = value.default_factory
        self._ahead.append(made)
        self._probes.append(lambda: value.default_factory is made)

    def _proxy(self, value: types.MappingProxyType) -> None:
        keys = list(value)
        self._ahead += keys
        self._probes.append(mapping_probe(value, keys, [self._see(value[key], getitem, value, key) for key in keys]))

    def _slice(self, value: slice) -> None:
        self._ahead += [value.start, value.stop, value.step]

    def _array(self, value: np.ndarray) -> None:
        if value.dtype.hasobject:
            if value.dtype != object:
                raise Unwatchable("an array with fields of Python objects")
            flat = value.view(np.ndarray).ravel
            kept = [self._see(item, nothing) for item in flat()]
            form = (value.dtype, value.shape)
            self._probes.append(lambda: (value.dtype, value.shape) == form and all(map(alike, kept, flat())))
        else:
            self._probes.append(array_probe(value))

    def _buffer(self, value: Any) -> None:
        if isinstance(value, memoryview):
            self._ahead.append(value.obj)
        self._probes.append(contents_probe(value))

    def _reference(self, value: weakref.ref) -> None:
        target = weakref.ref.__call__(value)
        self._ahead.append(target)
        self._probes.append(lambda: weakref.ref.__call__(value) is target)

    # Objects and classes.

    def _object(self, value: Any) -> None:
        cls: Any = type(value)
        skipped = known.changing(cls)
        if "*" in skipped:
            return
        hidden = known.hides_state(cls)
        if hidden is not None:
            visit = _VISITS.get(hidden)
            if visit is None:
                raise Unwatchable(f"an object of type {cls.__module__}.{cls.__qualname__}")
            if hidden is not np.ndarray or cls is not np.memmap:
                visit(self, value)
        if any("__next__" in vars(base) for base in cls.__mro__):
            raise Unwatchable(f"an iterator, of type {cls.__module__}.{cls.__qualname__}")
        self._attributes_of(value)

    def _attributes_of(self, value: Any) -> None:
        """Watch an object's class, attributes and slots."""
        cls: Any = type(value)
        self._class_of(value)
        slots = []
        for base in cls.__mro__:
            for name, slot in vars(base).items():
                if name == "__dict__" and type(slot) not in (types.GetSetDescriptorType, types.MemberDescriptorType):
                    raise Unwatchable(f"{cls.__qualname__}, which makes up its attributes")
                if type(slot) is types.MemberDescriptorType and name not in ("__dict__", "__weakref__"):
                    slots.append(slot)
        if slots:
            self._slots(value, slots)
        try:
            state = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return
        self._mapping(state, known.changing(cls))

    def _slots(self, value: Any, slots: Sequence[Any]) -> None:
        marks = [(slot, slot_of(slot, value)) for slot in slots]
        kept = [(slot, x if x is MISSING else self._see(x, slot_of, slot, value)) for slot, x in marks]
        self._probes.append(slots_probe(value, kept))

    def _class_of(self, value: Any) -> None:
        cls = type(value)
        self._classes.append((value, cls))
        if id(cls) not in self._seen:
            self._ahead.append(cls)

    def _class(self, cls: type) -> None:
        mro = cls.__mro__
        for base in mro:
            if base is not object and (base is cls or id(base) not in self._seen):
                self._seen[id(base)] = base
                self._one_class(base)
        if cls.__flags__ & known.HEAP:
            self._probes.append(lambda: cls.__mro__ is mro or cls.__mro__ == mro)
        if type(cls) is not type and id(type(cls)) not in self._seen:
            self._ahead.append(type(cls))

    def _one_class(self, cls: type) -> None:
        library = known.allowed(cls.__module__) and known.allowed_function(cls.__module__, cls.__qualname__)
        if not cls.__flags__ & known.HEAP:
            if not library:
                raise Unwatchable(f"the type {cls.__module__}.{cls.__qualname__}")
            return
        if library and cls.__module__ in known.SETTLED:
            return
        # An iterator's or a generator's class may be used inside of a run; only one that outlives it is refused.
        space = {name: found for name, found in vars(cls).items() if name not in known.NOT_OF_CLASSES}
        for found in space.values():
            if not library or type(found) not in known.CODE:
                if issubclass(type(found), torch.Tensor):
                    self._see(found, nothing)
                elif type(found) not in SIMPLE:
                    self._ahead.append(found)
        names, kept = list(space), [Kind(x) if is_tensor(x) else x for x in space.values()]
        self._probes.append(class_probe(vars(cls), names, kept))


_VISITS: dict[Any, Callable[[Any, Any], None]] = {
    types.FunctionType: Guard._function,
    types.BuiltinFunctionType: Guard._builtin,
    types.MethodType: Guard._method,
    types.MethodWrapperType: lambda self, value: self._ahead.append(value.__self__),
    types.CellType: Guard._cell,
    types.ModuleType: lambda self, value: self._of_module(value, ()),
    functools.partial: Guard._partial,
    functools._lru_cache_wrapper: Guard._cached,
    staticmethod: Guard._wrapped,
    classmethod: Guard._wrapped,
    property: Guard._wrapped,
    dict: Guard._mapping,
    OrderedDict: Guard._mapping,
    defaultdict: Guard._default_dict,
    types.MappingProxyType: Guard._proxy,
    slice: Guard._slice,
    np.ndarray: Guard._array,
    bytearray: Guard._buffer,
    memoryview: Guard._buffer,
    array.array: Guard._buffer,
    weakref.ref: Guard._reference,
    **dict.fromkeys(ITEMS, Guard._sequence),
    # Of these, a subclass's value is compared by its owner by identity, and cannot change.
    **dict.fromkeys((int, float, str, bytes, complex, torch.Size), lambda self, value: None),
}


def _is_of_torch(found: Any) -> bool:
    """Return whether an attribute of one of torch's classes is torch's own."""
    home = getattr(found, "__module__", None) or getattr(getattr(found, "__objclass__", None), "__module__", None)
    return (home or "").partition(".")[0] in ("torch", "builtins") or isinstance(found, property)
