"""Whose code runs: the user's program, or a library that checks its arguments."""

from __future__ import annotations

import dis
import sys
from functools import cache
from types import CodeType, FrameType
from typing import NamedTuple

_LIBRARIES = {
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
_WATCHING = (
    "pplgrad.pyro._tracing.provenance",
    "pplgrad.pyro._tracing.escapes",
    "pplgrad.pyro._tracing.argument_checks",
    "pplgrad.pyro._tracing.known_laws",
    "pplgrad.pyro._compile.aten_recorder",
    __name__,
)
_SUPPRESSING = {"suppress", "raises", "ExitStack", "assertRaises"}
# Reading a truth value inside these is a check of arguments, not control flow of the user's program.
_CHECKING = (
    "torch.distributions",
    "pyro.distributions",
    "pyro.util",
    "pyro.poutine",
    "pyro.infer",
    "pplgrad.pyro._structures",
)
# Their functions that keep what they read to themselves, and those whose results are densities, draws or traces and no truth values.
_CHECKS = {"__init__", "_validate_sample", "enumerate_support", "__iter__", "init_to_mean"}
_RUN_CHECKS = set(
    "log_prob __call__ sample rsample cdf icdf entropy expand mask forward apply_stack scale_and_mask score_parts _HalfCauchy_logprob "
    "compute_log_prob get_trace".split()
)


class _Module(NamedTuple):
    """What there is to know of the module whose code a frame runs."""

    name: str
    is_library: bool
    checks: bool
    only_runs: bool
    calls_us: bool
    """Whether it is a module of pplgrad that does not act for the program: the caller is further out."""


_MOST_CODE = 4096
# By the identity of a module's globals, which are kept, so that no other ones get their place in memory.
_modules: dict[int, tuple[dict, _Module]] = {}
_caught: dict[int, tuple[CodeType, frozenset[int]]] = {}


def forget_modules() -> None:
    """Let go of the program's modules that were seen, and of code where it is much."""
    for key in [key for key, (_, module) in _modules.items() if not module.is_library]:
        del _modules[key]
    if len(_caught) > _MOST_CODE:
        _caught.clear()


def _module_of(frame: FrameType) -> _Module:
    known = frame.f_globals
    found = _modules.get(id(known))
    if found is None:
        name = known.get("__name__", "")
        watches = name in _WATCHING
        found = (
            known,
            _Module(
                name,
                is_library(name),
                name.startswith(_CHECKING),
                watches or name.partition(".")[0] == "torch",
                name.startswith("pplgrad.") and not watches,
            ),
        )
        _modules[id(known)] = found
    return found[1]


def user_line() -> str:
    """Return the file and line of the innermost code that is neither a library's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not _module_of(frame).is_library:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def is_users() -> bool:
    """Return whether the program's own line asks torch, and no library on its way."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = _module_of(frame)
        if module.name not in _WATCHING and module.name not in ("torch.overrides", "torch._tensor"):
            return not module.is_library
        frame = frame.f_back
    return False


def is_check() -> bool:
    """Return whether the running code is a library's check of arguments, and not the user's program.

    A helper of the library that hands what it reads to the program (`pyro.infer.util.torch_item`) is the program's.
    """
    frame: FrameType | None = sys._getframe(1)
    outermost = None
    while frame is not None:
        module = _module_of(frame)
        if module.checks:
            if frame.f_code.co_name in _CHECKS:
                return True
            outermost = frame.f_code.co_name
        elif not module.only_runs:
            break
        frame = frame.f_back
    return outermost in _RUN_CHECKS


def cuts_derivative(without_gradient: bool) -> str | None:
    """Return who cuts a derivative in an operation that runs: None if a library does, which gives it back.

    It is the name of the user's function with a derivative of its own, which may be any, or "" for other code of the program's. Where
    nothing but the gradient is off (`without_gradient`), a library's function with a derivative of its own cuts nothing.
    """
    library: bool | None = None
    own = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = _module_of(frame)
        if module.name == "torch.autograd.function":
            function = _function_of(frame)
            if function is not None and function.__module__.partition(".")[0] not in _LIBRARIES:
                return f"the autograd.Function {function.__name__}"
            own = True
        elif library is None and not module.only_runs:
            library = module.name.partition(".")[0] in _LIBRARIES
        frame = frame.f_back
    return None if library or (own and without_gradient) else ""


def _function_of(frame: FrameType) -> type | None:
    """Return the class with `forward` and `backward` that a frame of torch's applies."""
    if frame.f_code.co_name != "apply":
        return None
    given = frame.f_locals
    found = given.get("cls", type(given["self"]) if "self" in given else None)
    return getattr(found, "_forward_cls", found)


def may_be_caught(skipped: int = 0) -> bool:
    """Return whether the user's program would catch an error that is raised now: then it learns something if there is none, too.

    So many of the innermost frames, beside the caller's, are `skipped`: ours, which act for the program.
    """
    frame: FrameType | None = sys._getframe(1 + skipped)
    while frame is not None:
        known = _modules.get(id(frame.f_globals))
        module = _module_of(frame) if known is None else known[1]
        if module.calls_us:
            return False
        if not module.is_library and frame.f_lasti in _caught_in(frame.f_code):
            return True
        frame = frame.f_back
    return False


def _caught_in(code: CodeType) -> frozenset[int]:
    # By identity: codes of two files may be equal, and their hash goes through all that they hold.
    found = _caught.get(id(code))
    if found is None:
        found = _caught[id(code)] = code, _covered(code)
    return found[1]


def _covered(code: CodeType) -> frozenset[int]:
    """Return the places in a function's code where an error is caught; by `with`, if that may be of `suppress` or its like."""
    caught: set[int] = set()
    entries = getattr(dis.Bytecode(code), "exception_entries", None)
    if entries is None:  # Not known in this version of Python: everything may be caught.
        return frozenset(range(len(code.co_code)))
    names = {x.offset: x.opname for x in dis.get_instructions(code)}
    suppressing = not _SUPPRESSING.isdisjoint(code.co_names)
    for entry in entries:
        first = [names[place] for place in sorted(names) if place >= entry.target][:2]
        cleans_up = "WITH_EXCEPT_START" in first
        if first[:1] == ["PUSH_EXC_INFO"] and (suppressing or not cleans_up):
            caught.update(range(entry.start, entry.end))
    return frozenset(caught)


@cache
def is_library(module: str) -> bool:
    """Return whether a module's lines are of no use to who looks for the place in his program."""
    top = module.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names
