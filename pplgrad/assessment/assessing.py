"""`assess_fit`, for either library: what is asked of the program, and what the parts decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pplgrad.assessment.calibration import Calibration, Ranked, Simulation, calibrations
from pplgrad.assessment.collapse import collapses
from pplgrad.assessment.draws import Draws, Values
from pplgrad.assessment.enumeration import exact_evidence
from pplgrad.assessment.gathering import refuse_without_latents
from pplgrad.assessment.masks import spread
from pplgrad.assessment.predictive import Check, PredictiveCheck, predictive_checks
from pplgrad.assessment.result import Assessment, Verdict
from pplgrad.assessment.weights import Bracket, bracket, effective_sizes, ends, evidence, k_limit, tail_shapes
from pplgrad.errors import ConfigurationError, ProgramError

_LEAST_SIZE = 0.1
"""The relative effective sample size below which weights of few values are poor."""


@dataclass(frozen=True)
class Plan:
    """How much is spent on an assessment, and what is asked."""

    samples: int = 1000
    replicates: int = 1000
    simulations: int = 0
    rank_draws: int = 99
    level: float = 0.01
    tolerated: float = 0.05
    outcomes: int = 4096
    seed: int = 0
    checks: Mapping[str, Check] = field(default_factory=dict)
    dream: Callable[..., tuple] | None = None
    refit: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        least = {"samples": 100, "replicates": 0, "simulations": 0, "rank_draws": 9, "outcomes": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigurationError(f"{name}={value!r}: assess_fit takes a whole number, {low} or more.")
        if 0 < self.simulations < 20:
            raise ConfigurationError(
                f"simulations={self.simulations}: the ranks of so few say nothing; give 20 or more, or 0 for no calibration."
            )
        if not 0 < self.level < 1:
            raise ConfigurationError(
                f"level={self.level!r}: the rate of false alarms is between 0 and 1, such as 0.01."
            )
        if not 0 <= self.tolerated < 1:
            raise ConfigurationError(f"tolerated={self.tolerated!r}: give a share of the data, such as 0.05.")
        if not isinstance(self.checks, Mapping) or not all(callable(check) for check in self.checks.values()):
            raise ConfigurationError(
                'checks= takes a mapping from names to functions, such as {"largest": lambda data: data["x"].max()}.'
            )


class Host(Protocol):
    """What a plug-in tells of a program."""

    def draws(self, count: int) -> Draws:
        """Return draws of the guide with their densities, or refuse the program."""

    def log_joint(self, values: Values) -> np.ndarray:
        """Return log p of each element of the plates at given values of all latents, without what no draw changes beside them."""

    def replicates(self, draws: Draws, count: int) -> dict[str, np.ndarray]:
        """Return data that the model draws with the guide's latents, (count, *value), for each observed site that can be drawn."""

    def simulations(self, draws: Draws, plan: Plan) -> Iterator[Simulation]:
        """Return latents and data of the model, with the guide's draws for these data."""


def assess(host: Host, plan: Plan, progress: Callable[[str], None] = lambda words: None) -> Assessment:
    """Return the assessment of a program at its present parameters."""
    progress("importance weights")
    draws = host.draws(plan.samples)
    refuse(draws)
    weights = draws.flat
    khat, sizes = tail_shapes(weights), effective_sizes(weights)
    limit = k_limit(plan.samples)
    poor = np.where(np.isnan(khat), sizes < _LEAST_SIZE, khat > limit)
    progress("evidence")
    exact, why_not = exact_evidence(draws, host.log_joint, plan.outcomes)
    shape = tuple(size for _, size in draws.plates)
    known = evidence(weights, draws.beside, plan.level, exact, why_not, shape)
    progress("posterior predictive")
    replicates = host.replicates(draws, min(plan.replicates, plan.samples)) if plan.replicates else {}
    checks, checks_p = predictive_checks(draws.observed, replicates, plan.checks)
    calibration: tuple[Calibration, ...] = ()
    simulated = None
    if plan.simulations:
        progress("calibration")
        calibration, simulated = _calibrated(host, draws, plan)
    return Assessment(
        samples=plan.samples,
        level=plan.level,
        plates=tuple(name for name, _ in draws.plates),
        khat=khat.reshape(shape),
        khat_limit=limit,
        ess=sizes.reshape(shape),
        poor=poor.reshape(shape),
        evidence=known,
        simulated=simulated,
        checks=checks,
        checks_p=checks_p,
        calibration=calibration,
        collapse=collapses(draws),
        verdicts=(
            _of_weights(poor, khat, sizes, limit, plan, bool(draws.plates)),
            _of_checks(checks, checks_p, plan.level),
            _of_calibration(calibration, plan.level),
        ),
        _draws=draws,
        _replicates=replicates,
    )


def refuse(draws: Draws) -> None:
    """Refuse draws whose weights mean nothing."""
    refuse_without_latents(draws.latents)
    several = any(not x.point for x in draws.latents.values())
    for name, latent in draws.latents.items():
        if latent.point and not latent.auxiliary and (not several or (latent.values == latent.values[:1]).all()):
            raise ProgramError(
                f"Site '{name}' of the guide is a point mass (Delta), which has no density, so that its draws have no importance weights; "
                "fit a guide with a density there, such as AutoNormal."
            )
    if np.isnan(draws.log_weights).any() or (draws.log_weights == np.inf).any():
        raise ProgramError(
            "An importance weight is NaN or infinite; TraceGrad_ELBO().diagnose(...) names the site whose density is not finite."
        )


def _calibrated(host: Host, draws: Draws, plan: Plan) -> tuple[tuple[Calibration, ...], Bracket | None]:
    """Return the calibration, and the bracket of the simulated data's evidence."""
    plates = {name for name, _ in draws.plates}
    sites = {}
    for name, x in draws.latents.items():
        pooled, pooled_log_q = (
            tuple(i for i, axis in enumerate(axes) if axis in plates) for axes in (x.axes, x.element_axes)
        )
        counted = None
        if x.mask is not None:
            counted = spread(x.mask, x.values.shape[1:], x.mask.ndim)
        sites[name] = Ranked(pooled, pooled_log_q, counted, x.mask)
    found: list[tuple[float, float]] = []

    def simulations() -> Iterator[Simulation]:
        for one in host.simulations(draws, plan):
            if one.draws_log_weights is not None and one.truth_log_weights is not None:
                found.append(ends(one.draws_log_weights, one.truth_log_weights))
            yield one

    return calibrations(simulations(), sites, plan.seed, plan.level), bracket(found)


def _of_weights(
    poor: np.ndarray, khat: np.ndarray, sizes: np.ndarray, limit: float, plan: Plan, several: bool
) -> Verdict:
    share, count = float(poor.mean()), int(np.count_nonzero(poor))
    status = "failed" if share > plan.tolerated else "passed"
    if not several:
        what = f"Pareto k is {khat[0]:.2f}" if np.isfinite(khat[0]) else f"the relative ESS is {sizes[0]:.2g}"
        against = f"above {limit:.2f}" if status == "failed" else f"at most {limit:.2f}"
        if not np.isfinite(khat[0]):
            against = f"below {_LEAST_SIZE}" if status == "failed" else f"at least {_LEAST_SIZE}"
        return Verdict("weights", status, f"{what}, {against}")
    if status == "passed" and not count:
        return Verdict("weights", status, f"importance weights are good for all {len(poor):,} data")
    return Verdict("weights", status, f"importance weights are poor for {count:,} of {len(poor):,} data ({share:.0%})")


def _of_checks(checks: tuple[PredictiveCheck, ...], p: float, level: float) -> Verdict:
    if not checks:
        return Verdict("predictive checks", "not asked", "no observed site can be drawn again")
    worst = min(checks, key=lambda x: x.p)
    if p < level:
        return Verdict(
            "predictive checks",
            "failed",
            f"'{worst.name}' of the data is {worst.observed:.4g}, and of 95% of the replicates {worst.low:.4g} to {worst.high:.4g}",
        )
    return Verdict("predictive checks", "passed", f"{len(checks)} predictive checks find nothing")


def _of_calibration(calibration: tuple[Calibration, ...], level: float) -> Verdict:
    if not calibration:
        return Verdict("calibration", "not asked", "simulations=0")
    wrong = [x for x in calibration if x.p < level]
    if wrong:
        worst = min(wrong, key=lambda x: x.p)
        # What is wrong with a value is said in plainer words than what is wrong with its density.
        worst = min((x for x in wrong if x.quantity == "value"), key=lambda x: x.p, default=worst)
        words = f"draws of site '{worst.site}' are {worst.shape} for data that the model simulates"
        if worst.quantity != "value":
            words = f"site '{worst.site}' has not the posterior's probabilities for data that the model simulates"
        return Verdict("calibration", "failed", words)
    count = len({x.site for x in calibration})
    return Verdict("calibration", "passed", f"ranks of {count} latent site(s) are uniform")
