"""Data that the model simulates, in the place of the real data among the program's arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from pplgrad.errors import ConfigurationError, ProgramError

Place = tuple[int | str, ...]
"""Where an array stands: the number or name of an argument, and further numbers and keys where that is a tuple, a list or a dict."""
Given = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments."""


def places(args: tuple, kwargs: Mapping[str, Any], observed: Mapping[str, np.ndarray]) -> dict[str, Place]:
    """Return, for each observed site, where its value stands among the arguments; refuse a program in which that is not one place.

    >>> places((np.arange(2), {"y": 3}), {}, {"x": np.arange(2), "y": np.array(3)})
    {'x': (0,), 'y': (1, 'y')}
    """
    given = list(_leaves({**dict(enumerate(args)), **kwargs}))
    found: dict[str, Place] = {}
    for name, value in observed.items():
        fitting = [place for place, x in given if _is(x, value)]
        if len(fitting) != 1 or fitting[0] in found.values():
            raise ConfigurationError(
                f"Site '{name}' is observed, and its value is {'in more than one place' if fitting else 'nowhere'} among the program's arguments, so "
                "that it cannot be seen where simulated data belong; in Python pass dream= to assess_fit, a function from a mapping of observed "
                'sites to simulated data, and the program\'s arguments, to the tuple of new arguments: dream=lambda drawn, x: (drawn["x"],).'
            )
        found[name] = fitting[0]
    return found


def _leaves(x: Any, before: Place = ()) -> Iterator[tuple[Place, Any]]:
    if isinstance(x, Mapping):
        for key, value in x.items():
            yield from _leaves(value, (*before, key))
    elif isinstance(x, (tuple, list)):
        for number, value in enumerate(x):
            yield from _leaves(value, (*before, number))
    else:
        yield before, x


def _is(x: Any, value: np.ndarray) -> bool:
    if isinstance(x, bool) or not (hasattr(x, "shape") or isinstance(x, (int, float))):
        return False
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    return array.shape == value.shape and np.array_equal(array, value)


def _with(x: Any, place: Place, change: Callable[[Any], Any]) -> Any:
    """Return a copy of nested tuples, lists and dicts with what stands at a place changed."""
    if not place:
        return change(x)
    first, rest = place[0], place[1:]
    if isinstance(x, Mapping):
        return {key: _with(value, rest, change) if key == first else value for key, value in x.items()}
    changed = [_with(value, rest, change) if i == first else value for i, value in enumerate(x)]
    if hasattr(x, "_fields"):
        return type(x)(*changed)
    return type(x)(changed)


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
    given: Any = {**dict(enumerate(args)), **kwargs}
    for name, place in where.items():
        given = _with(given, place, lambda like, name=name: cast(drawn[name], like))  # type: ignore[misc]
    return tuple(given[i] for i in range(len(args))), {key: given[key] for key in kwargs}


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
            "The guide's density does not change with the data, so that it is not fitted to simulated data; in Python pass refit= to assess_fit, "
            "a function that fits it to the program's arguments with simulated data."
        )


def refuse_factors(names: Collection[str]) -> None:
    """Refuse to simulate from a model that is no distribution over its data."""
    if names:
        raise ProgramError(
            f"Site '{sorted(names)[0]}' is a factor, so that the model draws no data by itself and cannot be calibrated; use simulations=0."
        )
