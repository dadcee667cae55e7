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
    r"""The pathwise gradient: the draw is a differentiable function of noise, z = g(ε, θ).

    Estimates ∇θ E_q[f(z)] = E_ε[∇θ f(g(ε, θ))]. Implicit reparameterization (Figurnov et al., 2018) is used where
    the host's sampler offers it (Gamma, Beta, Dirichlet, von Mises).

    With `sticking_the_landing=True` the guide's log q(z; θ) is differentiated along z alone: what is left out, the score
    ∂θ log q, has mean zero, and without it the gradient's variance vanishes where q is the posterior.

    Shapes: any batch and event shape; particles and plates add nothing.

    Right where the cost is continuous along the draw and differentiable almost everywhere: a cost that jumps (a comparison, a rounding)
    loses what happens at the jump. A cost that depends on the draw only through jumps, or through a value that was detached, is refused; one
    that has a derivative as well is not seen to jump, and `check_gradients` shows its bias. Sticking the landing takes E[∇ log q] = 0 for granted, and so a support that does not move.

    Raises `EstimatorError` on a site whose distribution has no reparameterized sampler, where a cost depends on the draw without a
    derivative, and for sticking the landing under
    an objective that combines particles.

    >>> Reparam().declaration.unbiased
    True

    Source: Kingma and Welling (2014), section 2.3; Rezende, Mohamed and Wierstra (2014), equation 7; Roeder, Wu and
    Duvenaud (2017), equation 8, for sticking the landing.
    """

    sticking_the_landing: bool = False

    uses_score: ClassVar[bool] = False

    @property
    def declaration(self) -> Declaration:  # type: ignore[override]
        """What the estimator promises: derivatives of every order, unless it sticks the landing."""
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
