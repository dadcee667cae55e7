"""Estimators of objectives that combine the importance weights of several particles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from pplgrad.core.array_ops import Array
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import Alternatives, BranchTerms, Declaration, Estimator, GroupTerms
from pplgrad.core.objectives import log_sum_exp
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.site_requirements import require_unscanned


def _require_weights(estimator: Estimator, site: SiteInfo, least: int) -> None:
    """Refuse an objective that combines fewer than so many particles."""
    if not site.combined:
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}' under {site.objective!r}, which combines no particles: pass "
            f"objective=IWAE() to the ELBO, or {remedy(site)}"
        )
    if site.combined < least:
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}': {site.objective!r} combines {site.combined} particle there, and "
            f"at least {least} are needed; pass num_particles={least} or more, or {remedy(site)}"
        )


@dataclass(frozen=True)
class VIMCO(Estimator):
    r"""The score function against the bound in which the particle's own weight is replaced by the mean of the others.

    Estimates ∇θ E[L̂] = E[Σ_k (L̂ − L̂_k) ∇θ log q(z_k)], where L̂ is the bound of the site's element and L̂_k the same with log w_k
    replaced by the mean of the other log weights (`mean="geometric"`), or w_k by the mean of the others (`"arithmetic"`). What
    flows through the weights themselves is in the surrogate already.

    Shapes: any distribution with a log density, in any plates; no evaluations. The bound is in nats.

    Right under the score function's conditions: a support that does not move with the parameters, and bounds of finite variance; where
    all other weights are 0 there is no baseline.

    Raises `EstimatorError` unless the objective combines at least two particles, `ConfigurationError` for another mean.

    >>> VIMCO(mean="arithmetic").declaration.unbiased
    True

    Source: Mnih and Rezende (2016), equations 10 and 11.
    """

    mean: str = "geometric"

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="every distribution with a log density, under IWAE and Renyi",
        evaluations=0,
        differentiable_costs=False,
        derivatives=1,
        source="Mnih and Rezende 2016",
    )
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mean not in ("geometric", "arithmetic"):
            raise ConfigurationError(f'VIMCO(mean={self.mean!r}): the mean is "geometric" or "arithmetic".')

    def check(self, site: SiteInfo) -> None:
        """Refuse an objective that combines fewer than two particles."""
        _require_weights(self, site, 2)

    def surrogate(self, terms: GroupTerms) -> tuple[Array, Array | None]:
        """Return Σ log q · (L̂ − L̂_k)."""
        xp, weights = terms.ops.xp, terms.weights
        assert weights is not None
        count = weights.samples
        if self.mean == "geometric":
            own = xp.sum(weights.replaced(xp.zeros_like(weights.logs)), axis=2) / (count - 1)
        else:
            others = weights.replaced(xp.full_like(weights.logs, -math.inf))
            own = log_sum_exp(xp, others, 2) - math.log(count - 1)
        return _against(terms, weights.bound_with(own)), None


def _against(terms: GroupTerms, baseline: Array) -> Array:
    """Return Σ log q · (L̂ − baseline); no baseline where all other weights are zero."""
    xp, weights = terms.ops.xp, terms.weights
    assert weights is not None
    finite = xp.where(xp.isfinite(baseline), baseline, xp.zeros_like(baseline))
    return xp.sum(terms.log_prob * (terms.downstream - weights.at_sites(finite)))


@dataclass(frozen=True)
class OVIS(Estimator):
    r"""The score function with the control variate that is optimal for many particles.

    Estimates ∇θ E[L̂] = E[Σ_k (L̂ − w̃_k − c_k) ∇θ log q(z_k)] for the site's own parameters, where L̂ is the bound of the site's element
    and w̃_k the particle's normalised weight. With `samples=S` c_k is the mean of L̂ − w̃_k over S further draws of the
    site, the other particles as they are. With `samples=0` it is the limit log 1/K Σ_{l≠k} w_l for a small effective sample size at
    `gamma=0`, and for a large one log 1/(K − 1) Σ_{l≠k} w_l − w̃_k at `gamma=1`; in between it is interpolated. Only
    `gamma=0` is unbiased, since w̃_k depends on the draw.

    Shapes: any distribution with a log density, in any plates; S evaluations. The bound is in nats.

    Right under the score function's conditions: a support that does not move with the parameters, and bounds of finite variance; where
    all other weights are 0 there is no baseline.

    Raises `EstimatorError` unless the objective combines at least two particles, and for `samples` inside a scan;
    `ConfigurationError` if `samples` is negative or `gamma` outside [0, 1].

    >>> OVIS().declaration.unbiased, OVIS(gamma=1.0).declaration.unbiased
    (True, False)

    Source: Liévin, Dittadi, Christensen and Winther (2020), equations 12 and 17.
    """

    samples: int = 0
    gamma: float = 0.0

    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 0:
            raise ConfigurationError(f"OVIS(samples={self.samples!r}): give the number of further draws, 0 or more.")
        if not 0 <= self.gamma <= 1 or (self.samples and self.gamma):
            raise ConfigurationError(
                f"OVIS(samples={self.samples}, gamma={self.gamma}): gamma lies in [0, 1], and counts without samples alone."
            )

    @property
    def declaration(self) -> Declaration:  # type: ignore[override]
        """What the estimator promises: unbiased at gamma = 0."""
        declared = Declaration(
            unbiased=True,
            supports="every distribution with a log density, under IWAE and Renyi",
            evaluations="samples",
            differentiable_costs=False,
            derivatives=1,
            source="Liévin et al. 2020",
        )
        return replace(declared, unbiased=self.gamma == 0)

    @property
    def uses_branches(self) -> bool:  # type: ignore[override]
        """Return True with further draws of the site."""
        return self.samples > 0

    @property
    def num_resamples(self) -> int:
        """Return the number of further draws."""
        return self.samples

    def check(self, site: SiteInfo) -> None:
        """Refuse an objective that combines fewer than two particles."""
        _require_weights(self, site, 2)
        if self.samples:
            require_unscanned(self, site)

    def surrogate(self, terms: GroupTerms) -> tuple[Array, Array | None]:
        """Return Σ log q · (L̂ − c_k), to which the weights add −w̃_k."""
        weights = terms.weights
        assert weights is not None
        least = weights.scale * math.log(1 - 1 / weights.samples) / weights.objective.power
        return _against(terms, weights.bound_without - self.gamma * weights.shares + (1 - self.gamma) * least), None

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the further draws."""
        return Alternatives(draw.again(self.samples)[0])

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ log q · (L̂ − mean of L̂ − w̃ over the further draws)."""
        xp = terms.ops.xp
        assert terms.shares is not None
        control = xp.mean(terms.costs - terms.shares(), axis=1)
        return xp.sum(terms.draw.score * (terms.downstream - control))


@dataclass(frozen=True)
class DReG(Estimator):
    r"""The doubly reparameterized gradient: the score in the importance weights is reparameterized as well.

    Estimates ∇φ E[L̂] with −Σ_k w̃_k ∂φ log q(z_k; φ), what the weights carry to the parameters of the draw's own distribution,
    replaced by −Σ_k (∂w̃_k/∂z_k) ∂φ z_k of the same mean: in all Σ_k w̃_k² ∂z log w_k ∂φ z_k for a single site under
    IWAE, whose signal-to-noise ratio does not fall with K.

    Shapes: any plates; one evaluation with its derivative for each particle. The bound is in nats.

    Right under the conditions of `Reparam`, and where E[∇ log q] = 0: the support of q does not move with its parameters.

    Raises `EstimatorError` on a site whose distribution has no reparameterized sampler, under an objective that
    combines no particles, and inside a scan.

    >>> DReG().declaration.differentiable_costs
    True

    Source: Tucker, Lawson, Gu and Maddison (2019), equation 8.
    """

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="continuous, with a reparameterized sampler, under IWAE and Renyi",
        evaluations=1,
        differentiable_costs=True,
        derivatives=1,
        source="Tucker et al. 2019",
    )
    uses_score: ClassVar[bool] = False
    reweights_path: ClassVar[bool] = True

    @property
    def sticking_the_landing(self) -> bool:
        """Return True: the score part of the guide's log density is left out, and comes back reparameterized."""
        return True

    def check(self, site: SiteInfo) -> None:
        """Refuse a site whose sampler is not reparameterized, and a sum of costs."""
        if not site.has_rsample:
            raise EstimatorError(
                f"DReG() cannot be used at site '{site.name}': {site.distribution} has no reparameterized sampler; {remedy(site)}"
            )
        require_unscanned(self, site)
        _require_weights(self, site, 1)
