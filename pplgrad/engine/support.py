r"""What decides where a distribution's support ends.

E[∇θ log q(z; θ)] = 0 needs ∫ q = 1 to be differentiated under the integral, so the region that is integrated over may not move with θ.
The hosts' distributions name their bounds alike, in `support`; a chain of transforms does not say where it takes the
bounds of what it starts from, and is followed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_ERRORS = (NotImplementedError, AttributeError, ValueError, TypeError, AssertionError)
_NO_VALUES = (str, bytes, int, float, bool, complex, type(None), type)
# Where an interval ends: numbers or arrays; None for a region that is no interval.
Edges = tuple[Any, Any] | None
_REAL: Edges = (-math.inf, math.inf)


@dataclass(frozen=True)
class Classes:
    """The host's classes: of distributions, wrappers that change no value, transformed ones, points, and constraints.

    `known` returns an array's value as a number if it has one value, which no gradient reaches, and else None.
    """

    distribution: Any
    wrappers: tuple[Any, ...]
    transformed: Any
    delta: Any
    constraint: Any
    is_array: Callable[[Any], bool]
    known: Callable[[Any], float | None]


class Support:
    """Finds the arrays that decide where the support of a distribution ends."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes

    def arrays(self, fn: Any) -> list[Any]:
        """Return the arrays that the edges of a distribution's support are computed from."""
        while isinstance(fn, self._classes.wrappers):
            fn = fn.base_dist
        declared = getattr(type(fn), "support", None)
        fixed = isinstance(declared, self._classes.constraint) and not isinstance(declared, property)
        if fixed and not hasattr(fn, "base_dist"):
            return []  # A support that is the same for all of a class: the quickest answer, and the most frequent.
        if isinstance(fn, self._classes.delta):
            return list(self._inside(fn.v))
        found = [x for part in self._parts(fn) for x in self.arrays(part)]
        if isinstance(fn, self._classes.transformed) and declared is self._classes.transformed.support:
            return found + self._transformed(fn)[1]
        return found + list(self._inside(_attribute(fn, "support")))

    def _parts(self, fn: Any) -> Iterator[Any]:
        """Yield the distributions that a distribution is made of: components of a mixture, what is truncated or transformed."""
        for value in getattr(fn, "__dict__", {}).values():
            for part in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(part, self._classes.distribution):
                    yield part

    def _inside(self, thing: Any) -> Iterator[Any]:
        """Yield the arrays in a constraint or transform, however deep."""
        waiting, seen = [thing], set()
        while waiting:
            value = waiting.pop()
            if isinstance(value, _NO_VALUES) or id(value) in seen:
                continue
            seen.add(id(value))
            if self._classes.is_array(value):
                yield value
            elif isinstance(value, dict):
                # What a transform has cached of its last call is none of its parameters.
                waiting += [x for key, x in value.items() if not str(key).startswith("_cached")]
            elif isinstance(value, (list, tuple, set)):
                waiting += value
            else:
                waiting.append(getattr(value, "__dict__", {}))

    def _transformed(self, fn: Any) -> tuple[Edges, list[Any]]:
        """Return where transforms take the edges of their base, and the arrays that decide it."""
        edges, found = self._edges(fn.base_dist)
        for transform in _flat(fn.transforms):
            codomain = _attribute(transform, "codomain")
            if edges is not None and all(self._is_infinite(edge) for edge in edges):
                # All of the numbers are taken to all of the codomain.
                edges, more = _edges_of(codomain), list(self._inside(codomain))
            elif edges is None or _attribute(transform, "domain") is None:
                edges, more = None, list(self._inside(transform))
            else:
                edges, more = self._moved(transform, edges)
            found = found + more
        return edges, found

    def _edges(self, fn: Any) -> tuple[Edges, list[Any]]:
        while isinstance(fn, self._classes.wrappers):
            fn = fn.base_dist
        if isinstance(fn, self._classes.transformed) and type(fn).support is self._classes.transformed.support:
            return self._transformed(fn)
        return _edges_of(_attribute(fn, "support")), []

    def _is_infinite(self, edge: Any) -> bool:
        at = edge if isinstance(edge, (int, float)) else self._classes.known(edge)
        return at is not None and math.isinf(at)

    def _moved(self, transform: Any, edges: tuple[Any, Any]) -> tuple[Edges, list[Any]]:
        """Return where a transform of single numbers takes edges, and the arrays of its own that matter there."""
        found: list[Any] = []
        for edge in edges:
            if self._is_infinite(edge):
                continue
            at = edge if isinstance(edge, (int, float)) else self._classes.known(edge)
            if hasattr(transform, "loc") and hasattr(transform, "scale"):
                # The scale moves no edge at zero.
                found += self._inside([transform.loc, *([] if at == 0 else [transform.scale])])
            elif hasattr(transform, "exponent"):
                found += self._inside([] if at in (0, 1) else transform.exponent)
            else:
                found += self._inside(transform)
        moved = []
        for edge in edges:
            try:
                stays = self._is_infinite(edge) and hasattr(transform, "loc")
                moved.append(edge if stays else transform(edge))
            except _ERRORS:  # One that wants an array.
                moved.append(None)
        return (None if None in [x if x is None else 0 for x in moved] else (moved[0], moved[1])), found


def _attribute(thing: Any, name: str) -> Any:
    """Return what something says of itself, None where it says nothing."""
    try:
        return getattr(thing, name)
    except _ERRORS:
        return None


def _flat(transforms: Any) -> Iterator[Any]:
    """Yield transforms one after the other, with those that one is composed of in its place."""
    for transform in transforms:
        parts = _attribute(transform, "parts")
        inner = _attribute(transform, "base_transform")
        if isinstance(parts, (list, tuple)):
            yield from _flat(parts)
        elif inner is not None:
            yield from _flat([inner])
        else:
            yield transform


def _edges_of(constraint: Any) -> Edges:
    """Return where the interval that a constraint on single numbers describes ends, None if it describes none."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    low, high = _attribute(constraint, "lower_bound"), _attribute(constraint, "upper_bound")
    if low is None and high is None:
        return _REAL if type(constraint).__name__ in ("_Real", "_RealVector") else None
    return (-math.inf if low is None else low, math.inf if high is None else high)
