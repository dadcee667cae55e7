"""A guide with estimators that a host's own ELBO trains: the choice has no effect, which is said once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from pplgrad.errors import listed

Running = tuple[Any, str]
"""A method that is running: its object, and its name."""


def running_methods() -> Iterator[Running]:
    """Yield the methods that are running, innermost first.

    A host tells a guide nothing of the ELBO that runs it. Python does: each method's frame has its object as `self`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            yield frame.f_locals.get("self"), code.co_name
        frame = frame.f_back


def is_ours(elbo: object) -> bool:
    """Whether an ELBO is one of pplgrad's, or made of one."""
    return any(kind.__module__.startswith("pplgrad.") for kind in type(elbo).__mro__)


def foreign_elbo(running: Iterable[Running], elbo: type) -> Running | None:
    """Return the outermost ELBO that is running, and its method, unless one of pplgrad's takes part."""
    found = [(item, method) for item, method in running if isinstance(item, elbo)]
    return None if not found or any(is_ours(item) for item, _ in found) else found[-1]


def warn_without_effect(names: Iterable[str], elbo: object, remedy: str) -> None:
    """Warn that an ELBO does not read what the guide's wrapper says."""
    names = list(names)
    what = (
        f"the estimators of config_estimators, which names {listed(names)}"
        if names
        else "the watch of config_estimators"
    )
    warnings.warn(
        f"{type(elbo).__name__} does not read {what}: the choice has no effect. Train with {remedy}, or drop the wrapper.",
        UserWarning,
        stacklevel=2,
    )
