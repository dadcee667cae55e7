"""One of the independent throws whose counts a Multinomial draw holds, summed over where it may fall."""

from __future__ import annotations

from dataclasses import dataclass

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, bounded, is_possible
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms


@dataclass(frozen=True)
class Throw:
    """A throw of each element, drawn among its n throws: the draw z holds n independent categories, which are alike.

    Estimates ∇ E_q[f(z)] = n Σ_c ∇p_c E[f(z − e_b + e_c)], where the throw b falls into a category with probability z / n.

    Attributes:
        own: log p of the throw's own category, with its gradient, (particles, *plates, elements).
        others: log p of the other categories in a cycle from there, (particles, *plates, elements, categories − 1).
        total: the number n, a constant (particles, *plates, elements).
    """

    own: Array
    others: Array
    total: Array

    @classmethod
    def alternatives(cls, draw: Draw) -> Alternatives:
        """Return, for each element, the draw with its throw in every other category; an impossible one is left at the draw."""
        ops, xp, z = draw.ops, draw.ops.xp, draw.value
        log_probs = bounded(xp, draw.throws)
        count = log_probs.shape[-1]
        total = xp.sum(z, axis=-1)
        # Without a throw the weights are 0, and any category will do.
        share = xp.where(total[..., None] > 0, z, xp.ones_like(z)) / xp.where(total > 0, total, count)[..., None]
        number = draw.noise.categorical(bounded(xp, xp.log(share)))
        others = (number[..., None] + 1 + ops.arange(count - 1, number)) % count
        found = xp.take_along_axis(log_probs, others, axis=-1)
        places = ops.arange(count, number)
        own = xp.astype(number[..., None] == places, z.dtype)
        values = (z - own)[..., None, :] + xp.astype(others[..., None] == places, z.dtype)
        kept = is_possible(xp, ops.stop_gradient(found)) & (total > 0)[..., None]
        values = xp.moveaxis(xp.where(kept[..., None], values, z[..., None, :]), -2, 1)

        throw = cls(xp.take_along_axis(log_probs, number[..., None], axis=-1)[..., 0], found, total)
        return Alternatives(draw.changed_one_by_one(values), throw)

    def surrogate(self, terms: BranchTerms) -> Array:
        """Return n Σ_c p_c (f(z − e_b + e_c) − f(z)), of whose p all derivatives are right."""
        xp = terms.ops.xp
        costs = terms.costs_of_elements(self.others.shape[-2])
        sums = xp.sum(xp.exp(self.others) * (costs - terms.downstream[..., None, None]), axis=-1)
        total = xp.sum(self.total * sums)
        if not terms.higher_order:
            return total
        one = xp.exp(self.own - terms.ops.stop_gradient(self.own))
        return total - xp.sum(self.total * one * terms.downstream[..., None])
