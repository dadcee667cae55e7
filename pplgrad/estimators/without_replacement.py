"""Estimators that evaluate several different values of a site: sums, and sampling without replacement."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import ClassVar

import numpy as np

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, Ops, bounded, is_possible
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.estimators.count_heads import Head
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.site_requirements import require_finite, require_steps

_LARGEST = 4096
_AMONG = 64


class _Joint:
    """The joint values of a site's elements, numbered; log probabilities have shape (particles, *plates, values)."""

    def __init__(self, estimator: Estimator, draw: Draw, least: int) -> None:
        self.draw = draw
        self.elements, self.categories = draw.log_probs.shape[-2:]
        self.count = self.categories**self.elements
        _require_joint(estimator, draw.site, least)

    def log_probs(self) -> Array:
        """Return the log probability of every joint value, with its gradient; bounded where it is impossible."""
        xp, log_probs = self.draw.ops.xp, self.draw.log_probs
        if self.elements == 1:
            return log_probs[..., 0, :]
        numbers = self.draw.ops.arange(self.count, self.draw.index)
        digits = xp.permute_dims(self.digits(numbers), (1, 0))
        digits = xp.broadcast_to(digits, (*log_probs.shape[:-2], *digits.shape))
        return bounded(xp, xp.sum(xp.take_along_axis(log_probs, digits, axis=-1), axis=-2))

    def digits(self, numbers: Array) -> Array:
        """Return the category numbers (..., elements) of joint values (...)."""
        return numbers[..., None] // self._powers % self.categories

    @property
    def _powers(self) -> Array:
        powers = self.categories ** np.arange(self.elements)[::-1]
        return self.draw.ops.constant(powers, self.draw.index)

    def drawn(self) -> Array:
        """Return the number of the joint value drawn, (particles, *plates)."""
        return self.draw.ops.xp.sum(self.draw.index * self._powers, axis=-1, dtype=self.draw.index.dtype)

    def at(self, log_probs: Array, numbers: Array) -> Array:
        """Return the log probabilities of joint values (particles, k, *plates)."""
        xp = self.draw.ops.xp
        return xp.moveaxis(xp.take_along_axis(log_probs, xp.moveaxis(numbers, 1, -1), axis=-1), -1, 1)

    def outside(self, log_probs: Array, numbers: list[Array]) -> Array:
        """Return a draw among the joint values that are not in `numbers`, each (particles, *plates)."""
        xp, ops = self.draw.ops.xp, self.draw.ops
        every = ops.arange(self.count, self.draw.index)
        taken = sum((xp.astype(every == n[..., None], log_probs.dtype) for n in numbers), start=0 * log_probs)
        # Where all that is left is impossible one of that is taken, with a weight of 0, and never one that is there already.
        left = xp.where(taken > 0, xp.full_like(log_probs, -xp.inf), log_probs)
        left = left - xp.max(left, axis=-1, keepdims=True)
        return self.draw.noise.categorical(left - xp.log(xp.sum(xp.exp(left), axis=-1, keepdims=True)))


def _require_joint(estimator: Estimator, site: SiteInfo, least: int) -> None:
    """Refuse a site whose elements have too few joint values to choose from, or too many to list."""
    require_finite(estimator, site)
    assert site.categories is not None
    if least <= site.categories**site.elements <= _LARGEST:
        return
    raise EstimatorError(
        f"{estimator!r} at site '{site.name}' needs between {least} and {_LARGEST} joint values of the elements that share their "
        f"cost, and there are {site.categories} to the power of {site.elements}; {remedy(site)}"
    )


def _require_one(estimator: Estimator, site: SiteInfo, elements: int) -> None:
    """Refuse several counts that share their cost, whose most probable joint values cannot be listed."""
    if elements > 1:
        raise EstimatorError(
            f"{estimator!r} at site '{site.name}' needs a single count, and there are {elements} that share their cost; use "
            "CountDifference() or LocalExpectation(), which change one at a time."
        )


@dataclass(frozen=True)
class UnorderedSet(Estimator):
    r"""The unordered set estimator: k different values drawn without replacement, with weights that do not depend on their order.

    Estimates ∇θ E_q[f(z)] = E[Σ_{s∈S} q(s) R(S, s) (f(s) − B(S, s)) ∇θ log q(s)]. The set S contains the draw and k − 1 more joint
    values drawn without replacement. R(S, s) = P(S \ s without s)/P(S) is the leave-one-out ratio. The built-in baseline
    B(S, s) = q(s) f(s) + Σ_{s'≠s} q(s') R^{∖s}(S, s') f(s') is the same estimate of E_q[f], computed without s.

    Args:
        k: the number of different values, including the program's own draw; from 2 to 8. Default: 2.

    Shapes:
        Joint values are those of all elements that share their cost (event entries, batch dimensions without a plate), at most 4,096.
        k − 1 evaluations of the program, for all plates at once. Costs are in nats.

    Assumptions:
        The cost is finite at every value. Values of probability 0 contribute zero. Where fewer than k values are possible, the set
        contains all of them and the sum is exact.

    Raises:
        ConfigurationError: unless 2 ≤ k ≤ 8.
        EstimatorError: on a site without finitely many values, with more than 4,096 joint values or with fewer than k; on a site that
            is drawn inside a `scan` in the body of another one.

    Example:
        >>> UnorderedSet(3).k
        3

    References:
        Kool, van Hoof and Welling (2020), equations 14 and 17.
    """

    k: int = 2
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="finitely many values, at most 4,096 jointly",
        evaluations="k − 1",
        differentiable_costs=False,
        derivatives=1,
        source="Kool et al. 2020",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or not 2 <= self.k <= 8:
            raise ConfigurationError(f"UnorderedSet(k={self.k!r}): k is the number of values, from 2 to 8.")

    def check(self, site: SiteInfo) -> None:
        """Refuse a site without finitely many values, or with too many or too few of them."""
        _require_joint(self, site, self.k)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Draw k − 1 more joint values, none twice."""
        joint = _Joint(self, draw, self.k)
        log_probs = joint.log_probs()
        fixed, numbers = draw.ops.stop_gradient(log_probs), [joint.drawn()]
        for _ in range(self.k - 1):
            numbers.append(joint.outside(fixed, numbers))
        stacked = draw.ops.xp.stack(numbers, axis=1)
        return Alternatives(draw.embed(joint.digits(stacked[:, 1:])), joint.at(log_probs, stacked))

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_s q(s) R(S, s) (f(s) − B(S, s)) log q(s)."""
        ops, xp = terms.ops, terms.ops.xp
        log_q = terms.alternatives.kept
        costs = xp.concat([terms.downstream[:, None], terms.costs], axis=1)
        probs = xp.exp(ops.stop_gradient(log_q))
        whole, without, pairs = _rest_probabilities(ops, probs)
        # (particles, s, t, *plates): what each value counts in the baseline of another, and (s = t) of itself.
        counts = probs[:, None] * pairs / without[:, :, None]
        baseline = xp.sum(counts * costs[:, None], axis=2)
        return xp.sum(log_q * probs * without / whole[:, None] * (costs - baseline))


def _rest_probabilities(ops: Ops, probs: Array) -> tuple[Array, Array, Array]:
    """Return the probability that a set is drawn, that its rest is after each value, and after each two.

    `probs` holds the values' probabilities, (particles, k, *plates); the results have shape (particles, *plates), (particles, k,
    *plates) and (particles, k, k, *plates), where a value and itself count as one that is alone: R(S, s).
    """
    xp, k = ops.xp, probs.shape[1]
    found = xp.ones_like(probs[:, :1])
    pairs = without = found
    for size in range(k - 1, -1, -1):
        parts, steps = _parts(k, size)
        included = ops.contract(ops.constant(parts, probs), xp.moveaxis(probs, 1, 0))
        left = xp.clip(1 - xp.moveaxis(included, 0, 1), min=xp.finfo(probs.dtype).tiny)
        # (particles, parts, values that come next, *plates): how often each comes next, and what follows then.
        values, wholes = (ops.constant(x, ops.arange(1, probs)) for x in steps)
        nexts = xp.take(probs, xp.reshape(values, (-1,)), axis=1)
        after = nexts * xp.take(found, xp.reshape(wholes, (-1,)), axis=1)
        after = xp.reshape(after, (after.shape[0], *values.shape, *after.shape[2:]))
        total = xp.sum(after, axis=2) / left
        # Where no value of the rest is possible nothing else can come, and the set is what it is.
        some = xp.sum(xp.reshape(nexts, after.shape), axis=2) > 0
        found = xp.where(some, total, xp.ones_like(total))
        if size == 2:
            pairs = found
        if size == 1:
            without = found
    if k == 2:
        pairs = xp.ones_like(probs[:, :1])
    return found[:, 0], without, _by_two(ops, pairs, without)


def _by_two(ops: Ops, pairs: Array, without: Array) -> Array:
    """Return what is known of two values, in the order of `combinations`, as a symmetric table with the ones on its diagonal."""
    xp, k = ops.xp, without.shape[1]
    numbers = {pair: i for i, pair in enumerate(combinations(range(k), 2))}
    table = [len(numbers) + s if s == t else numbers[min(s, t), max(s, t)] for s in range(k) for t in range(k)]
    every = xp.concat([pairs, without], axis=1)
    placed = xp.take(every, ops.constant(np.array(table), ops.arange(1, pairs)), axis=1)
    return xp.reshape(placed, (placed.shape[0], k, k, *placed.shape[2:]))


@lru_cache
def _parts(k: int, size: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return the parts of a set of k values that have so many, a row of 0 and 1 each, and what can come next.

    That is, for each part, the values it does not have and the number of the part (one value larger) that each leads to.
    """
    parts = list(combinations(range(k), size))
    larger = {part: i for i, part in enumerate(combinations(range(k), size + 1))}
    included = np.array([[float(s in part) for s in range(k)] for part in parts]).reshape(len(parts), k)
    values = [[t for t in range(k) if t not in part] for part in parts]
    leads = [[larger[tuple(sorted((*part, t)))] for t in others] for part, others in zip(parts, values, strict=True)]
    return included, (np.array(values), np.array(leads))


@dataclass(frozen=True)
class SumAndSample(Estimator):
    r"""The sum-and-sample (Rao-Blackwellized) estimator: the k − 1 most probable values summed, and one value drawn from the rest.

    Estimates ∇θ E_q[f(z)] = Σ_{s∈C} (f(s) − b) ∇θ q(s) + (1 − q(C)) E_{s∉C}[(f(s) − b) ∇θ log q(s)]. C are the k − 1 most probable
    joint values, and the baseline b is the mean cost over C. The program's own draw is the value from the rest if it lies outside C.

    At a single count without a known end (Poisson, negative binomial, zero-inflated and others) C are the k − 1 most probable of the
    max(64, 2k) counts around the mean, and nothing is drawn from the rest: the second term is 1{z ∉ C} (f(z) − b) ∇log q(z), at the
    program's own draw.

    Args:
        k: the number of values that are evaluated, at least 2. Default: 2.

    Shapes:
        Joint values are those of all elements that share their cost (event entries, batch dimensions without a plate), at most 4,096.
        k evaluations of the program (k − 1 at a count), for all plates at once. Costs are in nats.

    Assumptions:
        The cost is finite at every value. Values of probability 0 contribute zero. Where fewer than k values are possible, the sum is
        exact.

    Raises:
        ConfigurationError: if k is below 2.
        EstimatorError: on a site without finitely many values that is no single count, with more than 4,096 joint values or with fewer
            than k; on several counts that share their cost; on a site that is drawn inside a `scan` in the body of another one.

    Example:
        >>> SumAndSample(3).k
        3

    References:
        Liu, Regier, Tripuraneni, Jordan and McAuliffe (2019), equation 6.
    """

    k: int = 2
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="finitely many values, at most 4,096 jointly; a single count",
        evaluations="k, or k − 1 at a count",
        differentiable_costs=False,
        derivatives=1,
        source="Liu et al. 2019",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 2:
            raise ConfigurationError(f"SumAndSample(k={self.k!r}): k is the number of values, 2 or more.")

    @property
    def num_counts(self) -> int:
        """Return the number of counts among which the most probable are looked for."""
        return max(_AMONG, 2 * self.k)

    def check(self, site: SiteInfo) -> None:
        """Refuse a site with too many or too few values, and infinitely many ones that are not those of a single count."""
        if site.categories is not None or not site.is_count:
            _require_joint(self, site, self.k)
            return
        require_steps(self, site)
        _require_one(self, site, site.elements)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the most probable joint values, and one from the rest; of a count the most probable values alone."""
        if not draw.is_finite:
            _require_one(self, draw.site, draw.value.shape[-1])
            return Head.most_probable(draw, self.k - 1, self.num_counts).alternatives(draw)
        xp, joint = draw.ops.xp, _Joint(self, draw, self.k)
        log_probs = joint.log_probs()
        fixed, drawn = draw.ops.stop_gradient(log_probs), joint.drawn()
        order = xp.argsort(fixed, axis=-1, descending=True)
        summed = [order[..., i] for i in range(self.k - 1)]
        inside = sum((xp.astype(n == drawn, fixed.dtype) for n in summed), start=0 * fixed[..., 0])
        numbers = xp.stack([*summed, xp.where(inside > 0, joint.outside(fixed, summed), drawn)], axis=1)
        return Alternatives(draw.embed(joint.digits(numbers)), joint.at(log_probs, numbers))

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_C q(s) (f(s) − b) log q(s) + (1 − q(C)) (f(s) − b) log q(s) of the one drawn."""
        if not terms.draw.is_finite:
            return terms.alternatives.kept.surrogate(terms)
        ops, xp = terms.ops, terms.ops.xp
        log_q, costs = terms.alternatives.kept, terms.costs
        probs = xp.exp(ops.stop_gradient(log_q[:, :-1]))
        mass = xp.sum(probs, axis=1, keepdims=True)
        # The one drawn from the rest is impossible where the most probable are all there is: what it weighs is rounding.
        rest = xp.where(is_possible(xp, log_q[:, -1:]), xp.clip(1 - mass, min=0), xp.zeros_like(mass))
        baseline = xp.sum(probs * costs[:, :-1], axis=1, keepdims=True) / mass
        weights = xp.concat([probs, rest], axis=1)
        return xp.sum(log_q * weights * (costs - baseline))
