"""Estimators of mixtures: the draw moves with its component, and the weights are summed over or move it too."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pplgrad.core.alternatives import Alternatives, Values
from pplgrad.core.array_ops import Array, Ops, is_possible
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator
from pplgrad.core.mixtures import Mixture
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import EstimatorError
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.site_requirements import require_unscanned


class MixturePath(Estimator):
    """Base class of estimators that give the draw of a mixture a gradient to the parameters of the mixture."""

    uses_score: ClassVar[bool] = False
    follows_mixture: ClassVar[bool] = True

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is no mixture of components with locations and scales."""
        if site.components is None:
            raise EstimatorError(
                f"{self!r} cannot be used at site '{site.name}': {site.distribution} is no mixture of Normal, Laplace, Logistic, Gumbel, "
                f"Cauchy, LogNormal or MultivariateNormal components; {remedy(site)}"
            )

    @property
    def sticking_the_landing(self) -> bool:
        """Return True: in a sum of costs the rest of the gradient of log q has mean zero (`engine.signals`)."""
        return True

    @abstractmethod
    def moved(self, ops: Ops, mixture: Mixture) -> Array:
        """Return the draw with its gradient."""


def _declared(supports: str, evaluations: int | str, source: str) -> Declaration:
    return Declaration(
        unbiased=True,
        supports=supports,
        evaluations=evaluations,
        differentiable_costs=True,
        derivatives=1,
        source=source,
    )


@dataclass(frozen=True)
class StratifiedMixture(MixturePath):
    r"""Stratified sampling over the components of a mixture: every component is evaluated, weighted by its probability.

    Estimates ∇θ E_q[f(x)] = E[Σ_k ∇θ π_k f(x_k)] + E_q[Σ_k r_k(x) ∇θ x_k · ∇f(x)], where x_k = μ_k + σ_k z is drawn from component k.
    The first term is an exact sum over the components of one element at a time, with the others at their draw. In it the draw x stands
    for a component that is drawn from r_k(x) = π_k q_k(x) / q(x), the probability that k has drawn x. The other components are drawn with
    the same noise z where all are of one family, and with noise of their own elsewhere. The second term is the path of the draw, averaged
    over the component that it may have come from.

    In a sum of costs the guide's log q(x; θ) is differentiated with respect to x only: what is left out has mean zero. A bound of several
    particles needs it.

    Shapes:
        Elements are the entries of `to_event` around the mixture, of batch dimensions that no plate declares, and of plates that a
        downstream cost does not have. The event of a component is one element, whatever its shape. Each element needs (components − 1)
        evaluations of the program. All elements of the other plates change at once. Costs are in nats.

    Assumptions:
        The components are Normal, Laplace, Logistic, Gumbel, Cauchy, LogNormal (with `to_event` or without) or MultivariateNormal. The
        cost is finite at a draw of every component of positive weight, and continuous and almost everywhere differentiable along
        the draw, as for `Reparam`: it may jump between modes, and the part of the gradient that comes from the weights needs no derivative.

    Raises:
        EstimatorError: on a site that is no mixture of such components, or that is drawn inside a `scan` or `cond`;
            if a cost depends on the draw without a derivative.

    Example:
        >>> StratifiedMixture().declaration.evaluations
        'elements × (components − 1)'

    References:
        Morningstar et al. (2021), equation 5, for stratified sampling over components.
        Roeder, Wu and Duvenaud (2017), section 3.3 and equation 8.
        Titsias and Lázaro-Gredilla (2015), equation 8, for one element at a time.
    """

    declaration: ClassVar[Declaration] = _declared(
        "mixtures of location-scale components", "elements × (components − 1)", "Morningstar et al. 2021"
    )
    uses_branches: ClassVar[bool] = True

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is no mixture of known components."""
        super().check(site)
        require_unscanned(self, site)

    def moved(self, ops: Ops, mixture: Mixture) -> Array:
        """Return the draw with its gradient to the parameters of the components."""
        z = mixture.noise(ops)
        return mixture.value + mixture.moved_by_components(ops, z, mixture.log_responsibilities(ops, z))

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return, for each element, the draw with that element drawn from every other component."""
        ops, xp, mixture = draw.ops, draw.ops.xp, draw.mixture
        z, e, count = mixture.noise(ops), mixture.event_dim, mixture.log_weights.shape[-1]
        own = draw.noise.categorical(mixture.log_responsibilities(ops, z))
        if mixture.one_family:
            z = xp.broadcast_to(_of_component(xp, z, own[..., None], e), z.shape)
        else:
            z = mixture.fresh_noise(draw.noise)
        # The components after the draw's own, in a cycle: (particles, *plates, elements, components - 1).
        others = (own[..., None] + 1 + ops.arange(count - 1, own)) % count
        log_weights = xp.take_along_axis(mixture.log_weights, others, axis=-1)
        values = _of_component(xp, ops.stop_gradient(mixture.at(ops, z)), others, e)
        possible = xp.reshape(is_possible(xp, log_weights), (*others.shape, *(1,) * e))
        axis = -1 - e
        values = xp.moveaxis(xp.where(possible, values, xp.expand_dims(mixture.value, axis=axis)), axis, 1)
        value = mixture.value[:, None]

        def at(numbers: Array) -> Array:
            here = draw.is_element(numbers // (count - 1))
            here = xp.reshape(here, (*here.shape, *(1,) * e))
            return draw.place(xp.where(here, xp.take(values, numbers % (count - 1), axis=1), value))

        return Alternatives(Values(own.shape[-1] * (count - 1), at), log_weights)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_d Σ_k π_k (f(x with x_d from component k) − f(x))."""
        xp, log_weights = terms.ops.xp, terms.alternatives.kept
        costs = terms.costs_of_elements(log_weights.shape[-2])
        return xp.sum(xp.exp(log_weights) * (costs - terms.downstream[..., None, None]))


def _of_component(xp: Any, x: Array, numbers: Array, event_dim: int) -> Array:
    """Return the values of components by their numbers, (..., m, *E), from those of all, (..., K, *E)."""
    at = xp.reshape(numbers, (*numbers.shape, *(1,) * event_dim))
    at = xp.broadcast_to(at, (*numbers.shape, *x.shape[len(x.shape) - event_dim :]))
    return xp.take_along_axis(x, at, axis=-1 - event_dim)


@dataclass(frozen=True)
class ImplicitReparam(MixturePath):
    r"""Implicit reparameterization of a mixture: the draw moves so that its conditional distribution functions stay where they are.

    Estimates ∇θ E_q[f(x)] = E_q[∇θ x · ∇f(x)], with ∇θ x = Σ_k r_k(x) ∇θ x_k + ∇π x. The first part moves x with the component that
    drew it, r_k(x) = π_k q_k(x) / q(x). The second moves entry d by ∇π x_d = −Σ_k ∇w_k F_k(x_d) / q(x_d | x_<d), where F_k is the
    distribution function of component k and w_k ∝ π_k q_k(x_<d) its weight given the entries before. In one dimension the sum of both is
    −∇θ F(x; θ) / q(x).

    No further evaluation of the program is needed. Between two modes that are far apart the density q in the denominator is small. The
    variance of the weights' gradient grows there like ∫ (F_k − F_l)²/q: `StratifiedMixture` has no such term, and `Auto` never chooses this
    estimator.

    In a sum of costs the guide's log q(x; θ) is differentiated with respect to x only: what is left out has mean zero. A bound of several
    particles needs it.

    Shapes:
        Any batch shape. The entries of a component's event are taken one after the other, so that a program with an event of D numbers has some
        15 D small operations more. Particles and plates are ordinary batch dimensions.

    Assumptions:
        The components are Normal, Laplace, Logistic, Gumbel, Cauchy or LogNormal, and their entries are independent (`to_event`). The cost is
        continuous along the draw and differentiable almost everywhere, as for `Reparam`: a cost that jumps between modes is biased.

    Raises:
        EstimatorError: on a site that is no mixture of such components; if a cost depends on the draw without a derivative.

    Example:
        >>> ImplicitReparam().declaration.evaluations
        0

    References:
        Figurnov, Mohamed and Mnih (2018), equation 5 and section 3.
        Graves (2016), section 2, for mixtures of several dimensions.
    """

    declaration: ClassVar[Declaration] = _declared(
        "mixtures of independent location-scale components", 0, "Figurnov et al. 2018; Graves 2016"
    )

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is no mixture, or whose components have no conditional distribution functions."""
        super().check(site)
        if not site.conditionals:
            raise EstimatorError(
                f"{self!r} cannot be used at site '{site.name}': the entries of its components are correlated (MultivariateNormal), and "
                f"their conditional distribution functions are not implemented; {remedy(site, 'StratifiedMixture')}"
            )

    def moved(self, ops: Ops, mixture: Mixture) -> Array:
        """Return the draw with its gradient to weights and components."""
        z = mixture.noise(ops)
        by_components = mixture.moved_by_components(ops, z, mixture.log_responsibilities(ops, z))
        return mixture.value + by_components + mixture.moved_by_weights(ops, z)
