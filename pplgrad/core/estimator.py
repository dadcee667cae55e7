"""The contract of estimators: a declaration, a check that the estimator fits a site, and one term of the surrogate."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Protocol

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.baseline import Baseline, parts_of
from pplgrad.core.draw import Draw
from pplgrad.core.plates import Plate
from pplgrad.core.site_info import SiteInfo
from pplgrad.core.weights import Weights


@dataclass(frozen=True)
class Declaration:
    """The properties and requirements that an estimator declares.

    Attributes:
        unbiased: whether the expectation of the estimate is the gradient.
        supports: the kinds of site that the estimator accepts, in words.
        evaluations: the number of evaluations of the program beyond the primary draw, as a number or as a formula in words.
        differentiable_costs: whether costs must have a gradient with respect to the site's value.
        derivatives: the highest order up to which the derivatives of the surrogate are right; None for every order.
        source: the paper, in short.
    """

    unbiased: bool
    supports: str
    evaluations: int | str
    differentiable_costs: bool
    derivatives: int | None
    source: str


@dataclass(frozen=True)
class GroupTerms:
    """The arrays of a group of n sites that share plates and estimator.

    Attributes:
        names: the names of the sites.
        plates: the plates that the sites share.
        log_prob: log q with its gradient, of shape (particles, n, *plates).
        downstream: the sum of the costs that depend on each site, of shape (particles, n, *plates). Under an objective that combines
            particles it is the bound of the site's element.
        ops: the array operations of the host library.
        evaluate: evaluates a baseline for the group.
        weights: the importance weights under an objective that combines particles, else None.
        higher_order: if True, the costs are already multiplied by the probability of the draws, written as a function whose value is one,
            and the estimator returns the term of its baseline only.
    """

    names: tuple[str, ...]
    plates: tuple[Plate, ...]
    log_prob: Array
    downstream: Array
    ops: Ops
    evaluate: Callable[[Baseline], BaselineValue]
    weights: Weights | None = None
    higher_order: bool = False


@dataclass(frozen=True)
class BaselineValue:
    """The result of evaluating a baseline for a group of sites.

    Attributes:
        signal: the downstream cost after the baseline is subtracted.
        loss: the loss that trains the baseline, or None.
    """

    signal: Array
    loss: Array | None


class BaselineHost(Protocol):
    """The part of a plug-in that stores the state and the networks of learned baselines, for each site."""

    def state(self, site: str, key: str) -> Mapping[str, Array]:
        """Return the arrays of a baseline's state from before this draw."""

    def predict(self, site: str, key: str, baseline: Any) -> Array:
        """Return the output of a baseline's network or function at the program's inputs for this draw."""

    def predict_all(self, sites: Sequence[str], key: str, baseline: Any) -> Array | None:
        """Return the outputs of the networks of several sites of equal plates, (sites, ...), or None to compute one after the other."""

    def check_finite(self, site: str, baseline: Any, value: Array) -> None:
        """Raise `BaselineError` if the value of a user's network or function is not finite (where that is known)."""


@dataclass(frozen=True)
class BranchTerms:
    """The arrays that an estimator with branches receives.

    They are constants to differentiation, except the log densities and parameters of `draw`, and the `slopes`.

    Attributes:
        draw: the primary draw of the site.
        downstream: the downstream cost of the draw, of shape (particles, *plates).
        alternatives: what the estimator requested.
        costs: the downstream cost of each alternative, of shape (particles, m, *plates).
        soft_costs: the cost at each of the weights, of shape (particles, m', *plates).
        slopes: the derivative of the cost at the weights, of the shape of the weights. Slopes carry gradient to the quantities from which
            the weights were computed.
        along_points: the derivative of the costs with respect to the points, of their shape, a constant.
        along_draw: the derivative of the draw's cost along the draw, (particles, *plates, elements, *E), a constant, where there are points.
        shares: under an objective that combines particles, returns the normalised weights of the alternatives, of the shape of `costs`.
            Under such an objective a cost is the bound.
        higher_order: if True, the costs already contain the score of the draw, with derivatives of every order, and the estimator must
            subtract it.
    """

    draw: Draw
    downstream: Array
    alternatives: Alternatives
    costs: Array
    soft_costs: Array
    slopes: Array
    shares: Callable[[], Array] | None = None
    higher_order: bool = False
    along_points: Array | None = None
    along_draw: Array | None = None
    _computed: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def ops(self) -> Ops:
        """The array operations."""
        return self.draw.ops

    def once(self, name: str, compute: Callable[[BranchTerms], Any]) -> Any:
        """Return what is computed of these arrays, of that name: for the surrogate, and again for the loss."""
        if name not in self._computed:
            self._computed[name] = compute(self)
        return self._computed[name]

    def costs_of_elements(self, elements: int) -> Array:
        """Return the costs of alternatives that are numbered element by element: (particles, *plates, elements, alternatives of each)."""
        xp, (particles, count, *plates) = self.ops.xp, self.costs.shape
        by_element = xp.reshape(self.costs, (particles, elements, count // elements, *plates))
        return xp.moveaxis(by_element, (1, 2), (-2, -1))


def arguments_of(specification: Any) -> list[Field[Any]]:
    """Return the fields of a dataclass in the order of its constructor's arguments: those that are given by name alone come last."""
    return sorted(fields(specification), key=lambda part: part.kw_only is True)


_RENAMED = {"surrogate_of": "branch_surrogate", "draws_again": "num_resamples", "path_only": "sticking_the_landing"}
"""Parts of the contract that had other names, which estimators of a user's own may still define."""


class Estimator(ABC):
    """Base class of estimators: how the gradient through one latent site is estimated.

    A subclass is a frozen dataclass. It defines `declaration`, `uses_score` and `check`. With `uses_score` it defines `surrogate`, or
    with `uses_branches` as well `alternatives` and `branch_surrogate`.

    Attributes:
        declaration: the properties and requirements of the estimator.
        uses_score: whether the estimator needs log q and the downstream cost. The draw of such a site is a constant to differentiation.
        uses_branches: whether the estimator requests, by `alternatives`, the downstream cost at other values of the site. It receives them
            in `branch_surrogate`, which is called instead of `surrogate`.
        enumerates: whether costs are averaged over all values of the site (`engine.joint_sums`); there is no other term at it.
        follows_mixture: whether the draw of a mixture is given a gradient to the mixture's parameters, which the host's draw has not.
        differentiates_branches: whether the derivative of the costs along other values of the site is requested whatever the program is
            (`Alternatives.points`): a site that follows may then have no score. See `Draw.differentiable`.
        relaxes: whether the draw is replaced by weights of the categories.
        uses_slopes: whether the estimator requests the derivative of the cost at such weights.
        reweights_path: whether the score of the draw in the importance weights is reparameterized.
        if_undifferentiable: what to use where the program has no derivative at other draws of the site, which the estimator asks for.
        if_nan: what the site's log density in the guide is NaN for on purpose, and what to change, as a sentence; empty if nothing is.
    """

    declaration: ClassVar[Declaration]
    uses_score: ClassVar[bool]
    uses_branches: ClassVar[bool] = False
    enumerates: ClassVar[bool] = False
    follows_mixture: ClassVar[bool] = False
    differentiates_branches: ClassVar[bool] = False
    relaxes: ClassVar[bool] = False
    uses_slopes: ClassVar[bool] = False
    reweights_path: ClassVar[bool] = False
    if_undifferentiable: ClassVar[str] = "use ScoreFunction()"
    if_nan: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            if old in vars(cls):
                warnings.warn(
                    f"{cls.__name__}.{old} is deprecated and will be ignored; name it {new}.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                setattr(cls, new, vars(cls)[old])

    @property
    def group_key(self) -> Hashable:
        """The key by which sites are grouped: sites whose estimators have equal keys are handled as one stacked array."""
        return self

    @property
    def baseline(self) -> Baseline | None:
        """The baseline that the estimator subtracts, if it has one."""
        return None

    @property
    def keeps_state(self) -> bool:
        """Whether a plug-in stores something for the site: a baseline's state, network or function, or learned numbers."""
        return bool(self.learned(1, 2)) or any(part.per_site for part in parts_of(self.baseline))

    @property
    def needs_exact_slopes(self) -> bool:
        """Whether the estimate is biased if the derivative at relaxed weights is not that of the cost (as with `z.detach()`)."""
        return False

    @property
    def differentiates_all(self) -> bool:
        """Whether the costs are differentiated, along the parameters that they contain, at the requested values too.

        Each of these must have the law of the draw itself, given what comes before it.
        """
        return False

    @property
    def sticking_the_landing(self) -> bool:
        """Whether the guide's log density is differentiated with respect to the draw only, and not with respect to its parameters."""
        return False

    @property
    def needs_fixed_support(self) -> bool:
        """Whether the estimator assumes E[∇ log q] = 0, so that the site's support must not depend on a parameter."""
        return self.uses_score or self.sticking_the_landing or self.reweights_path

    @property
    def num_resamples(self) -> int:
        """The number of further draws of the site, at the same parents, that the estimator requests from the host."""
        return 0

    @property
    def num_counts(self) -> int:
        """The number of consecutive counts whose log probabilities the estimator requests from the host."""
        return 0

    @abstractmethod
    def check(self, site: SiteInfo) -> None:
        """Raise `EstimatorError` or `BaselineError` if the estimator does not fit the site."""

    def surrogate(self, terms: GroupTerms) -> tuple[Array, Array | None]:
        """Return the group's term of the surrogate (summed over particles) and its baselines' loss, or None."""
        raise TypeError(f"{type(self).__name__} has no score term.")

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the other values at which the estimator requests the downstream cost."""
        raise TypeError(f"{type(self).__name__} asks for no branches.")

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return the site's term of the surrogate, summed over particles and elements, from its branches."""
        raise TypeError(f"{type(self).__name__} asks for no branches.")

    def loss_of(self, terms: BranchTerms) -> Array | None:
        """Return the loss that trains what the estimator learns, or None."""
        return None

    def learned(self, elements: int, categories: int) -> Mapping[str, Any]:
        """Return the numbers and arrays that the estimator learns at a site, by name, with their initial values.

        Args:
            elements: the number of independent elements of the site's event.
            categories: the number of categories of each element.
        """
        return {}
