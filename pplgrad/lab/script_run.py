"""The pieces of a study, the same in both libraries; `run_pyro.py` and `run_numpyro.py` add what a library does by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from pplgrad import ELBO, IWAE, Assessment, EarlyStopping, ScoreFunction
from pplgrad.core.estimator import Estimator
from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.checking import trusted
from pplgrad.diagnostics.choosing import Choice
from pplgrad.errors import ProgramError, UnmatchedNameError
from pplgrad.lab import measure
from pplgrad.lab.checkpoint import Checkpoint
from pplgrad.lab.data import Batches, evaluation_steps, packed, total_variance, unpacked
from pplgrad.lab.faults import LOOKS, Diverged, Lines, check_finite
from pplgrad.lab.rows import Data, count, mapped, taken
from pplgrad.lab.script import Script
from pplgrad.lab.specs import Specification, host_elbo, judged_by, objective, specification
from pplgrad.lab.tasks import Result, Task

MOST_ROWS = 100_000
"""Data times particles at a point of a curve; many data need fewer particles, and would not fit in memory with as many."""
At = Callable[[int, float], bool | None]
"""What training calls at its stops, with the step and the seconds so far; whether training is to end there."""


class ScriptRun(ABC):
    """A script's program with a batch stream, at parameters that training moves.

    The pieces of a study are `training`, `snapshots`, `reference` and `gradients`; each returns what is kept as JSON.
    """

    backend: ClassVar[str]
    host: ClassVar[Any]
    """The module that holds the library's own ELBOs."""

    def __init__(self, task: Task, script: Script) -> None:
        self.task, self.script = task, script
        script.made["run"] = self
        self.checkpoint = Checkpoint()
        self.batches = Batches(task, script)
        self.model, self.guide = script.program(self.backend, task.options, self.batches.train, task.seed)
        self.chosen = specification(task.estimator)
        mapping = self.chosen.mapping(script.discrete, script.baseline_inputs)
        self.configured = self.with_estimators(mapping)
        self.named = set(mapping)
        """The names and patterns that estimators are given for."""
        parts = ("train", "test") if self.batches.validation is None else ("train", "test", "validation")
        self.fixed = {which: mapped(self.array, self.batches.fixed(which)) for which in parts}
        self.batch = taken(self.fixed["train"], slice(self.batches.size))
        self.hard = dict.fromkeys(script.discrete, ScoreFunction())

    def keep_in(self, path: Path) -> None:
        """Keep training in a file at its stops, and go on from what is there."""
        self.checkpoint = Checkpoint(path)

    # The pieces of a study.

    def training(self, needs: dict[str, Result]) -> Result:
        """Train under one estimator; return its curve, its gradient's variance at the end, and its time."""
        known = self.task.settings
        curve: list[dict[str, Any]] = self.checkpoint.progress.setdefault("curve", [])
        stopping = EarlyStopping(known["patience"], known["minimum_change"]) if known.get("patience") else None
        if stopping is not None:
            for point in curve:
                stopping.update(point["validation"])

        def at(step: int, seconds: float) -> bool:
            curve.append(measure.curve_point(step, seconds, self.bound))
            if stopping is not None:
                curve[-1]["validation"] = self.bound("validation")
            if not np.isfinite([value for name, value in curve[-1].items() if name != "seconds"]).all():
                self.explain(step)
            return stopping is not None and stopping.update(curve[-1]["validation"])

        seconds = self.train(evaluation_steps(known["steps"], known["points"]), at)
        result: Result = {"curve": curve, "milliseconds": 1e3 * float(np.median(seconds))}
        if stopping is not None:
            result |= {"stopped": stopping.stopped, "best_step": curve[stopping.best_update]["step"]}
        if known["gradient_draws"] and (variance := self._gradient_variance(known["gradient_draws"])) is not None:
            result["gradient_variance"] = variance
        if known["bound_samples"] and judged_by(self.task.objective) == ELBO():
            result["weighted_bound"] = self.weighted_bound(known["bound_samples"])
        return result

    def snapshots(self, needs: dict[str, Result]) -> Result:
        """Train, and keep the parameters at some steps."""
        kept: dict[str, str] = self.checkpoint.progress.setdefault("snapshots", {})

        def at(step: int, seconds: float) -> None:
            if not self.finite():
                self.explain(step)
            kept[str(step)] = packed(self.unconstrained())

        self.train(sorted(self.task.settings["snapshots"]), at)
        return {"snapshots": kept}

    def reference(self, needs: dict[str, Result]) -> Result:
        """Return the gradient at the snapshots, by the mean of an unbiased estimator."""
        target, settings = objective(self.task.objective), self.task.settings
        particles, sites = trusted(target, self.task.particles, 10)
        elbo = self.make_elbo(particles, estimators=sites, objective=target)
        return {
            "references": {
                step: packed(measure.reference(host, elbo, settings["draws"], self.task.seed))
                for step, host in self.at_snapshots(self.guide, _arrays(needs))
            }
        }

    def gradients(self, needs: dict[str, Result]) -> Result:
        """Measure one estimator at the snapshots."""
        settings, found = self.task.settings, {}
        for step, host in self.at_snapshots(self.configured, _arrays(needs)):
            sites = host.sites()
            if self.chosen.learns:
                host.warm_up(self.elbo, settings["warm_up"])
            wanted = unpacked(needs["reference"]["references"][step])
            found[step] = measure.gradients(
                host, self.elbo, sites, wanted, settings["draws"], self.batches.size, self.task.seed + 1
            )
            evaluations = measure.evaluations(self.elbo, self.describe(self.elbo, host))
        return {"snapshots": found, "evaluations": evaluations}

    # What the command line asks.

    def certificates(
        self, words: tuple[str, ...], elbos: tuple[str, ...], budget: dict[str, Any]
    ) -> Iterator[tuple[str, Callable[[], GradientCheck]]]:
        """Yield the name and what gives a certificate, for each estimator and each ELBO of the library, at the parameters that the task's training leaves."""
        self.trained()
        for word in words:
            chosen = specification(word)
            mapping = chosen.mapping(self.script.discrete, self.script.baseline_inputs)
            self.named |= set(mapping)
            particles = chosen.particles or self.task.particles
            elbo = self.make_elbo(particles, chosen, estimators=mapping, objective=objective(self.task.objective))
            yield word, partial(self.check, self.with_estimators(mapping), elbo, budget)
        for name in elbos:
            yield name, partial(self.check, self.guide, host_elbo(self.host, name, self.task.particles), budget)

    def choice(self, candidates: list[Estimator] | None, seconds: float) -> Choice:
        """Return the choice of estimators, at the parameters that the task's training leaves."""
        self.refuse_unknown_names()
        self.trained()
        return self.choose(
            seconds=seconds,
            candidates=candidates,
            num_particles=self.task.particles,
            objective=objective(self.task.objective),
            seed=self.task.seed,
        )

    def assessment(self, which: str, **options: Any) -> Assessment:
        """Return whether the guide fits a batch of the train or of the test data, at the parameters that the task's training leaves."""
        self.refuse_unknown_names()
        self.trained()
        return self.assess(taken(self.fixed[which], slice(self.batches.size)), **options)

    def look(self) -> None:
        """Run the program a few times at its present parameters; raise the error that names a site or a parameter which is not finite."""
        check_finite(self.parameters())
        elbo = self.make_elbo(2, estimators={"*": ScoreFunction()}, objective=objective(self.task.objective))
        for seed in range(LOOKS):
            self.diagnose(elbo, seed)

    def refuse_unknown_names(self) -> None:
        """Refuse a name in the script's DISCRETE that the program does not have; whatever else is wrong is told where it matters."""
        elbo = self.make_elbo(2, estimators=self.hard, objective=objective(self.task.objective))
        try:
            self.diagnose(elbo, self.task.seed)
        except UnmatchedNameError:
            raise
        except Exception:
            return

    def explain(self, step: int) -> NoReturn:
        """Say why the objective is not finite: the program from the start, or training under this estimator."""
        self.look_at_start(step)
        raise Diverged(f"the objective is not finite after {step} steps; lower the learning rate")

    def trained(self) -> None:
        """Take the task's training steps, if there are any."""
        if steps := self.task.settings["steps"]:
            self.train([steps], lambda step, seconds: None)
            if not self.finite():
                self.explain(steps)

    # What several pieces use.

    @cached_property
    def elbo(self) -> Any:
        """The task's ELBO; the estimators are on the guide."""
        particles = self.chosen.particles or self.task.particles
        return self.make_elbo(particles, self.chosen, objective=objective(self.task.objective))

    def judge(self, data: Data) -> Any:
        """Return the ELBO whose loss curves show: at hard draws, a relaxation having an objective of its own."""
        particles = min(10, max(1, MOST_ROWS // count(data)))
        return self.make_elbo(particles, estimators=self.hard, objective=judged_by(self.task.objective))

    def weighted_bound(self, samples: int) -> float:
        """Return the importance-weighted bound per test datum; one weight for the whole program where data share a latent."""
        for plates in (None, ()):
            elbo = self.make_elbo(samples, estimators=self.hard, objective=IWAE(plates=plates))
            try:
                return -self.test_loss(elbo) / count(self.fixed["test"])
            except ProgramError:
                if plates == ():
                    raise
        raise AssertionError

    def _gradient_variance(self, draws: int) -> float | None:
        """Return the trace of the covariance of the guide's gradient of the loss per datum; None if it has no parameters."""
        batch = mapped(self.array, self.batches.next())
        names = self.guide_parameters(batch)
        with self.at_present(batch) as host:
            inside = [indices for name, indices in host.blocks.items() if name in names]
            if not inside:
                return None
            rows = np.concatenate(list(host.draws(self.elbo)(draws, self.task.seed + 2)))
        return total_variance(rows[:, np.concatenate(inside)].astype(float) / count(batch))

    # What a library does by itself.

    @abstractmethod
    def array(self, data: np.ndarray) -> Any:
        """Return data as the library's array."""

    @abstractmethod
    def with_estimators(self, mapping: dict[str, Estimator]) -> Callable:
        """Return the guide with estimators at its sites."""

    @abstractmethod
    def make_elbo(self, particles: int, chosen: Specification | None = None, **options: Any) -> Any:
        """Return an ELBO; `chosen` says what its estimators will be."""

    @abstractmethod
    def train(self, stops: list[int], at: At) -> list[float]:
        """Train until the last stop, or until `at`, called at each, says so; return the seconds that steps took.

        At each stop the checkpoint keeps the training, which goes on from there where it was killed.
        """

    @abstractmethod
    def bound(self, which: str) -> float:
        """Return the evidence lower bound (or the reward) per datum at hard draws, from draws of its own."""

    @abstractmethod
    def test_loss(self, elbo: Any) -> float:
        """Return an ELBO's loss on the test data, from draws of its own."""

    @abstractmethod
    def parameters(self) -> dict[str, np.ndarray]:
        """Return the parameters that the program reads."""

    @abstractmethod
    def finite(self) -> bool:
        """Return whether all parameters are finite, the baselines' among them."""

    @abstractmethod
    def unconstrained(self) -> dict[str, np.ndarray]:
        """Return the program's parameters as the optimizer sees them."""

    @abstractmethod
    def guide_parameters(self, batch: Any) -> set[str]:
        """Return the names of the parameters that the guide registers."""

    @abstractmethod
    def at_present(self, batch: Any) -> Any:
        """Return a context that gives the gradient at the present parameters."""

    @abstractmethod
    def at_snapshots(self, guide: Callable, kept: dict[str, dict[str, np.ndarray]]) -> Iterator[tuple[str, Any]]:
        """Yield each snapshot's step and the gradient at its parameters, on the batch that all estimators see."""

    @abstractmethod
    def describe(self, elbo: Any, host: Any) -> Any:
        """Return what the ELBO says of the configured program."""

    @abstractmethod
    def check(self, guide: Callable, elbo: Any, budget: dict[str, Any]) -> GradientCheck:
        """Return the certificate of an ELBO at the present parameters."""

    @abstractmethod
    def choose(self, **options: Any) -> Choice:
        """Return the choice of estimators at the present parameters."""

    @abstractmethod
    def assess(self, batch: Any, **options: Any) -> Assessment:
        """Return the assessment of the guide at the present parameters."""

    @abstractmethod
    def diagnose(self, elbo: Any, seed: int) -> None:
        """Estimate once, with every check of densities on."""

    @abstractmethod
    def look_at_start(self, step: int) -> None:
        """Look for what was wrong before training, if step `step` can still tell."""

    @abstractmethod
    def lines(self) -> Lines:
        """Return where the sites of the guide and of the model stand in the script, as far as they run."""


def _arrays(needs: dict[str, Result]) -> dict[str, dict[str, np.ndarray]]:
    return {step: unpacked(values) for step, values in needs["snapshots"]["snapshots"].items()}
