"""Estimators that evaluate several different values of a site: sums, and sampling without replacement."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

from pplgrad.engine.branches import Alternatives, BranchTerms, Draw
from pplgrad.engine.ops import Array
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.estimators.base import Declaration, Estimator, SiteInfo
from pplgrad.estimators.fit import require_finite

_LARGEST = 4096


class _Joint:
    """The joint values of a site's elements, numbered; log probabilities have shape (particles, *plates, values)."""

    def __init__(self, estimator: Estimator, draw: Draw, least: int) -> None:
        self.draw = draw
        self.elements, self.categories = draw.log_probs.shape[-2:]
        self.count = self.categories**self.elements
        if not least <= self.count <= _LARGEST:
            raise EstimatorError(
                f"{estimator!r} at site '{draw.name}' needs between {least} and {_LARGEST} joint values of the elements that "
                f"share their cost; there are {self.categories} to the power of {self.elements}. Use DisARM(), "
                "LocalExpectation() or ScoreFunction() there."
            )

    def log_probs(self) -> Array:
        """Return the log probability of every joint value, with its gradient."""
        xp, draw = self.draw.ops.xp, self.draw
        digits = self.digits(draw.ops.arange(self.count, draw.index))
        parts = [xp.take(draw.log_probs[..., d, :], digits[..., d], axis=-1) for d in range(self.elements)]
        return sum(parts[1:], parts[0])

    def digits(self, numbers: Array) -> Array:
        """Return the category numbers (..., elements) of joint values (...)."""
        powers = [self.categories ** (self.elements - 1 - d) for d in range(self.elements)]
        return self.draw.ops.xp.stack([numbers // power % self.categories for power in powers], axis=-1)

    def drawn(self) -> Array:
        """Return the number of the joint value drawn, (particles, *plates)."""
        number = self.draw.index[..., 0]
        for d in range(1, self.elements):
            number = number * self.categories + self.draw.index[..., d]
        return number

    def at(self, log_probs: Array, numbers: Array) -> Array:
        """Return the log probabilities of joint values (particles, k, *plates)."""
        xp = self.draw.ops.xp
        wanted = (log_probs.shape[0], numbers.shape[1], *log_probs.shape[1:])
        every = xp.broadcast_to(log_probs[:, None], wanted)
        return xp.take_along_axis(every, numbers[..., None], axis=-1)[..., 0]

    def outside(self, log_probs: Array, numbers: list[Array]) -> Array:
        """Return a draw among the joint values that are not in `numbers`, each (particles, *plates)."""
        xp, ops = self.draw.ops.xp, self.draw.ops
        every = ops.arange(self.count, self.draw.index)
        taken = sum((xp.astype(every == n[..., None], log_probs.dtype) for n in numbers), start=0 * log_probs)
        left = xp.where(taken > 0, -xp.inf + 0 * log_probs, log_probs)
        left = left - xp.max(left, axis=-1, keepdims=True)
        return self.draw.noise.categorical(left - xp.log(xp.sum(xp.exp(left), axis=-1, keepdims=True)))


@dataclass(frozen=True)
class UnorderedSet(Estimator):
    r"""Several different values, drawn without replacement, with the weights that make their order irrelevant.

    Estimates ∇θ E_q[f(z)] = E[Σ_{s∈S} q(s) R(S, s) (f(s) − B(S, s)) ∇θ log q(s)]: S has the draw and k − 1 more joint values
    drawn without replacement, R(S, s) = P(S \ s without s)/P(S) is the leave-one-out ratio, and the built-in baseline
    B(S, s) = q(s) f(s) + Σ_{s'≠s} q(s') R^{∖s}(S, s') f(s') is the same estimate of E_q[f] made without s.

    Shapes: joint values are those of all elements that share their cost (event entries, batch dimensions without a
    plate), at most 4,096; k − 1 evaluations, all plates at once. Costs in nats.

    Raises `ConfigurationError` unless 2 ≤ k ≤ 8, `EstimatorError` on a site without finitely many values, with more than
    4,096 joint values or fewer than k.

    >>> UnorderedSet(3).k
    3

    Source: Kool, van Hoof and Welling (2020), equations 14 and 17.
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
        """Refuse a site without finitely many values."""
        require_finite(self, site)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Draw k − 1 more joint values, none twice."""
        joint = _Joint(self, draw, self.k)
        log_probs = joint.log_probs()
        fixed, numbers = draw.ops.stop_gradient(log_probs), [joint.drawn()]
        for _ in range(self.k - 1):
            numbers.append(joint.outside(fixed, numbers))
        stacked = draw.ops.xp.stack(numbers, axis=1)
        return Alternatives(draw.embed(joint.digits(stacked[:, 1:])), joint.at(log_probs, stacked))

    def surrogate_of(self, terms: BranchTerms) -> Array:
        """Return Σ_s q(s) R(S, s) (f(s) − B(S, s)) log q(s)."""
        ops, xp = terms.ops, terms.ops.xp
        log_q = terms.alternatives.kept
        costs = xp.concat([terms.downstream[:, None], terms.costs], axis=1)
        probs = xp.exp(ops.stop_gradient(log_q))
        rest = _rest_probabilities(xp, probs)
        total = 0
        for s in range(self.k):
            one = frozenset([s])
            others = [t for t in range(self.k) if t != s]
            baseline = probs[:, s] * costs[:, s] + sum(
                probs[:, t] * rest[one | {t}] / rest[one] * costs[:, t] for t in others
            )
            weight = probs[:, s] * rest[one] / rest[frozenset()] * (costs[:, s] - baseline)
            total = total + xp.sum(log_q[:, s] * weight)
        return total


def _rest_probabilities(xp: Any, probs: Array) -> dict[frozenset[int], Array]:
    """Return, for each part of a set, the probability that what is drawn after it is the rest of the set.

    `probs` holds the values' probabilities, (particles, k, *plates).
    """
    k, tiny = probs.shape[1], xp.finfo(probs.dtype).tiny
    found = {frozenset(range(k)): xp.ones_like(probs[:, 0])}
    for size in range(k - 1, -1, -1):
        for part in map(frozenset, combinations(range(k), size)):
            left = xp.clip(1 - sum((probs[:, s] for s in part), start=0 * probs[:, 0]), min=tiny)
            steps = [probs[:, t] / left * found[part | {t}] for t in range(k) if t not in part]
            found[part] = sum(steps[1:], steps[0])
    return found


@dataclass(frozen=True)
class SumAndSample(Estimator):
    r"""The k − 1 most probable values summed, and one value drawn from the rest.

    Estimates ∇θ E_q[f(z)] = Σ_{s∈C} (f(s) − b) ∇θ q(s) + (1 − q(C)) E_{s∉C}[(f(s) − b) ∇θ log q(s)], where C are the k − 1 most
    probable joint values and the baseline b is the mean cost over C. The program's own draw is the one from the rest where it
    lies outside of C.

    Shapes: joint values are those of all elements that share their cost (event entries, batch dimensions without a
    plate), at most 4,096; k evaluations, all plates at once. Costs in nats.

    Raises `ConfigurationError` if k is below 2, `EstimatorError` on a site without finitely many values, with more than
    4,096 joint values or fewer than k.

    >>> SumAndSample(3).k
    3

    Source: Liu, Regier, Tripuraneni, Jordan and McAuliffe (2019), equation 6.
    """

    k: int = 2
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="finitely many values, at most 4,096 jointly",
        evaluations="k",
        differentiable_costs=False,
        derivatives=1,
        source="Liu et al. 2019",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 2:
            raise ConfigurationError(f"SumAndSample(k={self.k!r}): k is the number of values, 2 or more.")

    def check(self, site: SiteInfo) -> None:
        """Refuse a site without finitely many values."""
        require_finite(self, site)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the most probable joint values, and one from the rest."""
        xp, joint = draw.ops.xp, _Joint(self, draw, self.k)
        log_probs = joint.log_probs()
        fixed, drawn = draw.ops.stop_gradient(log_probs), joint.drawn()
        order = xp.argsort(fixed, axis=-1, descending=True)
        summed = [order[..., i] for i in range(self.k - 1)]
        inside = sum((xp.astype(n == drawn, fixed.dtype) for n in summed), start=0 * fixed[..., 0])
        numbers = xp.stack([*summed, xp.where(inside > 0, joint.outside(fixed, summed), drawn)], axis=1)
        return Alternatives(draw.embed(joint.digits(numbers)), joint.at(log_probs, numbers))

    def surrogate_of(self, terms: BranchTerms) -> Array:
        """Return Σ_C q(s) (f(s) − b) log q(s) + (1 − q(C)) (f(s) − b) log q(s) of the one drawn."""
        ops, xp = terms.ops, terms.ops.xp
        log_q, costs = terms.alternatives.kept, terms.costs
        probs = xp.exp(ops.stop_gradient(log_q[:, :-1]))
        mass = xp.sum(probs, axis=1, keepdims=True)
        baseline = xp.sum(probs * costs[:, :-1], axis=1, keepdims=True) / mass
        weights = xp.concat([probs, xp.clip(1 - mass, min=0)], axis=1)
        return xp.sum(log_q * weights * (costs - baseline))
