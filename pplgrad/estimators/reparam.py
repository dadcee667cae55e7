"""The reparameterization (pathwise) estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pplgrad.core.estimator import Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import EstimatorError
from pplgrad.estimators.registry import remedy


@dataclass(frozen=True, repr=False)
class Reparam(Estimator):
    r"""The reparameterization (pathwise) gradient: the draw is a differentiable function of noise, z = g(ε, θ).

    Estimates ∇θ E_q[f(z)] = E_ε[∇θ f(g(ε, θ))]. Implicit reparameterization (Figurnov et al., 2018) is used where the host's sampler
    offers it (Gamma, Beta, Dirichlet, von Mises).

    With `sticking_the_landing=True` the guide's log q(z; θ) is differentiated with respect to z only. The term left out is the score
    ∂θ log q, which has mean zero. Without that term the variance of the gradient vanishes where q is the posterior.

    Args:
        sticking_the_landing: whether the score term of the guide's log density is left out. Default: False.

    Shapes:
        Any batch and event shape. Particles and plates are ordinary batch dimensions.

    Assumptions:
        The cost is continuous along the draw and differentiable almost everywhere. A discontinuous cost (a comparison, a rounding)
        loses the contribution of its jumps. A cost that depends on the draw only through jumps, or through a detached value, is
        refused. A cost that jumps and also has a derivative is not detected; `check_gradients` shows its bias. Sticking the landing
        assumes E[∇ log q] = 0, that is, a support that does not depend on the parameters; a support whose bounds carry gradient is
        refused.

    Raises:
        EstimatorError: on a site whose distribution has no reparameterized sampler; if a cost depends on the draw without a
            derivative; with `sticking_the_landing=True` also under an objective that combines particles, and on a site whose support
            depends on a parameter.

    Example:
        >>> Reparam().declaration.unbiased
        True

    References:
        Kingma and Welling (2014), section 2.3.
        Rezende, Mohamed and Wierstra (2014), equation 7.
        Roeder, Wu and Duvenaud (2017), equation 8, for sticking the landing.
        Figurnov et al. (2018), for implicit reparameterization.
    """

    sticking_the_landing: bool = False

    uses_score: ClassVar[bool] = False

    @property
    def declaration(self) -> Declaration:  # type: ignore[override]
        """The declaration; derivatives of every order are right, unless `sticking_the_landing` is set."""
        return Declaration(
            unbiased=True,
            supports="continuous, with a reparameterized sampler",
            evaluations=0,
            differentiable_costs=True,
            derivatives=1 if self.sticking_the_landing else None,
            source="Kingma and Welling 2014",
        )

    def __repr__(self) -> str:
        return "Reparam(sticking_the_landing=True)" if self.sticking_the_landing else "Reparam()"

    def check(self, site: SiteInfo) -> None:
        """Refuse a site whose sampler is not reparameterized."""
        if not site.has_rsample:
            raise EstimatorError(
                f"Reparam() cannot be used at site '{site.name}': {site.distribution} has no reparameterized "
                f"sampler; {remedy(site)}"
            )
        if self.sticking_the_landing and site.combined:
            raise EstimatorError(
                f"{self!r} cannot be used at site '{site.name}' under {site.objective!r}, where the score that it leaves out "
                f"has not mean zero; {remedy(site, 'DReG')}"
            )
