"""Local expectation gradients: every value of every element, weighted by its probability."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from pplgrad.core.alternatives import Alternatives, Values
from pplgrad.core.array_ops import Array, Ops, chosen, few_categories
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.estimators.count_heads import Head
from pplgrad.estimators.element_sampling import Part
from pplgrad.estimators.site_requirements import require_finite_or_count, require_unscanned
from pplgrad.estimators.throws import Throw


@dataclass(frozen=True, repr=False)
class LocalExpectation(Estimator):
    r"""The local expectation gradient: an exact sum over all values of one element at a time, with the others at their draw.

    Estimates ∇θ E_q[f(z)] = E_q[Σ_d Σ_v ∇θ q_d(v) f(z with z_d = v)]. q_d(v) is the probability that element d has the value v.
    The expectation over the element is exact, and the expectation over everything else is sampled. Derivatives of every order
    are right under `higher_order=True`.

    Counts without a known end (Poisson, negative binomial, zero-inflated and others) are summed over a head H of `head` counts around the
    mean, and a draw outside of it has the score-function term: Σ_{k ∈ H} (f(k) − b) ∇q(k) + 1{z ∉ H} (f(z) − b) ∇log q(z), where b is
    the mean cost over H. The estimate is unbiased for every head.

    A Multinomial draw holds the counts of n independent throws. One of them, in a category b drawn from z / n, is summed over all
    categories c, and counts n times: n Σ_c ∇p_c f(z − e_b + e_c).

    With `elements=k` only k of a site's D elements are summed, drawn without replacement: element d with probability π_d, proportional to
    1 − Σ_v q_d(v)² where that is possible. Its sum is multiplied by 1 / π_d, which keeps the estimate unbiased (Horvitz and Thompson, 1952).

    Args:
        head: the number of counts that are summed over where there are infinitely many; at least 1. Default: 16.
        elements: the number k of elements that are summed, at least 1; None for all of them. Default: None.

    Shapes:
        Elements are the entries of `to_event`, of batch dimensions that no plate declares, and of plates that a downstream cost
        does not have. Each element that is summed needs (categories − 1) evaluations of the program, or `head` of them for counts. A Multinomial
        vector is one element. All elements of the other plates change at
        once. Costs are in nats.

    Assumptions:
        The cost is finite at every value of positive probability. Values of probability 0 contribute zero, and the program is never
        run at them. A cost that is infinite at a value of positive probability raises an error that names it, or makes the loss NaN
        under `jit`.

    Raises:
        ConfigurationError: if `head` or `elements` is below 1.
        EstimatorError: on a site whose elements are neither finite nor single counts, and that is not Multinomial; with `elements` on counts without a known end; on a site that is drawn inside a `scan` in the body of another one.

    Example:
        >>> LocalExpectation().declaration.unbiased
        True

    References:
        Titsias and Lázaro-Gredilla (2015), equation 8. A part of the elements: Arya et al. (2022), pruning.
    """

    head: int = 16
    elements: int | None = None
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="finitely many values, single counts, Multinomial",
        evaluations="elements × (categories − 1), or × head",
        differentiable_costs=False,
        derivatives=None,
        source="Titsias and Lázaro-Gredilla 2015",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.head, bool) or not isinstance(self.head, int) or self.head < 1:
            raise ConfigurationError(f"LocalExpectation(head={self.head!r}): give a number of counts, 1 or more.")
        if self.elements is not None and not (
            isinstance(self.elements, int) and not isinstance(self.elements, bool) and self.elements > 0
        ):
            raise ConfigurationError(
                f"LocalExpectation(elements={self.elements!r}): give a number of elements, 1 or more, or None."
            )

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"LocalExpectation({', '.join(given)})"

    @property
    def num_counts(self) -> int:
        """Return the number of counts that are summed where there are infinitely many."""
        return self.head

    def check(self, site: SiteInfo) -> None:
        """Refuse a site whose elements have neither finitely many values nor are single counts, or the counts of throws."""
        if site.distribution == "Multinomial" and site.categories is None:
            require_unscanned(self, site)
        else:
            require_finite_or_count(self, site)
        if self.elements is not None and site.categories is None:
            raise EstimatorError(
                f"{self!r} at site '{site.name}' sums a part of the elements, which is for elements of finitely many values each, and "
                f"those of {site.distribution} are not listed; drop elements."
            )

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return, for each element, the draw with every other value of that element, or with every count of its head."""
        if draw.is_thrown:
            return Throw.alternatives(draw)
        if not draw.is_finite:
            return Head.around_the_mean(draw, self.head).alternatives(draw)
        xp, index = draw.ops.xp, draw.index
        elements, categories = index.shape[-1], draw.categories
        if categories == 1:
            return Alternatives()  # The draw has its only value: the sum does not depend on any parameter.
        shifts = xp.reshape(draw.ops.arange(categories - 1, index) + 1, (1, -1, *(1,) * (len(index.shape) - 1)))
        others = (index[:, None] + shifts) % categories
        if self.elements is None or self.elements >= elements:
            return Alternatives(draw.changed_one_by_one(draw.embed_each(others)))
        part = Part.of(draw, self.elements)

        def at(numbers: Array) -> Array:
            taken = xp.take(others, numbers % (categories - 1), axis=1)
            here = part.is_chosen(numbers // (categories - 1), elements)
            return draw.embed(xp.where(here, taken, index[:, None]))

        return Alternatives(Values(self.elements * (categories - 1), at), part)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_d Σ_v q_d(v) f(z with z_d = v)."""
        if terms.draw.is_thrown or not terms.draw.is_finite:
            return terms.alternatives.kept.surrogate(terms)
        draw, xp, part = terms.draw, terms.ops.xp, terms.alternatives.kept
        if draw.categories == 1:
            return xp.sum(xp.zeros_like(terms.downstream))
        index = draw.index if part is None else part.of_chosen(draw.index)
        log_probs = draw.log_probs if part is None else part.of_chosen(draw.log_probs, 1)
        elements, categories = log_probs.shape[-2:]
        others = terms.costs_of_elements(elements)  # By the other values' shift from the draw.
        own = terms.downstream[..., None]
        # Only differences between values count: without the draw's own cost the sums stay small.
        moved = _by_category(draw.ops, index, others - own[..., None])
        sums = xp.sum(xp.exp(log_probs) * moved, axis=-1)
        total = xp.sum(sums if part is None else sums / part.probabilities)
        if not terms.higher_order:
            return total
        # Of the sum over the values and of the score at the draw all derivatives have the same mean.
        log_q = xp.take_along_axis(draw.log_probs, draw.index[..., None], axis=-1)[..., 0]
        return total - xp.sum(xp.exp(log_q - terms.ops.stop_gradient(log_q)) * terms.downstream[..., None])


def _by_category(ops: Ops, index: Array, others: Array) -> Array:
    """Return what each category adds to the draw's own cost, from what the others add by their shift from the draw; the draw's own adds 0."""
    xp, categories = ops.xp, others.shape[-1] + 1
    shifts = (ops.arange(categories, index) - index[..., None]) % categories
    few = few_categories(xp, others)
    if few is None:
        by_shift = xp.concat([xp.zeros_like(others[..., :1]), others], axis=-1)
        return xp.take_along_axis(by_shift, shifts, axis=-1)
    return chosen(xp, [x[..., None] for x in (xp.zeros_like(few[0]), *few)], shifts)
