"""The score-function estimator (REINFORCE, the log-derivative trick)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pplgrad.baselines.base import Baseline
from pplgrad.engine.ops import Array
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.base import Declaration, Estimator, GroupTerms, SiteInfo


@dataclass(frozen=True)
class ScoreFunction(Estimator):
    r"""The score-function gradient with a baseline.

    Estimates ∇θ E_q[f(z)] = E_q[(f(z) − b) ∇θ log q(z)], where f is the site's downstream cost: the sum of the
    scaled and masked log densities that depend on the site, reduced to the site's plates. log q itself is neither
    scaled nor masked, and carries gradient to the parameters of reparameterized parents as well.

    Shapes: any distribution with a `log_prob`. Elements of a plate are credited one by one; batch dimensions
    that no plate declares, and event dimensions, are credited jointly. Costs and baselines are in nats.

    Raises `ConfigurationError` if `baseline` is not a `Baseline`, `BaselineError` from the baseline's own checks.

    >>> from pplgrad import LeaveOneOut
    >>> ScoreFunction(baseline=LeaveOneOut())
    ScoreFunction(baseline=LeaveOneOut())

    Source: Williams (1992), theorem 1; Mohamed, Rosca, Figurnov and Mnih (2020), equation 13; the downstream
    cost: Schulman et al. (2015), theorem 1.
    """

    baseline: Baseline | None = None

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="every distribution with a log density",
        evaluations=0,
        differentiable_costs=False,
        derivatives=1,
        source="Williams 1992",
    )
    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.baseline is not None and not isinstance(self.baseline, Baseline):
            raise ConfigurationError(
                f"ScoreFunction(baseline={self.baseline!r}): a baseline is an object such as Constant(0.0), "
                "LeaveOneOut() or DecayingAverage(0.9), or a sum of them."
            )

    def check(self, site: SiteInfo) -> None:
        """Let the baseline refuse a site that it does not fit."""
        if self.baseline is not None:
            self.baseline.check(site)

    def surrogate(self, terms: GroupTerms) -> tuple[Array, Array | None]:
        """Return Σ log q · (downstream − baseline), summed over particles and elements, and the baseline's loss."""
        signal, loss = terms.downstream, None
        if self.baseline is not None:
            value = terms.evaluate(self.baseline)
            signal, loss = value.signal, value.loss
        xp = terms.ops.xp
        return xp.sum(terms.log_prob * terms.ops.stop_gradient(signal)), loss
