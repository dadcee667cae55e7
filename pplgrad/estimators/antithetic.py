"""Antithetic estimators of binary sites: the draw and a partner that is as far from it as their law allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, Ops, sum_over_draws
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration
from pplgrad.core.noise import Noise
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.every_draw import WithDrawsAlike
from pplgrad.estimators.site_requirements import require_binary


@dataclass(frozen=True)
class ARM(WithDrawsAlike):
    r"""The augment-REINFORCE-merge (ARM) estimator: the draw and its antithetic partner, weighted by their shared uniform.

    Estimates ∇α E_q[f(b)] = E_u[(f(1[u > σ(−α)]) − f(1[u < σ(α)])) (u − ½)] for each element. α are the logits and u is
    uniform on (0, 1). The gradient continues through α to the parents of the site. The uniform is sampled conditionally on
    the program's own draw.

    Args:
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any plates and any event shape. All elements change at once, in one evaluation of the program. Costs are in nats.

    Assumptions:
        The cost is finite at both values. An element whose log odds are infinite, or whose probability is 0 or 1, keeps its
        drawn value and contributes zero to the estimate.

    Raises:
        EstimatorError: on a site that is not binary, or that is drawn inside a `scan` in the body of another one.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.
        ConfigurationError: if `differentiate` is neither "own" nor "all".

    Example:
        >>> ARM().declaration.evaluations
        1

    References:
        Yin and Zhou (2019), theorem 1.
    """

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="binary",
        evaluations=1,
        differentiable_costs=False,
        derivatives=1,
        source="Yin and Zhou 2019",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is not binary."""
        require_binary(self, site)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the partner: 1 where the uniform lies above σ(−α)."""
        xp, probs = draw.ops.xp, probability(draw.ops, draw.logits)
        uniform = draw.uniform(probs)
        if uniform is None:
            below = draw.noise.uniform(tuple(probs.shape), probs)
            uniform = xp.where(draw.index == 1, below * probs, probs + below * (1 - probs))
        partner = xp.astype(uniform > 1 - probs, draw.index.dtype)
        return Alternatives(draw.embed(partner[:, None]), uniform)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_d α_d (f(b̃) − f(b)) (u_d − ½)."""
        draw, xp = terms.draw, terms.ops.xp
        difference = (terms.costs[:, 0] - terms.downstream)[..., None]
        return xp.sum(draw.logits * (difference * (terms.alternatives.kept - 0.5)))


@dataclass(frozen=True)
class DisARM(WithDrawsAlike):
    r"""The DisARM estimator (also known as U2G): ARM with the uniform integrated out, given the draw and its antithetic partner.

    Estimates ∇α E_q[f(b)] = E[½ (f(b) − f(b̃)) (b − b̃) σ(|α|)] for each element. α are the logits and b̃ is the antithetic
    partner of the draw b. An element at which b and b̃ agree contributes zero. The gradient continues through α to the parents
    of the site.

    Args:
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any plates and any event shape. All elements change at once, in one evaluation of the program. Costs are in nats.

    Assumptions:
        The cost is finite at both values. An element whose log odds are infinite, or whose probability is 0 or 1, keeps its
        drawn value and contributes zero to the estimate.

    Raises:
        EstimatorError: on a site that is not binary, or that is drawn inside a `scan` in the body of another one.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.
        ConfigurationError: if `differentiate` is neither "own" nor "all".

    Example:
        >>> DisARM().declaration.evaluations
        1

    References:
        Dong, Mnih and Tucker (2020), equation 4.
        Yin, Ho, Yan, Qian and Zhou (2020).
    """

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="binary",
        evaluations=1,
        differentiable_costs=False,
        derivatives=1,
        source="Dong, Mnih and Tucker 2020",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is not binary."""
        require_binary(self, site)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the antithetic partner, drawn given the draw."""
        xp, probs = draw.ops.xp, probability(draw.ops, draw.logits)
        uniform = draw.uniform(probs)
        if uniform is None:
            partner = partner_of(draw.noise, xp, probs, draw.index == 1)
        else:
            partner = xp.astype(uniform > 1 - probs, probs.dtype)
        return Alternatives(draw.embed(xp.astype(partner, draw.index.dtype)[:, None]), partner)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_d α_d ½ (f(b) − f(b̃)) (b_d − b̃_d) σ(|α_d|)."""
        draw, xp = terms.draw, terms.ops.xp
        apart = xp.astype(draw.index, draw.logits.dtype) - terms.alternatives.kept
        return coupled(terms.ops, draw.logits, apart, (terms.downstream - terms.costs[:, 0])[..., None])


@dataclass(frozen=True)
class ARMS(WithDrawsAlike):
    r"""The ARMS estimator: leave-one-out over n mutually antithetic draws, corrected for their correlation.

    Estimates ∇α E_q[f(b)] = E[1/(n − 1) Σ_i (f(b_i) − f̄) (b_i − p) / (1 − ρ)] for each element. The draws b_i come from a
    Dirichlet copula, f̄ is the mean of the n costs, p = σ(α), and ρ is the correlation of two of the draws at that element. With
    n = 2 the estimator is DisARM.

    Args:
        n: the number of draws, including the program's own; an integer of at least 2. Default: 4.
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any plates and any event shape. All elements change at once, in n − 1 evaluations of the program. Costs are in nats.

    Assumptions:
        The cost is finite at both values. An element whose log odds are infinite, or whose probability is 0 or 1, keeps its
        drawn value and contributes zero to the estimate.

    Raises:
        EstimatorError: on a site that is not binary, or that is drawn inside a `scan` in the body of another one.
        ConfigurationError: if n is below 2.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.

    Example:
        >>> ARMS(4).n
        4

    References:
        Dimitriev and Zhou (2021), "ARMS: antithetic-REINFORCE-multi-sample gradient for binary variables", section 3.
    """

    n: int = 4

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="binary",
        evaluations="n − 1",
        differentiable_costs=False,
        derivatives=1,
        source="Dimitriev and Zhou 2021",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n, int) or self.n < 2:
            raise ConfigurationError(f"ARMS(n={self.n!r}): n is the number of draws, an integer of at least 2.")

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is not binary."""
        require_binary(self, site)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the other n − 1 draws of the copula, given the program's own draw as the first."""
        xp, probs = draw.ops.xp, probability(draw.ops, draw.logits)
        # The copula makes the rarer value antithetic: two of its hits exclude each other as far as they can.
        rare = xp.where(probs <= 0.5, probs, 1 - probs)
        hit = xp.astype(xp.where(probs <= 0.5, draw.index, 1 - draw.index), probs.dtype)
        below = draw.noise.uniform(tuple(probs.shape), probs)
        uniform = xp.where(hit == 1, below * rare, rare + below * (1 - rare))
        first = 1 - uniform ** (1 / (self.n - 1))
        shares = -xp.log(draw.noise.uniform((probs.shape[0], self.n - 1, *probs.shape[1:]), probs))
        rest = (1 - first)[:, None] * shares / sum_over_draws(xp, shares)[:, None]
        hits = xp.astype((1 - rest) ** (self.n - 1) < rare[:, None], draw.index.dtype)
        return Alternatives(draw.embed(xp.where(probs[:, None] <= 0.5, hits, 1 - hits)), hits)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_d α_d/(n − 1) Σ_i (f(b_i) − f̄) (b_id − p_d) / (1 − ρ_d)."""
        draw, xp = terms.draw, terms.ops.xp
        probs = probability(draw.ops, draw.logits)
        hits = terms.alternatives.kept
        others = xp.where(probs[:, None] <= 0.5, hits, 1 - hits)
        values = xp.astype(xp.concat([draw.index[:, None], others], axis=1), probs.dtype)
        costs = xp.concat([terms.downstream[:, None], terms.costs], axis=1)
        centred = (costs - xp.mean(costs, axis=1, keepdims=True))[..., None]
        weight = sum_over_draws(xp, centred * (values - probs[:, None])) / (
            (self.n - 1) * (1 - self._correlation(xp, probs))
        )
        return xp.sum(draw.logits * weight)

    def _correlation(self, xp, probs: Array) -> Array:  # type: ignore[no-untyped-def]
        """Return the correlation of two draws: P(both hit) = max(0, 2 r^(1/(n−1)) − 1)^(n−1) at the rarer value's r."""
        rare = xp.where(probs <= 0.5, probs, 1 - probs)
        both = xp.clip(2 * rare ** (1 / (self.n - 1)) - 1, min=0) ** (self.n - 1)
        return (both - rare**2) / (rare * (1 - rare))


def partner_of(noise: Noise, xp: Any, probs: Array, drawn: Array) -> Array:
    """Return the antithetic partner of binary draws, given which of them are 1: 1 or 0 in the dtype of `probs`."""
    # Given 1 the uniform lies in (0, p), and the partner is 1 too where it is above 1 - p: with max(0, 2 p - 1) / p; alike given 0.
    own = xp.where(drawn, probs, 1 - probs)
    agrees = 2 - 1 / xp.clip(own, min=0.5)
    return noise.bernoulli(xp.where(drawn, agrees, 1 - agrees))


def coupled(ops: Ops, odds: Array, apart: Array, difference: Array) -> Array:
    """Return Σ α ½ (f − f̃) (b − b̃) σ(|α|) for log odds α, `apart` = b − b̃ and `difference` = f − f̃."""
    xp = ops.xp
    probs = probability(ops, odds)
    return xp.sum(odds * (apart * xp.maximum(probs, 1 - probs) * (0.5 * difference)))


def probability(ops: Ops, odds: Array) -> Array:
    """Return the probability of 1 at log odds, as a constant, strictly inside (0, 1)."""
    probs = ops.sigmoid(ops.stop_gradient(odds))
    tiny = ops.xp.finfo(probs.dtype).eps
    return ops.xp.clip(probs, min=tiny, max=1 - tiny)
