"""`choose_estimators`: an estimator for each site by measurement, with successive halving on variance × time and a confidence."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from pplgrad.baselines.leave_one_out import LeaveOneOut
from pplgrad.configuration import Resolved
from pplgrad.core.estimator import Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.diagnostics.code import code
from pplgrad.diagnostics.moments import Draws
from pplgrad.engine.description import aligned, html_table
from pplgrad.errors import ConfigurationError, PplgradError
from pplgrad.estimators.registry import every_estimator
from pplgrad.estimators.score import ScoreFunction

WARM_UP = 50
"""Steps in which a candidate learns what it learns, before it is measured."""
_FIRST = 40
"""Draws from which the first half of the candidates is dropped."""


Candidate = Callable[[Mapping[str, Estimator]], Draws]
"""From an estimator for each site to draws of the gradient."""


@dataclass(frozen=True)
class Probe(ScoreFunction):
    """An estimator that notes what it is told of each site."""

    seen: dict[str, SiteInfo] = field(default_factory=dict, compare=False)

    def check(self, site: SiteInfo) -> None:
        """Note the site."""
        self.seen[site.name] = site


def to_measure(
    resolved: Mapping[str, Resolved], sites: Mapping[str, SiteInfo], stateless: Collection[str] = ()
) -> tuple[dict[str, list[Estimator]], float]:
    """Return what each site's estimator is chosen from, and for how long: sites without `Auto(measure=True)` keep what they have.

    A site of `stateless` can keep nothing that an estimator learns.
    """
    autos = {name: found.measuring for name, found in resolved.items() if found.measuring is not None}
    if not autos:
        raise ConfigurationError("No site has Auto(measure=True), so that there is nothing to measure.")
    offered = candidates({name: sites[name] for name in autos}, None)
    for name in stateless:
        offered[name] = [estimator for estimator in offered.get(name, []) if not estimator.keeps_state]
    kept = {name: offered[name] if name in autos else [found.estimator] for name, found in resolved.items()}
    return kept, max(auto.seconds for auto in autos.values())


def keep(choice: Choice, resolved: Mapping[str, Resolved]) -> None:
    """Tell each `Auto(measure=True)` what was chosen for its sites."""
    for name, found in resolved.items():
        if found.measuring is not None:
            found.measuring.measured[name] = choice.estimators[name]


def candidates(sites: Mapping[str, SiteInfo], given: Sequence[Estimator] | None) -> dict[str, list[Estimator]]:
    """Return the unbiased estimators that fit each site: of those that are given, or of all."""
    for estimator in given or ():
        if not estimator.declaration.unbiased:
            raise ConfigurationError(
                f"{estimator!r} is biased, and choosing compares variances; `pplgrad compare` measures the bias as well."
            )
    offered = (
        list(given) if given is not None else [*_VARIANTS, *(e for e in every_estimator() if e.declaration.unbiased)]
    )
    result = {}
    for name, site in sites.items():
        fitting = []
        for estimator in offered:
            try:
                estimator.check(site)
            except PplgradError:
                continue
            if type(estimator).__name__ != "Auto" and estimator not in fitting:
                fitting.append(estimator)
        if not fitting:
            raise ConfigurationError(f"No candidate fits site '{name}' ({site.distribution}).")
        result[name] = fitting
    return result


OUT_OF_TIME = "not measured: out of time"
_VARIANTS = (ScoreFunction(LeaveOneOut()), ScoreFunction(samples=2), ScoreFunction(samples=4))


@dataclass
class Measured:
    """One configuration that is measured: its estimators, and the variance and time of its draws so far.

    The trace of the gradient's covariance is estimated by half the squared distance of two independent draws, whose mean it is.
    """

    estimators: dict[str, Estimator]
    halves: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def draws(self) -> int:
        """The number of draws so far."""
        return 2 * len(self.halves)

    @property
    def variance(self) -> float:
        """The trace of the gradient's covariance."""
        return float(np.mean(self.halves))

    @property
    def milliseconds(self) -> float:
        """The median time of a draw."""
        return 1e3 * float(np.median(self.seconds))

    @property
    def log_cost(self) -> tuple[float, float]:
        """The logarithm of variance × time, and its standard error."""
        if self.error is not None or len(self.halves) < 2:
            return math.inf, 0.0
        times = np.log(self.seconds)
        wobble = float(times.std()) / math.sqrt(len(times)) if len(times) > 1 else 0.3
        spread = float(np.std(self.halves, ddof=1)) / math.sqrt(len(self.halves)) / max(self.variance, 1e-300)
        return math.log(max(self.variance, 1e-300)) + math.log(self.milliseconds), math.hypot(spread, wobble)

    def add(self, chunks: Iterator[np.ndarray]) -> None:
        """Take in draws, and time them."""
        begin, last = time.perf_counter(), None
        for chunk in chunks:
            self.seconds.append((time.perf_counter() - begin) / len(chunk))
            for row in np.asarray(chunk, np.float64):
                if not np.isfinite(row).all():
                    self.error = "a gradient is not finite"
                    return
                if last is None:
                    last = row
                else:
                    self.halves.append(0.5 * float(((row - last) ** 2).sum()))
                    last = None
            begin = time.perf_counter()


@dataclass(frozen=True)
class Choice:
    """The estimators that `choose_estimators` has chosen, with a confidence and what was measured.

    `print` shows the table, and the text to paste into a program.

    Args:
        estimators: the chosen estimator of each site, for `config_estimators` or an ELBO.
        confidence: the probability that no other configuration that was measured has less variance × time.
        gain: variance × time of the next best configuration, as a multiple of that of the chosen one (the smallest over sites).
        table: a dict for each configuration, with draws, variance, time in milliseconds, their product, and a note if it was not measured.

    Shapes:
        The variance is tr Cov[g] of the flat gradient of the unconstrained parameters.

    Example:
        >>> from pplgrad import DisARM
        >>> Choice({"z": DisARM()}, confidence=0.99, gain=2.0, table=()).code
        'guide = config_estimators(guide, {"z": DisARM()})'
    """

    estimators: dict[str, Estimator]
    confidence: float
    gain: float
    table: tuple[dict[str, Any], ...] = field(repr=False)

    @property
    def unmeasured(self) -> int:
        """The number of configurations for which the time was too short."""
        return sum(row["note"] == OUT_OF_TIME for row in self.table)

    @property
    def code(self) -> str:
        """The configuration as Python code."""
        inside = ", ".join(f'"{name}": {code(estimator)}' for name, estimator in self.estimators.items())
        return f"guide = config_estimators(guide, {{{inside}}})"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and strings."""
        chosen = {name: code(estimator) for name, estimator in self.estimators.items()}
        return {
            "estimators": chosen,
            "code": self.code,
            "confidence": self.confidence,
            "gain": self.gain,
            "unmeasured": self.unmeasured,
            "table": list(self.table),
        }

    @property
    def summary(self) -> str:
        """How sure the choice is, in words."""
        sure = f"{100 * self.confidence:.0f}% sure; {self.gain:.2g} times as efficient as the next"
        if self.unmeasured:
            measured = len(self.table) - self.unmeasured
            sure += f", of the {measured} measured; time ran out before the other {self.unmeasured}, give more seconds"
        return f"chosen by measurement ({sure})"

    def lines(self) -> list[tuple[str, ...]]:
        """Return the table's heads and rows as text."""
        head = ("estimators", "draws", "variance", "ms", "variance × ms", "note")
        return [head, *(tuple(str(row[name]) for name in head) for row in self.table)]

    def __str__(self) -> str:
        return "\n".join([*aligned(self.lines()), "", f"# {self.summary}", self.code])

    def _repr_html_(self) -> str:
        return html_table(self.lines(), [self.summary, self.code])


def choose(
    draws_of: Candidate,
    offered: Mapping[str, Sequence[Estimator]],
    seconds: float,
    progress: Callable[[str], None] = lambda words: None,
) -> Choice:
    """Measure the candidates of one site after the other, the others held at the best so far; return the best.

    All candidates of a site are drawn in turns; after each round the worse half goes, until the time is over or two are
    left and known apart.
    """
    if not seconds > 0:
        raise ConfigurationError(f"seconds={seconds!r}: give the time to measure in, such as 30.")
    best = {name: found[0] for name, found in offered.items()}
    open_sites = {name: found for name, found in offered.items() if len(found) > 1}
    everything: dict[str, Measured] = {}
    seed = itertools.count()
    sure: dict[str, tuple[float, float]] = {}
    # What is best at a site may depend on what the others use: a second pass, and a third if that changed anything.
    passes = 1 if len(open_sites) == 1 else 3
    end = time.perf_counter() + seconds
    for number in range(passes):
        before = dict(best)
        for site, found in open_sites.items():
            runs = []
            for candidate in found:
                estimators = {**best, site: candidate}
                runs.append(everything.setdefault(repr(estimators), Measured(estimators)))
            share = seconds / (len(open_sites) * min(passes, 2))
            finalists = _halve(draws_of, runs, min(end, time.perf_counter() + share), seed, progress)
            best = finalists[0].estimators
            sure[site] = _sure(finalists) if len(finalists) > 1 else (1.0, math.inf)
        if number and (best == before or time.perf_counter() > end):
            break
    known = sorted(everything.values(), key=lambda run: run.log_cost[0])
    confidence, gain = (
        math.prod(one for one, _ in sure.values()),
        min((by for _, by in sure.values()), default=math.inf),
    )
    return Choice(best, confidence, gain, tuple(_row(run) for run in known))


def _halve(
    draws_of: Candidate, runs: list[Measured], end: float, seed: Any, progress: Callable[[str], None]
) -> list[Measured]:
    """Return the runs, best first, after rounds in which the worse half is dropped."""
    made: dict[int, Any] = {}
    racing = list(runs)
    while True:
        for run in racing:
            if time.perf_counter() > end and not run.draws and sum(other.draws > 0 for other in runs) >= 2:
                # Compiling takes its time as well.
                run.error = OUT_OF_TIME
            if run.error is None:
                progress(", ".join(code(estimator) for estimator in run.estimators.values()))
                _draw(draws_of, run, made, next(seed))
        racing = sorted((run for run in racing if run.error is None), key=lambda run: run.log_cost[0])
        if not racing:
            reasons = "; ".join(dict.fromkeys(str(run.error) for run in runs))
            raise ConfigurationError(f"No candidate can be measured: {reasons}")
        apart = len(racing) == 1 or _sure(racing)[0] > 0.99
        if time.perf_counter() > end or (len(racing) <= 2 and apart):
            return racing
        if len(racing) > 2:
            racing = racing[: max(2, len(racing) // 2)]


def _draw(draws_of: Candidate, run: Measured, made: dict[int, Any], seed: int) -> None:
    """Double a run's draws, in pieces that are timed; what cannot run says why."""
    count = max(_FIRST, run.draws)
    try:
        if id(run) not in made:
            made[id(run)] = draws_of(run.estimators)
            # The first call compiles, or finds the program's structure.
            for _ in made[id(run)](_FIRST, seed + 1_000_000):
                pass
        run.add(made[id(run)](count, seed))
    except PplgradError as error:
        run.error = str(error).splitlines()[0]


def _sure(runs: list[Measured]) -> tuple[float, float]:
    """Return the probability that the first is the best, and how many times the next costs."""
    (first, own), *others = [run.log_cost for run in runs]
    each = [NormalDist().cdf((cost - first) / max(math.hypot(own, error), 1e-9)) for cost, error in others]
    return min(each), math.exp(min(cost for cost, _ in others) - first)


def _row(run: Measured) -> dict[str, Any]:
    shown = ", ".join(f"{name}: {code(estimator)}" for name, estimator in run.estimators.items())
    if run.error is not None or run.draws < 4:
        return {
            "estimators": shown,
            "draws": run.draws,
            "variance": "",
            "ms": "",
            "variance × ms": "",
            "note": run.error or "not measured",
        }
    cost = run.variance * run.milliseconds
    numbers = {"variance": f"{run.variance:.3g}", "ms": f"{run.milliseconds:.3g}", "variance × ms": f"{cost:.3g}"}
    return {"estimators": shown, "draws": run.draws, **numbers, "note": ""}
