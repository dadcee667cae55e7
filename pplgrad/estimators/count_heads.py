"""The head of a law of counts summed, its tail sampled: what estimators that sum over values share on infinite supports."""

from __future__ import annotations

from dataclasses import dataclass

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, is_possible
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms


@dataclass(frozen=True)
class Head:
    """Some counts H of each element, whose part of the gradient is summed; none depends on the draw.

    Estimates ∇ E_q[f(z)] = Σ_{k ∈ H} (f(k) − b) ∇q(k) + E_q[1{z ∉ H} (f(z) − b) ∇log q(z)], with b = Σ_{k ∈ H} q(k) f(k) / q(H). The
    second term takes the program's own draw, and no other.

    Attributes:
        values: the counts, (particles, *plates, elements, size).
        log_probs: their log q with its gradient, of the same shape.
        own: log q of the draw, (particles, *plates, elements).
    """

    values: Array
    log_probs: Array
    own: Array

    @classmethod
    def around_the_mean(cls, draw: Draw, size: int) -> Head:
        """Return consecutive counts around the mean."""
        first, log_probs, own = draw.counts(size)
        numbers = draw.ops.xp.astype(draw.ops.arange(size, draw.value), first.dtype)
        return cls(first[..., None] + numbers, log_probs, own)

    @classmethod
    def most_probable(cls, draw: Draw, size: int, among: int) -> Head:
        """Return the most probable of consecutive counts around the mean."""
        xp, every = draw.ops.xp, cls.around_the_mean(draw, among)
        order = xp.argsort(draw.ops.stop_gradient(every.log_probs), axis=-1, descending=True)[..., :size]
        values, log_probs = (xp.take_along_axis(x, order, axis=-1) for x in (every.values, every.log_probs))
        return cls(values, log_probs, every.own)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return, for each element, the draw with each of its counts; an impossible one is left at the draw."""
        xp, value = draw.ops.xp, draw.value
        kept = xp.where(is_possible(xp, draw.ops.stop_gradient(self.log_probs)), self.values, value[..., None])
        return Alternatives(draw.changed_one_by_one(xp.moveaxis(kept, -1, 1)), self)

    def surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_{k ∈ H} q(k) (f(k) − b) + 1{z ∉ H} q(z) / q(z) (f(z) − b), of whose q all derivatives are right."""
        ops, xp = terms.ops, terms.ops.xp
        costs = terms.costs_of_elements(self.values.shape[-2])
        probs, fixed = xp.exp(self.log_probs), xp.exp(ops.stop_gradient(self.log_probs))
        mass = xp.sum(fixed, axis=-1)
        baseline = xp.sum(fixed * costs, axis=-1) / xp.where(mass > 0, mass, xp.ones_like(mass))
        own = terms.downstream[..., None]
        outside = ~xp.any(self.values == terms.draw.value[..., None], axis=-1)
        one = xp.exp(self.own - ops.stop_gradient(self.own))
        total = xp.sum(probs * (costs - baseline[..., None])) + xp.sum(
            xp.where(outside, one * (own - baseline), xp.zeros_like(one))
        )
        # Of the sum over the values and of the score at the draw all derivatives have the same mean.
        return total - xp.sum(one * own) if terms.higher_order else total
