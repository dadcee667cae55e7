"""The GO gradient of counts: differences of the cost between a count and the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, is_possible
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.site_requirements import require_count

# A count between two modes, so many times less probable than what lies on either side, is no step on the way: the weight of the
# difference there would be as large.
_STEEPEST = 1000


@dataclass(frozen=True)
class CountDifference(Estimator):
    r"""The GO gradient of counts: the cost at the next count minus the cost at the draw, weighted by the distribution function.

    Estimates ∇θ E_q[f(z)] = E_q[Σ_d −∇θ F_d(z_d) / q_d(z_d) · (f(z + e_d) − f(z))] for each element d. F_d is the distribution function,
    and z + e_d is the draw with element d raised by one; f needs no derivative. The weight −∇F/q is known in closed form for:

    - a Poisson rate: 1.
    - r + z successes and failures, NegativeBinomial, GammaPoisson and Geometric: (z + r)/(1 − p) along the probability p of a success.
    - Binomial: (n − z)/(1 − p) along p; at z = n there is no next count, and no term.

    For every other law of counts, and where gradient reaches the concentration of a negative binomial, it is a sum of log densities:
    −∇F(z)/q(z) = −Σ_{k ≤ z} q(k)/q(z) ∇log q(k) below the median m of the listed counts, and Σ_{k > z} q(k)/q(z) ∇log q(k) from there on.
    It runs over a window of consecutive counts around the mean. A draw outside of it has the score-function term
    (f(z) − f(m)) ∇log q(z) instead, which makes up for what the sums leave out, so that the estimate is unbiased for every window. The
    same is done at counts between two modes that are over 1,000 times less probable than what lies on either side, where the weight
    would be as large; the next count is then the next one on the other side.

    Args:
        window: the number of counts that the sum runs over, where there is no closed form; at least 2. Default: 64.

    Shapes:
        Elements are the entries of `to_event`, of batch dimensions that no plate declares, and of plates that a downstream cost does not
        have. Each element needs one evaluation of the program. All elements of the other plates change at once. Without a closed form
        the log densities of `window` counts of each element are computed. Costs are in nats.

    Assumptions:
        The cost is finite at the draw and at the next count, and differences of the cost times the weights have a finite second moment.
        With a closed form the next count may lie outside of the support of the site (1 for a Poisson of rate 0). The cost may be any
        function of the counts.

    Raises:
        ConfigurationError: if `window` is below 2.
        EstimatorError: on a site whose elements are not single counts (continuous, categorical, or several counts with a given total), or
            that is drawn inside a `scan` in the body of another one.

    Example:
        >>> CountDifference().declaration.differentiable_costs
        False

    References:
        Cong, Zhao, Bai and Carin (2019), theorem 1.
    """

    window: int = 64
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="single counts (Poisson, negative binomial, Binomial, zero-inflated and others)",
        evaluations="elements",
        differentiable_costs=False,
        derivatives=1,
        source="Cong et al. 2019",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 2:
            raise ConfigurationError(f"CountDifference(window={self.window!r}): give a number of counts, 2 or more.")

    @property
    def num_counts(self) -> int:
        """Return the number of counts in the window."""
        return self.window

    def check(self, site: SiteInfo) -> None:
        """Refuse a site whose elements are not single counts."""
        require_count(self, site)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return, for each element, the draw with the next count of that element."""
        step = _closed_form(draw) if draw.has_parameters else _by_sums(draw, self.window)
        return Alternatives(draw.changed_one_by_one(step.other[:, None]), step)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_d weight_d · (f(z with the other count of d) − f(z))."""
        xp, step = terms.ops.xp, terms.alternatives.kept
        costs = xp.moveaxis(terms.costs, 1, -1)
        if step.compared is not None:
            costs = xp.where(step.compared, costs, xp.zeros_like(costs))
        return xp.sum(step.weight * (costs - terms.downstream[..., None]))


@dataclass(frozen=True)
class _Step:
    """From each element's draw to another count: arrays of shape (particles, *plates, elements).

    The derivative of `weight` is what multiplies the cost at `other` minus the cost at the draw. Where `compared` is False, the cost at
    `other` counts as 0.
    """

    other: Array
    weight: Array
    compared: Array | None = None


def _closed_form(draw: Draw) -> _Step:
    """Return the step to the next count, with a weight whose derivative is −∇F/q."""
    xp, names, value = draw.ops.xp, draw.parameters, draw.value
    fixed = {name: draw.ops.stop_gradient(x) for name, x in names.items()}
    if "rate" in names:
        return _Step(value + 1, names["rate"])
    if "trials" in names:
        left, other = fixed["trials"] - value, xp.where(value < fixed["trials"], value + 1, value)
    else:
        left, other = fixed["failures"] + value, value + 1
    if "logits" in names:
        return _Step(other, names["logits"] * left / (1 + xp.exp(-fixed["logits"])))
    rest = 1 - fixed["probs"]
    return _Step(other, names["probs"] * left / xp.where(rest > 0, rest, xp.ones_like(rest)))


def _by_sums(draw: Draw, count: int) -> _Step:
    """Return the step along the listed counts, with a weight whose derivative is a sum over those on the shorter side.

    With S the listed counts and m one of them, Σ_{k ∈ S} ∇q(k) (f(k) − f(m)) is a sum of differences between neighbours in S, the
    weights of which are sums over k ≤ z below m and over k > z from m on. What is left, Σ_{k ∉ S} ∇q(k) (f(k) − f(m)), is the score term.
    """
    ops, xp = draw.ops, draw.ops.xp
    first, log_probs, own = draw.counts(count)
    fixed, numbers = ops.stop_gradient(log_probs), ops.arange(count, draw.value)
    listed, pivot = _listed(xp, xp.exp(fixed), numbers)
    place = xp.astype(draw.value - first, numbers.dtype)
    within = (place >= 0) & (place < count)
    near = xp.clip(place, min=0, max=count - 1)
    within = within & _at(xp, listed, near)
    # The listed counts on the side of the draw that its sum runs over, and their probability beside its own.
    before = near < pivot
    side = listed & xp.where(before[..., None], numbers <= near[..., None], numbers > near[..., None])
    difference = fixed - ops.stop_gradient(own)[..., None]
    ratio = xp.exp(xp.where(side, difference, xp.full_like(difference, -xp.inf)))
    summed = xp.sum(ratio * log_probs, axis=-1)
    after = xp.min(xp.where(listed & (numbers > near[..., None]), numbers, count), axis=-1)
    # From the last of them there is no way on: its sum is empty, and the difference counts for nothing.
    end = xp.where(within & (after < count), after, pivot)
    possible = is_possible(xp, _at(xp, fixed, pivot))
    compared = within | possible
    other = xp.where(compared, first + xp.astype(end, draw.value.dtype), draw.value)
    return _Step(other, xp.where(within, xp.where(before, -summed, summed), -own), compared)


def _listed(xp: Any, probs: Array, numbers: Array) -> tuple[Array, Array]:
    """Return which counts of the window the steps lead over, and the place of their median; neither depends on the draw."""
    below = xp.cumulative_sum(probs, axis=-1)
    above = xp.flip(xp.cumulative_sum(xp.flip(probs, axis=-1), axis=-1), axis=-1)
    pivot = xp.sum(xp.astype(below < below[..., -1:] / 2, numbers.dtype), axis=-1, dtype=numbers.dtype)
    smooth = _STEEPEST * probs >= xp.minimum(below, above)
    return (probs > 0) & (smooth | (numbers == pivot[..., None])), pivot


def _at(xp: Any, x: Array, place: Array) -> Array:
    return xp.take_along_axis(x, place[..., None], axis=-1)[..., 0]
