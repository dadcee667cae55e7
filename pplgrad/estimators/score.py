"""The score-function estimator (REINFORCE, the log-derivative trick)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array
from pplgrad.core.baseline import Baseline, parts_of
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, GroupTerms
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.every_draw import WithDrawsAlike
from pplgrad.estimators.site_requirements import require_steps


@dataclass(frozen=True, repr=False)
class ScoreFunction(WithDrawsAlike):
    r"""The score-function gradient (REINFORCE, the log-derivative trick), with a baseline or with several draws of the site.

    Estimates ∇θ E_q[f(z)] = E_q[(f(z) − b) ∇θ log q(z)]. f is the site's downstream cost: the sum of the scaled and masked log densities
    that depend on the site, reduced to the site's plates. b is the baseline. log q itself is neither scaled nor masked, and carries
    gradient to the parameters of reparameterized parents as well.

    With `samples=k` the site is drawn k times at the same parents, and the baseline of each draw is the mean cost of the others:
    E[1/(k − 1) Σ_i (f_i − f̄) ∇θ log q(z_i)], where f̄ is the mean of the k costs, at k − 1 further evaluations (also known as
    VarGrad).

    Args:
        baseline: the baseline b, or a sum of baselines; None subtracts nothing. Only with `samples=1`. Default: None.
        samples: the number k of draws of the site, including the program's own; at least 1. Default: 1.
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any distribution with a `log_prob`. Elements of a plate are credited individually. Batch dimensions that no plate declares, and
        event dimensions, are credited jointly. Costs and baselines are in nats.

    Assumptions:
        log q is differentiable in the parameters at almost every draw. The support of q does not depend on the parameters; otherwise
        E[∇ log q] = 0 fails, as for a Uniform with a learned bound. A support whose bounds carry gradient is refused. The variance of
        f ∇ log q is finite. f itself may be discontinuous. A baseline must not depend on the draw.

    Raises:
        ConfigurationError: if `baseline` is not a `Baseline`, `samples` is below 1, or `samples` above 1 comes with a baseline; if
            `differentiate="all"` comes with one draw.
        BaselineError: from the baseline's own checks.
        EstimatorError: with `samples` above 1 on a site drawn inside a `scan` in the body of another one; on a site whose support depends on a
            parameter.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.

    Example:
        >>> from pplgrad import LeaveOneOut
        >>> ScoreFunction(baseline=LeaveOneOut())
        ScoreFunction(baseline=LeaveOneOut())

    References:
        Williams (1992), theorem 1.
        Mohamed, Rosca, Figurnov and Mnih (2020), equation 13.
        Schulman et al. (2015), theorem 1, for the downstream cost.
        Kool, van Hoof and Welling (2019), equation 8, for `samples`.
        Richter, Boustati, Nüsken, Ruiz and Akyildiz (2020), equation 8, for `samples`.
    """

    baseline: Baseline | None = None
    samples: int = 1

    uses_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline is not None and not isinstance(self.baseline, Baseline):
            raise ConfigurationError(
                f"ScoreFunction(baseline={self.baseline!r}): a baseline is an object such as Constant(0.0), "
                "LeaveOneOut() or DecayingAverage(0.9), or a sum of them."
            )
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ConfigurationError(f"ScoreFunction(samples={self.samples!r}): give the number of draws, 1 or more.")
        if self.samples == 1 and self.differentiates_all:
            raise ConfigurationError(
                "ScoreFunction(differentiate='all'): the site has one draw, at which the costs are differentiated in any case; give "
                "samples=2 or more, or drop differentiate."
            )
        if self.samples > 1 and self.baseline is not None:
            raise ConfigurationError(
                f"ScoreFunction({self.baseline!r}, samples={self.samples}): several draws of a site are set against each "
                "other; drop the baseline, or use samples=1 with it."
            )

    def __repr__(self) -> str:
        given = [f"baseline={self.baseline!r}"] if self.baseline is not None else []
        given += [f"samples={self.samples}"] if self.samples > 1 else []
        given += [f"differentiate={self.differentiate!r}"] if self.differentiates_all else []
        return f"ScoreFunction({', '.join(given)})"

    @property
    def declaration(self) -> Declaration:  # type: ignore[override]
        """The declaration; derivatives of every order are right with one draw and a baseline that does not normalise."""
        normalized = any(part.normalizes for part in parts_of(self.baseline))
        return Declaration(
            unbiased=True,
            supports="every distribution with a log density",
            evaluations="samples − 1",
            differentiable_costs=False,
            derivatives=1 if self.samples > 1 or normalized else None,
            source="Williams 1992",
        )

    @property
    def uses_branches(self) -> bool:  # type: ignore[override]
        """Return True with several draws of the site."""
        return self.samples > 1

    @property
    def num_resamples(self) -> int:
        """Return the number of further draws."""
        return self.samples - 1

    def check(self, site: SiteInfo) -> None:
        """Let the baseline refuse a site that it does not fit."""
        if self.baseline is not None:
            self.baseline.check(site)
        if self.samples > 1:
            require_steps(self, site)

    def surrogate(self, terms: GroupTerms) -> tuple[Array, Array | None]:
        """Return Σ log q · (downstream − baseline), summed over particles and elements, and the baseline's loss."""
        signal, loss = terms.downstream, None
        if self.baseline is not None:
            value = terms.evaluate(self.baseline)
            signal, loss = value.signal, value.loss
        xp, ops = terms.ops.xp, terms.ops
        if terms.higher_order:
            # Its derivatives of every order have mean zero, since those of E[1] are zero.
            detached = ops.stop_gradient(terms.downstream - signal)
            return xp.sum(detached * (1 - xp.exp(terms.log_prob - ops.stop_gradient(terms.log_prob)))), loss
        return xp.sum(terms.log_prob * ops.stop_gradient(signal)), loss

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the further draws."""
        return Alternatives(*draw.again(self.samples - 1))

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return 1/(k − 1) Σ_i (f_i − f̄) log q(z_i)."""
        xp = terms.ops.xp
        costs = xp.concat([terms.downstream[:, None], terms.costs], axis=1)
        log_q = xp.concat([terms.draw.score[:, None], terms.alternatives.kept], axis=1)
        centred = costs - xp.mean(costs, axis=1, keepdims=True)
        return xp.sum(log_q * centred) / (self.samples - 1)
