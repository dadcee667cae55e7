"""The other values of a site at which its estimator asks for the cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pplgrad.core.array_ops import Array


@dataclass(frozen=True)
class ElementValues:
    """Alternatives that change one element each: number e · m + j gives element e the value that it has in `values[:, j]`.

    Attributes:
        values: the site's values with all elements changed, (particles, m, *B, *E).
        axes: the dimensions of (*B, *E) along which the elements lie, which count them in this order.
    """

    values: Array
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Values:
    """Alternative values of a site, computed by number: `at(numbers)` has shape (particles, len(numbers), *B, *E).

    The values are computed when they are needed, so that branches that run in chunks hold only the values of one chunk.

    Attributes:
        count: the number of alternative values.
        at: the function from numbers to values.
        per_step: of a site in a loop, the number of alternatives of each step. Number n is taken by step n // per_step alone.
        elements: what the alternatives are made of if each of them changes one element, number after number; `at` gives the same.
    """

    count: int
    at: Callable[[Array], Array]
    per_step: int | None = None
    elements: ElementValues | None = None

    def between(self, first: int, last: int) -> Values:
        """Return the values from one number up to another, which is not among them."""
        return Values(last - first, lambda numbers: self.at(numbers + first))

    @classmethod
    def of(cls, values: Array | Values) -> Values:
        """Return `Values` from an array of all alternatives, (particles, m, *B, *E)."""
        return values if isinstance(values, Values) else cls(values.shape[1], lambda numbers: values[:, numbers])


@dataclass(frozen=True)
class Alternatives:
    """The values of a site at which an estimator requests the downstream cost, and data that the estimator keeps for itself.

    Attributes:
        values: other values of the site, (particles, m, *B, *E) as `Draw.embed` returns them, or computed by number (`Values`). With
            `points` it is a function that returns them from an array like `points`.
        points: an array from which the values are computed. The derivative of the sum of their costs with respect to it is
            requested, and that of the draw's own cost along the draw.
        kept: anything that the estimator needs again in `branch_surrogate`.
        weights: weights of the categories, (particles, m', *plates, elements, categories), at which the derivative of the cost is requested
            too. Downstream discrete sites are then relaxed as well.
        temperature: the temperature at which downstream discrete sites are relaxed; None replaces them by their probabilities.
    """

    values: Array | Values | Callable[[Array], Values] | None = None
    kept: Any = None
    weights: Array | None = None
    temperature: Any = None
    points: Array | None = None

    @cached_property
    def placed(self) -> Values | None:
        """Return the values, computed from the points if there are any; None if no values are requested."""
        if self.points is not None:
            assert callable(self.values)
            return self.values(self.points)
        return None if self.values is None else Values.of(self.values)

    @property
    def count(self) -> int:
        """Return the number of values that are requested, without the weights."""
        return 0 if self.placed is None else self.placed.count
