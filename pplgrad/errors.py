"""Errors of pplgrad. Each message is one plain sentence that names the site and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

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

    Example:
        >>> issubclass(ConfigurationError, PplgradError) and issubclass(PplgradError, ValueError)
        True
    """


class ConfigurationError(PplgradError):
    """A name or pattern in an estimator mapping matches no site, or a specification has the wrong type or value.

    Example:
        >>> from pplgrad.core.objectives import IWAE
        >>> try:
        ...     IWAE(samples=0)
        ... except ConfigurationError as error:
        ...     "samples=0" in str(error)
        True
    """


class UnmatchedNameError(ConfigurationError):
    """A name or pattern matches no latent site; `key` is what was written, and `sites` are the latent sites there are.

    Example:
        >>> str(UnmatchedNameError("config_estimators", "zz", ["z"]))
        "config_estimators names 'zz', which matches no latent site of the guide; the sites are: 'z'; did you mean 'z'?"
    """

    def __init__(self, owner: str, key: str, sites: Iterable[str]) -> None:
        self.key, self.sites = key, list(sites)
        hint = did_you_mean(key, self.sites)
        ending = f"the sites are: {listed(self.sites)}{hint or '.'}"
        super().__init__(f"{owner} names '{key}', which matches no latent site of the guide; {ending}")

    def __reduce__(self) -> Any:
        # It travels between processes as its parts.
        return _again, (self.key, self.sites, str(self))


def _again(key: str, sites: list[str], text: str) -> UnmatchedNameError:
    error = UnmatchedNameError("", key, sites)
    error.args = (text,)
    return error


class EstimatorError(PplgradError):
    """An estimator was bound to a site that it does not fit.

    Example:
        >>> from pplgrad.core.site_info import SiteInfo
        >>> from pplgrad.estimators import DisARM
        >>> try:
        ...     DisARM().check(SiteInfo("z", "Normal", has_rsample=True, is_discrete=False, particles=1))
        ... except EstimatorError as error:
        ...     "'z'" in str(error)
        True
    """


class BaselineError(PplgradError):
    """A baseline cannot be used as specified: wrong shape, NaN, a dependence on its own site's value, or too few particles.

    Example:
        >>> from pplgrad.baselines import LeaveOneOut
        >>> from pplgrad.core.site_info import SiteInfo
        >>> try:
        ...     LeaveOneOut().check(SiteInfo("z", "Bernoulli", has_rsample=False, is_discrete=True, particles=1))
        ... except BaselineError as error:
        ...     "'z'" in str(error)
        True
    """


class ImpossibleValueError(PplgradError):
    """A cost of the program is NaN or infinite. The message names the site of that cost.

    Example:
        >>> issubclass(ImpossibleValueError, PplgradError)
        True
    """


class ProgramError(PplgradError):
    """Model and guide do not form a program that the estimator can differentiate.

    Example:
        >>> issubclass(ProgramError, PplgradError)
        True
    """


class CompileError(ProgramError):
    """The program's training step cannot be compiled. The message names the line and what to write instead.

    Example:
        >>> issubclass(CompileError, ProgramError)
        True
    """


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, for an error message.

    Returns:
        The first line that is not empty, or the error's type name if its message is empty.

    Example:
        >>> first_line(KeyError()), first_line(ValueError("no\\nTrace Shapes:"))
        ('KeyError', 'no')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message that names what a misspelt name is nearly; nothing where there is none.

    Example:
        >>> did_you_mean("numpiro", ["pyro", "numpyro"]), did_you_mean("stan", ["pyro"])
        ("; did you mean 'numpyro'?", '')
    """
    near = nearest(name, known)
    return "" if near is None else f"; did you mean '{near}'?"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the name that a misspelt one is nearly, whatever its case; None where there is none.

    Example:
        >>> nearest("disarm", ["ARM", "DisARM"]), nearest("stan", ["pyro"])
        ('DisARM', None)
    """
    lower = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), lower, 1, 0.5)
    return lower[near[0]] if near else None


def listed(names: Iterable[str]) -> str:
    """Return names in quotes and separated by commas, for an error message; "none" without names."""
    return ", ".join(f"'{name}'" for name in names) or "none"
