"""Data that the model simulates, in the place of the real data among the program's arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from pplgrad.errors import ConfigurationError, ProgramError

Place = int | str
Given = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments."""


def places(args: tuple, kwargs: Mapping[str, Any], observed: Mapping[str, np.ndarray]) -> dict[str, Place]:
    """Return, for each observed site, the argument that is its value; refuse a program in which that is not one argument.

    >>> places((np.arange(2), 3), {}, {"x": np.arange(2)})
    {'x': 0}
    """
    given: dict[Place, Any] = {**dict(enumerate(args)), **kwargs}
    found: dict[str, Place] = {}
    for name, value in observed.items():
        fitting = [place for place, x in given.items() if _is(x, value)]
        if len(fitting) != 1 or fitting[0] in found.values():
            raise ConfigurationError(
                f"Site '{name}' is observed, and its value is {'more than one' if fitting else 'none'} of the program's arguments, so that it cannot be "
                "seen where simulated data belong; pass dream=, a function from a mapping of observed sites to simulated data, and the "
                'program\'s arguments, to the tuple of new arguments: dream=lambda drawn, x: (drawn["x"],).'
            )
        found[name] = fitting[0]
    return found


def _is(x: Any, value: np.ndarray) -> bool:
    if not hasattr(x, "shape") and not isinstance(x, (int, float)):
        return False
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    return array.shape == value.shape and np.array_equal(array, value)


def renewed(
    args: tuple,
    kwargs: Mapping[str, Any],
    drawn: Mapping[str, Any],
    where: Mapping[str, Place] | None,
    dream: Callable[..., tuple] | None,
    cast: Callable[[Any, Any], Any],
) -> Given:
    """Return the arguments with simulated data: by `dream`, or at the places of the real data, cast to the kind of what was there."""
    if dream is not None:
        found = dream(dict(drawn), *args, **kwargs)
        if not isinstance(found, tuple):
            raise ConfigurationError(
                f"dream= returned {type(found).__name__}; it returns the tuple of the program's arguments, such as (drawn['x'],)."
            )
        return found, {}
    assert where is not None
    new_args, new_kwargs = list(args), dict(kwargs)
    for name, place in where.items():
        if isinstance(place, int):
            new_args[place] = cast(drawn[name], args[place])
        else:
            new_kwargs[place] = cast(drawn[name], kwargs[place])
    return tuple(new_args), new_kwargs


def refuse_not_simulated(first: float, second: float, names: Collection[str]) -> None:
    """Refuse a model whose density at simulated data is not that with which it drew them: it reads its data elsewhere, too."""
    if not abs(first - second) <= 1e-3 * (1 + abs(first)):
        listed = ", ".join(f"'{name}'" for name in names)
        raise ProgramError(
            f"The model gives simulated data of {listed} another density as its arguments (log p = {second:.4g}) than it drew them with "
            f"({first:.4g}), so that it cannot be calibrated: it reads its data for other purposes too; check dream=, or draw each datum "
            "from those drawn before it."
        )


def refuse_unread(changes: Collection[bool]) -> None:
    """Refuse a guide that is the same for all data, which calibration would call wrong."""
    if not any(changes):
        raise ConfigurationError(
            "The guide's density does not change with the data, so that it is not fitted to simulated data; pass refit=, a function from the "
            "program's arguments with simulated data to a fitted guide."
        )


def refuse_factors(names: Collection[str]) -> None:
    """Refuse to simulate from a model that is no distribution over its data."""
    if names:
        raise ProgramError(
            f"Site '{sorted(names)[0]}' is a factor, so that the model draws no data by itself and cannot be calibrated; use simulations=0."
        )
