"""Estimators of objectives that combine the importance weights of several particles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator, GroupTerms
from pplgrad.core.objectives import log_sum_exp
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.site_requirements import require_steps, require_unscanned


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
    r"""The VIMCO estimator: the score function with a leave-one-out baseline for bounds over several particles.

    Estimates ∇θ E[L̂] = E[Σ_k (L̂ − L̂_k) ∇θ log q(z_k)]. L̂ is the bound of the site's element. L̂_k is the same bound with the
    weight of particle k replaced: log w_k by the mean of the other log weights (`mean="geometric"`), or w_k by the mean of the
    other weights (`mean="arithmetic"`). The gradient through the weights themselves is already part of the surrogate.

    Args:
        mean: `"geometric"` or `"arithmetic"`, the mean that replaces the particle's own weight. Default: `"geometric"`.

    Shapes:
        Any distribution with a log density, in any plates. No further evaluations of the program. The bound is in nats.

    Assumptions:
        The conditions of the score function hold: the support of q does not depend on the parameters, and the bounds have finite
        variance. A support whose bounds carry gradient is refused. Where all other weights are 0, no baseline is subtracted.

    Raises:
        EstimatorError: unless the objective combines at least two particles; on a site whose support depends on a parameter.
        ConfigurationError: for another value of `mean`.

    Example:
        >>> VIMCO(mean="arithmetic").declaration.unbiased
        True

    References:
        Mnih and Rezende (2016), equations 10 and 11.
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
    r"""The OVIS estimator: the score function with the optimal control variate for bounds over many particles.

    Estimates ∇θ E[L̂] = E[Σ_k (L̂ − w̃_k − c_k) ∇θ log q(z_k)] for the site's own parameters. L̂ is the bound of the site's element
    and w̃_k is the normalised weight of particle k.

    With `samples=S` the control variate c_k is the mean of L̂ − w̃_k over S further draws of the site, with the other particles
    unchanged. With `samples=0` it is a limit: log 1/K Σ_{l≠k} w_l for a small effective sample size at `gamma=0`, and
    log 1/(K − 1) Σ_{l≠k} w_l − w̃_k for a large one at `gamma=1`. Between 0 and 1 the two limits are interpolated. Only `gamma=0` is
    unbiased, because w̃_k depends on the draw.

    Args:
        samples: the number S of further draws of the site, 0 or more. Default: 0.
        gamma: the interpolation weight between the two limits, in [0, 1]; only with `samples=0`. Default: 0.0.

    Shapes:
        Any distribution with a log density, in any plates. S evaluations of the program. The bound is in nats.

    Assumptions:
        The conditions of the score function hold: the support of q does not depend on the parameters, and the bounds have finite
        variance. A support whose bounds carry gradient is refused. Where all other weights are 0, no baseline is subtracted.

    Raises:
        EstimatorError: unless the objective combines at least two particles; on a site whose support depends on a parameter; with
            `samples` above 0 on a site that is drawn inside a `scan` in the body of another one.
        ConfigurationError: if `samples` is negative, `gamma` is outside [0, 1], or both are above 0.

    Example:
        >>> OVIS().declaration.unbiased, OVIS(gamma=1.0).declaration.unbiased
        (True, False)

    References:
        Liévin, Dittadi, Christensen and Winther (2020), equations 12 and 17.
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
        """The declaration; the estimator is unbiased at gamma = 0."""
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
            require_steps(self, site)

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
    r"""The doubly reparameterized gradient (DReG): the score term in the importance weights is reparameterized as well.

    Estimates ∇φ E[L̂], where the term −Σ_k w̃_k ∂φ log q(z_k; φ) is replaced by −Σ_k (∂w̃_k/∂z_k) ∂φ z_k, which has the same mean. The
    replaced term is the part of the gradient that the weights carry to the parameters of the draw's own distribution. For a
    single site under IWAE the total is Σ_k w̃_k² ∂z log w_k ∂φ z_k, and its signal-to-noise ratio does not fall with K.

    Shapes:
        Any plates. One evaluation of the program, with its derivative, for each particle. The bound is in nats.

    Assumptions:
        The conditions of `Reparam` hold, and E[∇ log q] = 0: the support of q does not depend on its parameters. A support whose
        bounds carry gradient is refused.

    Raises:
        EstimatorError: on a site whose distribution has no reparameterized sampler; on a site whose support depends on a parameter;
            under an objective that combines no particles; inside a `scan` or `cond`.

    Example:
        >>> DReG().declaration.differentiable_costs
        True

    References:
        Tucker, Lawson, Gu and Maddison (2019), equation 8.
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
    if_undifferentiable: ClassVar[str] = "use Reparam()"

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
