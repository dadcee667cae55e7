"""What an estimator is: a declaration, a check that it fits a site, and one term of the surrogate."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.baseline import Baseline, parts_of
from pplgrad.core.draw import Draw
from pplgrad.core.plates import Plate
from pplgrad.core.site_info import SiteInfo
from pplgrad.core.weights import Weights


@dataclass(frozen=True)
class Declaration:
    """What an estimator promises and asks for.

    `unbiased`: the expectation of the estimate is the gradient. `supports`: the kinds of site it accepts, in words.
    `evaluations`: evaluations of the program beyond the primary draw. `differentiable_costs`: whether costs must
    have a gradient with respect to the site's value. `derivatives`: up to which order the surrogate's derivatives
    are right (None: every order).
    """

    unbiased: bool
    supports: str
    evaluations: int | str
    differentiable_costs: bool
    derivatives: int | None
    source: str


@dataclass(frozen=True)
class GroupTerms:
    """The arrays of a group of sites that share plates and estimator.

    `log_prob` is log q with its gradient and `downstream` the sum of the costs that depend on each site, both of
    shape (particles, n, *plates); `evaluate` evaluates a baseline for the group. Under an objective that combines particles
    `downstream` is the bound of the site's element, and `weights` are the importance weights. With `higher_order` the costs are
    multiplied by the probability of the draws already (as a function that is one), and only the baseline is asked for.
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
    """What a baseline says of a group: the signal that is left, and the loss that trains the baseline."""

    signal: Array
    loss: Array | None


class BaselineHost(Protocol):
    """Where a plug-in keeps learned baselines: their state and their networks, site by site."""

    def state(self, site: str, key: str) -> Mapping[str, Array]:
        """Return the arrays of a baseline's state from before this draw."""

    def predict(self, site: str, key: str, baseline: Any) -> Array:
        """Return the output of a baseline's network or function at the program's inputs for this draw."""

    def check_finite(self, site: str, baseline: Any, value: Array) -> None:
        """Raise `BaselineError` if the value of a user's network or function is not finite (where that is known)."""


@dataclass(frozen=True)
class Values:
    """Other values of a site, by their number: `at(numbers)` has shape (particles, len(numbers), *B, *E).

    They are made where they are wanted, so that branches that run some at a time hold no more of them.
    """

    count: int
    at: Callable[[Array], Array]

    @classmethod
    def of(cls, values: Array | Values) -> Values:
        """Return alternatives that are all there, (particles, m, *B, *E), by their number."""
        return values if isinstance(values, Values) else cls(values.shape[1], lambda numbers: values[:, numbers])


@dataclass(frozen=True)
class Alternatives:
    """Where an estimator wants the downstream cost of a site, and what it keeps for itself.

    `values` are other values, (particles, m, *B, *E) as `Draw.embed` gives them, or by their number. `weights` are weights of the categories,
    (particles, m', *plates, elements, categories), at which the derivative of the cost is wanted too; discrete sites
    that follow are then relaxed as well, at the `temperature`, or replaced by their probabilities if it is None.
    """

    values: Array | Values | None = None
    kept: Any = None
    weights: Array | None = None
    temperature: Any = None


@dataclass(frozen=True)
class BranchTerms:
    """What an estimator that asked for branches gets: constants, but for `draw.log_probs`.

    `downstream` is the downstream cost of the draw, (particles, *plates), and `costs` that of each alternative,
    (particles, m, *plates). `soft_costs`, (particles, m', *plates), and `slopes`, of the shape of the weights, are the cost and
    its derivative at the weights; slopes carry gradient to what the weights were computed from. Under an objective that
    combines particles a cost is the bound, and `shares()` the normalised weights of the alternatives, shaped like `costs`. With
    `higher_order` the score of the draw is in the costs already, with derivatives of every order, and is to be taken out again.
    """

    draw: Draw
    downstream: Array
    alternatives: Alternatives
    costs: Array
    soft_costs: Array
    slopes: Array
    shares: Callable[[], Array] | None = None
    higher_order: bool = False

    @property
    def ops(self) -> Ops:
        """The array operations."""
        return self.draw.ops


_RENAMED = {"surrogate_of": "branch_surrogate", "draws_again": "num_resamples", "path_only": "sticking_the_landing"}
"""Parts of the contract that had other names, which estimators of a user's own may still define."""


class Estimator(ABC):
    """How the gradient through one latent site is estimated.

    A subclass is a frozen dataclass with a `declaration`, and says with `uses_score` whether it needs log q and
    the downstream cost; the draw of such a site is a constant to differentiation. With `uses_branches` as well, it
    asks by `alternatives` for the downstream cost at other values of the site and gets them in `branch_surrogate`
    (instead of `surrogate`). With `relaxes` its draw is replaced by weights of the categories;
    with `uses_slopes` it asks for the derivative of the cost at such weights; with `reweights_path` the score of its draw in the
    importance weights is reparameterized.
    """

    declaration: ClassVar[Declaration]
    uses_score: ClassVar[bool]
    uses_branches: ClassVar[bool] = False
    relaxes: ClassVar[bool] = False
    uses_slopes: ClassVar[bool] = False
    reweights_path: ClassVar[bool] = False

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
        """Sites whose estimators have equal keys are handled as one stacked array."""
        return self

    @property
    def baseline(self) -> Baseline | None:
        """The baseline that the estimator subtracts, if it has one."""
        return None

    @property
    def keeps_state(self) -> bool:
        """Whether something is kept for the site by a plug-in: a baseline's state, network or function, learned numbers."""
        return bool(self.learned(1, 2)) or any(part.per_site for part in parts_of(self.baseline))

    @property
    def needs_exact_slopes(self) -> bool:
        """Whether the estimate is biased where the derivative of the cost at relaxed weights is not the cost's own (`z.detach()`)."""
        return False

    @property
    def sticking_the_landing(self) -> bool:
        """Whether the density of the draw in the guide counts only along the draw, and not through its parameters."""
        return False

    @property
    def needs_fixed_support(self) -> bool:
        """Whether the estimator takes for granted that E[∇ log q] = 0, so that the site's support may not move with a parameter."""
        return self.uses_score or self.sticking_the_landing or self.reweights_path

    @property
    def num_resamples(self) -> int:
        """The number of further draws of the site, at the same parents, that the estimator asks the host for."""
        return 0

    @abstractmethod
    def check(self, site: SiteInfo) -> None:
        """Raise `EstimatorError` or `BaselineError` if the estimator does not fit the site."""

    def surrogate(self, terms: GroupTerms) -> tuple[Array, Array | None]:
        """Return the group's term of the surrogate (summed over particles) and its baselines' loss, or None."""
        raise TypeError(f"{type(self).__name__} has no score term.")

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the other values at which the estimator wants the downstream cost."""
        raise TypeError(f"{type(self).__name__} asks for no branches.")

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return the site's term of the surrogate, summed over particles and elements, from its branches."""
        raise TypeError(f"{type(self).__name__} asks for no branches.")

    def loss_of(self, terms: BranchTerms) -> Array | None:
        """Return the loss that trains what the estimator learns, or None."""
        return None

    def learned(self, elements: int, categories: int) -> Mapping[str, Any]:
        """Return the numbers and arrays that the estimator learns at a site, by name, with their first values.

        The site's event has so many independent elements, of so many categories each.
        """
        return {}
