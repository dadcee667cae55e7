"""The automatic choice of an estimator for each site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pplgrad.core.estimator import Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.antithetic import DisARM
from pplgrad.estimators.count_difference import CountDifference
from pplgrad.estimators.local_expectation import LocalExpectation
from pplgrad.estimators.mixtures import StratifiedMixture
from pplgrad.estimators.reparam import Reparam
from pplgrad.estimators.score import ScoreFunction


@dataclass(frozen=True)
class Auto(Estimator):
    r"""An automatic choice of an unbiased estimator for each site, by the site's support and a budget of evaluations.

    Estimates the gradient with the chosen estimator. The choice is the first of these that applies:

    1. `Reparam()`, if the sampler is reparameterized.
    2. `LocalExpectation()`, if the values of all elements cost at most `budget` evaluations.
    3. `DisARM()`, at a binary site with a budget of at least 1.
    4. `CountDifference()`, at a site of at most `budget` single counts that share their cost.
    5. `StratifiedMixture()`, at a mixture all of whose components cost at most `budget` evaluations.
    6. `ScoreFunction(samples=budget + 1)`, with a budget of at least 1.
    7. The score function with the default baseline.

    `elbo.describe(...)` reports the choice and its reason.

    With `measure=True` the choice is made by measured time instead of by the budget. `elbo.measure(...)` measures the unbiased
    estimators that fit the site for `seconds`, as `choose_estimators` does, and this object stores the best one for each site
    in `measured`. In Pyro the first step measures automatically. In NumPyro, where time cannot be measured inside `jit`,
    `measure` must be called before `svi.init`. Until then `describe` shows the choice by the budget.

    Args:
        budget: the number of evaluations of the program for each site and step, 0 or more. Default: 2.
        measure: whether the choice is made by measurement. Default: False.
        seconds: the time to measure, in seconds, above 0. Default: 30.

    Attributes:
        measured: the best estimator of each site measured so far, by site name.

    Shapes:
        Those of the chosen estimator.

    Assumptions:
        Those of the chosen estimator, which documents them. Every possible choice is unbiased.

    Raises:
        ConfigurationError: if `budget` is negative, `measure` is not a bool, or `seconds` is not above 0; in NumPyro also if a
            gradient is requested before the measurement.

    Example:
        >>> Auto(budget=2).choose(SiteInfo("z", "Bernoulli", False, True, 1, categories=2), None)
        (LocalExpectation(), '1 evaluation for all values, within the budget of 2')

    References:
        The declarations of the estimators (`pplgrad estimators`).
    """

    budget: int = 2
    measure: bool = False
    seconds: float = 30.0
    measured: dict[str, Estimator] = field(default_factory=dict, init=False, repr=False, compare=False)
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="every distribution with a log density",
        evaluations="at most budget",
        differentiable_costs=False,
        derivatives=1,
        source="its choice",
    )
    uses_score: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.budget, int) or self.budget < 0:
            raise ConfigurationError(f"Auto(budget={self.budget!r}): give a number of evaluations, 0 or more.")
        if not isinstance(self.measure, bool):
            raise ConfigurationError(f"Auto(measure={self.measure!r}): write True or False.")
        if not self.seconds > 0:
            raise ConfigurationError(f"Auto(seconds={self.seconds!r}): give the time to measure in, such as 30.")

    def check(self, site: SiteInfo) -> None:
        """Accept every site."""

    def choose(self, site: SiteInfo, default: Estimator | None) -> tuple[Estimator, str]:
        """Return the estimator for a site and the reason; `default` is what an unconfigured site gets."""
        if site.name in self.measured:
            return self.measured[site.name], "the best of those measured on this program"
        if self.measure:
            found, why = self._by_budget(site, default)
            return found, f"{why} (not measured yet)"
        return self._by_budget(site, default)

    def _by_budget(self, site: SiteInfo, default: Estimator | None) -> tuple[Estimator, str]:
        if site.has_rsample:
            return Reparam(), "reparameterized sampler"
        if not site.scanned and site.categories is not None:
            cost = site.elements * (site.categories - 1)
            if cost <= self.budget:
                plural = "" if cost == 1 else "s"
                return (
                    LocalExpectation(),
                    f"{cost} evaluation{plural} for all values, within the budget of {self.budget}",
                )
            if site.categories == 2 and self.budget >= 1:
                return DisARM(), f"binary; all values would cost {cost} evaluations, above the budget of {self.budget}"
        if not site.scanned and site.is_count and site.elements <= self.budget:
            plural = "" if site.elements == 1 else "s"
            return (
                CountDifference(),
                f"{site.elements} evaluation{plural} at the next count, within the budget of {self.budget}",
            )
        if not site.scanned and site.components is not None:
            cost = site.elements * (site.components - 1)
            if cost <= self.budget:
                plural = "" if cost == 1 else "s"
                return (
                    StratifiedMixture(),
                    f"{cost} evaluation{plural} for all components, within the budget of {self.budget}",
                )
        if not site.scanned and self.budget >= 1:
            return ScoreFunction(
                samples=self.budget + 1
            ), f"{self.budget} further draws of the site, set against each other"
        return default or ScoreFunction(), "no evaluations to spend: the default"
