"""What a function's code looks up by name: globals, attributes of modules, what it imports."""

from __future__ import annotations

import dis
import types
from dataclasses import dataclass, field
from functools import cache

_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD"}
_LOCALS = {
    "LOAD_FAST",
    "LOAD_DEREF",
    "LOAD_CLASSDEREF",
    "LOAD_FAST_CHECK",
    "LOAD_FAST_BORROW",
    "LOAD_FROM_DICT_OR_DEREF",
}
_STORES = {"STORE_FAST", "STORE_DEREF", "STORE_NAME"}
_SILENT = {"EXTENDED_ARG", "CACHE", "NOP", "PUSH_NULL", "RESUME"}


@dataclass
class Names:
    """The names in a function's code and in the functions inside it.

    `chains` are names looked up with the attributes taken of them at once (`np.random.rand`): of a module only those are
    read. `attributes` are all attributes that are taken of anything, `imports` what is imported: the module, how many
    levels up, what of it (or None), and the local name. `compares` says whether objects are compared by identity (`is`, `in`).
    """

    chains: set[tuple[bool, str, tuple[str, ...]]] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    imports: set[tuple[str, int, tuple[str, ...] | None, str]] = field(default_factory=set)
    compares: bool = False

    @property
    def every(self) -> set[str]:
        """All names, whatever is looked up under them."""
        return self.attributes.union(*((name, *chain) for _, name, chain in self.chains))


@cache
def names_of(code: types.CodeType) -> Names:
    """Return the names that a function's code looks up; what is not understood counts as looked up in every way."""
    found = Names()
    _collect(code, found)
    return found


def _collect(code: types.CodeType, found: Names) -> None:
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SILENT]
    understood: set[str] = set()
    for i, step in enumerate(steps):
        if step.opname in _GLOBALS or step.opname in _LOCALS:
            chain = _chain(steps, i + 1)
            names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            found.chains.update((step.opname in _GLOBALS, name, chain) for name in names)
            understood.update(names if step.opname in _GLOBALS else (), chain)
        elif step.opname in _ATTRIBUTES:
            found.attributes.add(step.argval)
        elif step.opname == "CONTAINS_OP" or (step.opname == "IS_OP" and steps[i - 1].opname != "LOAD_CONST"):
            found.compares = True
        elif step.opname == "IMPORT_NAME":
            _import(steps, i, found)
    for name in set(code.co_names) - understood:
        found.attributes.add(name)
        found.chains.add((True, name, ()))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _collect(constant, found)


def _chain(steps: list[dis.Instruction], i: int) -> tuple[str, ...]:
    start = i
    while i < len(steps) and steps[i].opname in _ATTRIBUTES:
        i += 1
    return tuple(step.argval for step in steps[start:i])


def _import(steps: list[dis.Instruction], i: int, found: Names) -> None:
    """Note an import: `import a.b as c` takes attributes of the module `a`, `from a import b` what of it is named."""
    level = steps[i - 2].argval if i >= 2 else 0
    wanted = steps[i - 1].argval if i >= 1 else None
    module = steps[i].argval
    if wanted:
        found.imports.add((module, level if isinstance(level, int) else 0, tuple(wanted), ""))
        return
    # `import a.b` gives the name of `a`, and `import a.b as c` that of the last module.
    i += 1
    last = module.partition(".")[0]
    while i < len(steps) and steps[i].opname in ("IMPORT_FROM", "SWAP", "POP_TOP"):
        last = module
        i += 1
    if i < len(steps) and steps[i].opname in _STORES:
        found.imports.add((last, level if isinstance(level, int) else 0, None, steps[i].argval))
    else:
        found.imports.add((last, 0, None, ""))
