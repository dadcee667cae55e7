"""Who is at work: the user's program, or a library that checks its arguments."""

from __future__ import annotations

import sys

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
_WATCHING = ("pplgrad.pyro._provenance", "pplgrad.pyro._leaving", "pplgrad.pyro._recording", __name__)
# Reading a truth value inside these is a check of arguments, not control flow of the user's program.
_CHECKING = ("torch.distributions", "pyro.distributions", "pyro.util", "pyro.poutine", "pyro.infer")


def user_line() -> str:
    """Return the file and line of the innermost code that is neither a library's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        if not is_library(frame.f_globals.get("__name__", "")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


def is_check() -> bool:
    """Return whether a library that checks arguments is at work, and not the user's program."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_CHECKING):
            return True
        if module not in _WATCHING and module.partition(".")[0] != "torch":
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_own_derivative() -> bool:
    """Return whether a function with a derivative of its own is at work, or a library: neither cuts what the user's program asks for."""
    frame = sys._getframe(1)
    seen = False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == "torch.autograd.function":
            return True
        if not seen and module not in _WATCHING and module.partition(".")[0] != "torch":
            seen = True
            if module.partition(".")[0] in _LIBRARIES:
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_library(module: str) -> bool:
    """Return whether a module's lines are of no use to who looks for the place in his program."""
    top = module.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names
