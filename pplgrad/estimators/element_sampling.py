"""A part of a site's elements, drawn without replacement with known probabilities of being among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.draw import Draw

_LEAST = 0.05
"""What every element has beside its own size, as a part of the mean size: the smallest probability bounds the largest weight."""


def inclusion_probabilities(xp: Any, sizes: Array, count: int) -> Array:
    """Return probabilities proportional to sizes, those above 1 cut, whose sum over the last axis is `count`.

    With the m largest cut to 1, the others share count − m; m is the smallest number for which none of them exceeds 1.
    """
    ordered = xp.flip(xp.sort(sizes, axis=-1), axis=-1)
    rest = xp.flip(xp.cumulative_sum(xp.flip(ordered, axis=-1), axis=-1), axis=-1)
    factors = xp.stack([(count - m) / rest[..., m] for m in range(count)], axis=-1)
    fits = factors * ordered[..., :count] <= 1
    first = xp.argmax(xp.astype(fits, sizes.dtype), axis=-1)
    factor = xp.take_along_axis(factors, first[..., None], axis=-1)
    # Where all are cut but as many elements as remain, the last factor cuts these too.
    factor = xp.where(xp.any(fits, axis=-1)[..., None], factor, factors[..., -1:])
    return xp.minimum(factor * sizes, xp.ones_like(sizes))


def systematic(xp: Any, probabilities: Array, uniform: Array, steps: Array) -> Array:
    """Return the numbers of the elements in whose part of a line, as long as its probability, one of u, u + 1, u + 2, ... falls.

    Systematic sampling (Madow, 1949): each element is drawn with its own probability, and none twice.
    """
    ends = xp.cumulative_sum(probabilities, axis=-1)
    marks = uniform[..., None] + xp.astype(steps, uniform.dtype)
    before = xp.sum(xp.astype(ends[..., None, :] <= marks[..., None], steps.dtype), axis=-1)
    return xp.minimum(before, xp.full_like(before, probabilities.shape[-1] - 1))


def offset(draw: Draw, probabilities: Array) -> Array:
    """Return a uniform number for each row of elements: where the first of the marks stands."""
    return draw.noise.uniform(tuple(probabilities.shape[:-1]), draw.score)


@dataclass(frozen=True)
class Part:
    """The elements drawn and the probability of each to be among them, both (particles, *plates, count)."""

    ops: Ops
    chosen: Array
    probabilities: Array

    @classmethod
    def of(cls, draw: Draw, count: int) -> Part:
        """Draw so many elements, those of uncertain values more often."""
        ops, xp = draw.ops, draw.ops.xp
        spread = 1 - xp.sum(xp.exp(2 * ops.stop_gradient(draw.log_probs)), axis=-1)
        tiny = xp.finfo(spread.dtype).tiny
        sizes = spread + _LEAST * xp.mean(spread, axis=-1, keepdims=True) + tiny
        probabilities = inclusion_probabilities(xp, sizes, count)
        chosen = systematic(xp, probabilities, offset(draw, probabilities), ops.arange(count, draw.index))
        return cls(ops, chosen, xp.take_along_axis(probabilities, chosen, axis=-1))

    def is_chosen(self, numbers: Array, elements: int) -> Array:
        """Return whether each element is the chosen one of that number, (particles, len(numbers), *plates, elements)."""
        xp = self.ops.xp
        chosen = xp.moveaxis(xp.take(self.chosen, numbers, axis=-1), -1, 1)
        return chosen[..., None] == self.ops.arange(elements, numbers)

    def of_chosen(self, x: Array, behind: int = 0) -> Array:
        """Return the chosen elements of an array (particles, *plates, elements), with further dimensions behind."""
        xp, tail = self.ops.xp, tuple(x.shape[len(x.shape) - behind :])
        at = xp.reshape(self.chosen, (*self.chosen.shape, *(1,) * behind))
        at = xp.broadcast_to(at, (*self.chosen.shape, *tail))
        return xp.take_along_axis(x, at, axis=len(self.chosen.shape) - 1)
