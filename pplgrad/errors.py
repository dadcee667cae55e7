"""The errors that pplgrad raises: each is one plain sentence that names the site and the remedy."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BaselineError",
    "CompileError",
    "ConfigurationError",
    "EstimatorError",
    "ImpossibleValueError",
    "PplgradError",
    "ProgramError",
]


class PplgradError(ValueError):
    """Base class of every error that pplgrad raises on purpose.

    >>> issubclass(ConfigurationError, PplgradError)
    True
    """


class ConfigurationError(PplgradError):
    """A name or a pattern in an estimator mapping matches nothing, or a specification has the wrong type."""


class EstimatorError(PplgradError):
    """An estimator was bound to a site that it does not fit."""


class BaselineError(PplgradError):
    """A baseline cannot be used as asked: wrong shape, NaN, its own site's value, too few particles."""


class ImpossibleValueError(PplgradError):
    """A cost of the program is NaN or infinite; the message names the site that made it."""


class ProgramError(PplgradError):
    """The model and the guide do not form a program that the estimator can differentiate."""


class CompileError(ProgramError):
    """The program's step cannot be compiled; the message names the line and what to write instead."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of somebody else's says, for an error message; its kind where it says nothing.

    >>> first_line(KeyError()), first_line(ValueError("no\\nTrace Shapes:"))
    ('KeyError', 'no')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def listed(names: Iterable[str]) -> str:
    """Return names in quotes, for an error message."""
    return ", ".join(f"'{name}'" for name in names) or "none"
