"""Who is at work: the user's program, or a library that checks its arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

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


def is_own_derivative() -> bool:
    """Return whether a function with a derivative of its own is at work, or a library: neither cuts what the user's program asks for."""
    innermost = True
    for module, _ in _frames():
        if module == "torch.autograd.function":
            return True
        if innermost and not _only_runs(module):
            innermost = False
            if module.partition(".")[0] in _LIBRARIES:
                return True
    return False


def _only_runs(module: str) -> bool:
    """Return whether a module's code runs or watches an operation for whoever asked for it."""
    return module in _WATCHING or module.partition(".")[0] == "torch"


def is_library(module: str) -> bool:
    """Return whether a module's lines are of no use to who looks for the place in his program."""
    top = module.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names
