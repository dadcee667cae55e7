"""Estimators of mixtures: the draw moves with its component, and the weights are summed over or move it too."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, Ops, is_possible
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator
from pplgrad.core.mixtures import Mixture
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError, EstimatorError
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
class _Paths:
    """The values of all components of each element, (..., elements, components, *E), with their gradient, the draw's own as the last.

    `weights` are their probabilities, constants. `of_draw` is 0 with the gradient that the draw has.
    """

    weights: Array
    values: Array
    of_draw: Array


@dataclass(frozen=True)
class _Strata:
    """The log weights of the components beside that of the draw, (..., elements, components - 1), and all paths where they are summed."""

    log_weights: Array
    paths: _Paths | None = None


@dataclass(frozen=True)
class StratifiedMixture(MixturePath):
    r"""Stratified sampling over the components of a mixture: every component is evaluated, weighted by its probability.

    Estimates ∇θ E_q[f(x)] = E[Σ_k (∇θ π_k f(x_k) + π_k ∇θ x_k · ∇f(x_k))], where x_k = μ_k + σ_k z is drawn from component k. It is an exact
    sum over the components of one element at a time, with the others at their draw. In it the draw x stands for a component that is drawn
    from r_k(x) = π_k q_k(x) / q(x), the probability that k has drawn x. The other components are drawn with the same noise z where all are
    of one family, and with noise of their own elsewhere.

    With `paths="draw"` the second term of the sum is replaced by E_q[Σ_k r_k(x) ∇θ x_k · ∇f(x)]: the path of the draw alone, averaged over
    the component that it may have come from. The other components are then evaluated without a derivative. `paths="auto"` sums all paths
    where it can, and takes that of the draw elsewhere: where a site that follows has a score, or branches of its own, and in NumPyro where
    Python control flow depends on a value. It is the default because of what was measured (`make bench-mixtures`): the sum of all paths
    has about half of the variance at two components, and a tenth at ten components of one element, for at most twice the time of a
    step. Where many elements share a cost and the weights' part makes most of the variance, "draw" is the better choice.

    In a sum of costs the guide's log q(x; θ) is differentiated with respect to x only: what is left out has mean zero. A bound of several
    particles needs it. Parameters that the costs hold, such as those of the model, get their gradient at the draw.

    Args:
        paths: the draws along which costs are differentiated: "draw", "all" or "auto". Default: "auto".

    Shapes:
        Elements are the entries of `to_event` around the mixture, of batch dimensions that no plate declares, and of plates that a
        downstream cost does not have. The event of a component is one element, whatever its shape. Each element needs (components − 1)
        evaluations of the program, with their derivative where all paths are summed. All elements of the other plates change at once.
        Costs are in nats.

    Assumptions:
        The components are Normal, Laplace, Logistic, Gumbel, Cauchy, LogNormal (with `to_event` or without) or MultivariateNormal. The
        cost is finite at a draw of every component of positive weight, and continuous and almost everywhere differentiable along
        the draw, as for `Reparam`: it may jump between modes, and the part of the gradient that comes from the weights needs no derivative.

    Raises:
        EstimatorError: on a site that is no mixture of such components, or that is drawn inside a `scan` or `cond`;
            if a cost depends on the draw without a derivative; with `paths="all"` where "auto" would take the path of the draw.
        ConfigurationError: if `paths` is not one of the three.

    Example:
        >>> StratifiedMixture().declaration.evaluations
        'elements × (components − 1)'

    References:
        Morningstar et al. (2021), equation 5, for stratified sampling over components.
        Roeder, Wu and Duvenaud (2017), section 3.3 and equation 8.
        Titsias and Lázaro-Gredilla (2015), equation 8, for one element at a time.
    """

    paths: str = "auto"

    declaration: ClassVar[Declaration] = _declared(
        "mixtures of location-scale components", "elements × (components − 1)", "Morningstar et al. 2021"
    )
    uses_branches: ClassVar[bool] = True
    if_undifferentiable: ClassVar[str] = "use StratifiedMixture()"

    def __post_init__(self) -> None:
        if self.paths not in ("draw", "all", "auto"):
            raise ConfigurationError(f'StratifiedMixture(paths={self.paths!r}): write "draw", "all" or "auto".')

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is no mixture of known components."""
        super().check(site)
        require_unscanned(self, site)

    @property
    def differentiates_branches(self) -> bool:  # type: ignore[override]
        """Whether costs are to be differentiated along the draws of all components in any case."""
        return self.paths == "all"

    def moved(self, ops: Ops, mixture: Mixture) -> Array:
        """Return the draw with its gradient to the parameters of the components."""
        z = mixture.noise(ops)
        return mixture.value + mixture.moved_by_components(ops, z, mixture.log_responsibilities(ops, z))

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return, for each element, the draw with that element drawn from every other component."""
        ops, xp, mixture = draw.ops, draw.ops.xp, draw.mixture
        z, e, count = mixture.noise(ops), mixture.event_dim, mixture.log_weights.shape[-1]
        log_r = mixture.log_responsibilities(ops, z)
        own = draw.noise.categorical(log_r)[..., None]
        at_own = _noise_of_all(draw, z, own)
        # The components after the draw's own, in a cycle: (particles, *plates, elements, components - 1); its own is the last.
        order = (own + 1 + ops.arange(count, own)) % count
        log_weights = xp.take_along_axis(mixture.log_weights, order, axis=-1)
        moved = _of_component(xp, mixture.at(ops, at_own), order, e)
        possible = is_possible(xp, log_weights[..., :-1])
        possible = xp.reshape(possible, (*possible.shape, *(1,) * e))
        axis = -1 - e
        others = ops.stop_gradient(moved)[(..., slice(None, -1), *(slice(None),) * e)]
        values = xp.moveaxis(xp.where(possible, others, xp.expand_dims(mixture.value, axis=axis)), axis, 1)
        if not (self.differentiates_branches or self.paths == "auto" and draw.differentiable):
            return Alternatives(draw.changed_one_by_one(values), _Strata(log_weights[..., :-1]))
        of_draw = mixture.moved_by_components(ops, z, log_r)
        paths = _Paths(xp.exp(ops.stop_gradient(log_weights)), moved, of_draw)
        return Alternatives(draw.changed_one_by_one, _Strata(log_weights[..., :-1], paths), points=values)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_d Σ_k π_k (f(x with x_d from component k) − f(x)), with the paths of all components in the place of the draw's own."""
        xp, strata = terms.ops.xp, terms.alternatives.kept
        costs = terms.costs_of_elements(strata.log_weights.shape[-2])
        found = xp.sum(xp.exp(strata.log_weights) * (costs - terms.downstream[..., None, None]))
        return found if strata.paths is None else found + _along_all(terms, strata.paths)


def _along_all(terms: BranchTerms, paths: _Paths) -> Array:
    """Return Σ_d (Σ_k π_k x_k · ∇f(x_k) − x · ∇f(x)): the costs at the draw x move with it already."""
    xp, axis = terms.ops.xp, len(paths.weights.shape) - 1
    others = xp.moveaxis(terms.along_points, 1, axis)
    slopes = xp.concat([others, xp.expand_dims(terms.along_draw, axis=axis)], axis=axis)
    weights = xp.reshape(paths.weights, (*paths.weights.shape, *(1,) * (len(slopes.shape) - axis - 1)))
    moved = paths.values - terms.ops.stop_gradient(paths.values)
    return xp.sum(weights * slopes * moved) - xp.sum(terms.along_draw * paths.of_draw)


def _noise_of_all(draw: Draw, z: Array, own: Array) -> Array:
    """Return noise of every component, (..., components, *E), from that which gives each the draw: at its own component it stays."""
    xp, mixture = draw.ops.xp, draw.mixture
    if mixture.one_family:
        return xp.broadcast_to(_of_component(xp, z, own, mixture.event_dim), z.shape)
    is_own = own == draw.ops.arange(mixture.log_weights.shape[-1], own)
    is_own = xp.reshape(is_own, (*is_own.shape, *(1,) * mixture.event_dim))
    return xp.where(is_own, z, mixture.fresh_noise(draw.noise))


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
