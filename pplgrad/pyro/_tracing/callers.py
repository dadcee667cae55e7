"""Who is at work: the user's program, or a library that checks its arguments."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType

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
    "pplgrad.pyro._compile.aten_recorder",
    __name__,
)
_SUPPRESSING = {"suppress", "raises", "ExitStack", "assertRaises"}
# Reading a truth value inside these is a check of arguments, not control flow of the user's program.
_CHECKING = ("torch.distributions", "pyro.distributions", "pyro.util", "pyro.poutine", "pyro.infer")


def _frames() -> Iterator[tuple[str, FrameType]]:
    """Yield who is at work, innermost first: the name of the module, and the frame."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame
        frame = frame.f_back  # type: ignore[assignment]


def user_line() -> str:
    """Return the file and line of the innermost code that is neither a library's nor ours."""
    for module, frame in _frames():
        if not is_library(module):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "an unknown line"


def is_check() -> bool:
    """Return whether a library that checks arguments is at work, and not the user's program."""
    for module, _ in _frames():
        if module.startswith(_CHECKING):
            return True
        if not _only_runs(module):
            return False
    return False


def cuts_derivative(without_gradient: bool) -> str | None:
    """Return who cuts a derivative in an operation that runs: None if a library does, which gives it back.

    It is the name of the user's function with a derivative of its own, which may be any, or "" for other code of the program's. Where
    nothing but the gradient is off (`without_gradient`), a library's function with a derivative of its own cuts nothing.
    """
    library: bool | None = None
    own = False
    for module, frame in _frames():
        if module == "torch.autograd.function":
            function = _function_of(frame)
            if function is not None and function.__module__.partition(".")[0] not in _LIBRARIES:
                return f"the autograd.Function {function.__name__}"
            own = True
        elif library is None and not _only_runs(module):
            library = module.partition(".")[0] in _LIBRARIES
    return None if library or (own and without_gradient) else ""


def _function_of(frame: FrameType) -> type | None:
    """Return the class with `forward` and `backward` that a frame of torch's applies."""
    if frame.f_code.co_name != "apply":
        return None
    given = frame.f_locals
    found = given.get("cls", type(given["self"]) if "self" in given else None)
    return getattr(found, "_forward_cls", found)


def may_be_caught() -> bool:
    """Return whether the user's program would catch an error that is raised now: then it learns something if there is none, too."""
    for module, frame in _frames():
        if module.startswith("pplgrad.") and module not in _WATCHING:
            return False  # Further out is who called us, and not the program.
        if not is_library(module) and frame.f_lasti in _covered(frame.f_code):
            return True
    return False


@lru_cache(4096)
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


def _only_runs(module: str) -> bool:
    """Return whether a module's code runs or watches an operation for whoever asked for it."""
    return module in _WATCHING or module.partition(".")[0] == "torch"


def is_library(module: str) -> bool:
    """Return whether a module's lines are of no use to who looks for the place in his program."""
    top = module.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names
