"""The pieces of a study in Pyro."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import SGD, Adam

from pplgrad import ELBO, IWAE, ScoreFunction
from pplgrad.core.estimator import Estimator
from pplgrad.core.program import Program
from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.checking import trusted
from pplgrad.diagnostics.choosing import Choice
from pplgrad.errors import ImpossibleValueError, ProgramError
from pplgrad.lab import measure
from pplgrad.lab.data import Batches, evaluation_steps, packed, total_variance, unpacked
from pplgrad.lab.faults import LOOKS, Diverged, Lines, caller_line, check_finite
from pplgrad.lab.script import Script, check_parameters
from pplgrad.lab.specs import Specification, host_elbo, judged_by, objective, specification
from pplgrad.lab.tasks import Result, Task
from pplgrad.pyro import TraceGrad_ELBO, check_gradients, choose_estimators, config_estimators, split_optimizer
from pplgrad.pyro.diagnostics import Gradients


class ScriptProgram:
    """A script's program with a batch stream, and the ELBOs of a task."""

    def __init__(self, task: Task, script: Script) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(task.seed)
        self.task, self.script = task, script
        script.made["run"] = self
        self.batches = Batches(task, script)
        self.model, self.guide = script.program("pyro", task.options, self.batches.train, task.seed)
        self.chosen = specification(task.estimator)
        self.mapping = self.chosen.mapping(script.discrete, script.baseline_inputs)
        self.fixed = {which: torch.from_numpy(self.batches.fixed(which)) for which in ("train", "test")}
        self.nesting = _plate_nesting(self.model, self.guide, self.fixed["train"][: self.batches.size])
        self.hard = dict.fromkeys(script.discrete, ScoreFunction())

    def elbo(self) -> TraceGrad_ELBO:
        """Return the task's ELBO; the estimators are on the guide, or given to it."""
        particles = self.chosen.particles or self.task.particles
        return self.made(particles, together(particles, self.chosen), objective=objective(self.task.objective))

    def made(self, particles: int, vectorize_particles: bool = True, **others: Any) -> TraceGrad_ELBO:
        """Return an ELBO."""
        return TraceGrad_ELBO(
            particles, vectorize_particles=vectorize_particles, max_plate_nesting=self.nesting, **others
        )

    def bound(self, which: str, particles: int) -> float:
        """Return the evidence lower bound (or the reward) per datum at hard draws, from draws of its own."""
        # A relaxation has an objective of its own; what is compared is the bound at hard draws.
        evaluate = self.made(particles, estimators=self.hard, objective=judged_by(self.task.objective))
        # Evaluation draws from a stream of its own, so that it does not move the training's.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.task.seed + 1)
            return -evaluate.loss(self.model, self.guide, self.fixed[which]) / len(self.fixed[which])

    def weighted_bound(self, samples: int) -> float:
        """Return the importance-weighted bound per test datum; one weight for the whole program where data share a latent."""
        for plates in (None, ()):
            evaluate = self.made(samples, estimators=self.hard, objective=IWAE(plates=plates))
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    torch.manual_seed(self.task.seed + 1)
                    parts = self.fixed["test"].split(len(self.fixed["test"]) if self.script.whole_data else 100)
                    return -sum(evaluate.loss(self.model, self.guide, x) for x in parts) / len(self.fixed["test"])
            except ProgramError:
                if plates == ():
                    raise
        raise AssertionError


def training(task: Task, script: Script, needs: dict[str, Result]) -> Result:
    """Train under one estimator; return its curve, its gradient's variance at the end, and its time."""
    run = ScriptProgram(task, script)
    known = task.settings
    curve: list[dict[str, float]] = []

    def at(step: int, seconds: float) -> None:
        curve.append(measure.curve_point(step, seconds, lambda which: run.bound(which, 10)))
        if not np.isfinite([curve[-1]["train"], curve[-1]["test"]]).all():
            _explain(run, step)

    stops = evaluation_steps(known["steps"], known["points"])
    seconds, elbo, guide = _train(run, known["steps"], known, stops, at)
    result: Result = {"curve": curve, "milliseconds": 1e3 * float(np.median(seconds[3:] or seconds))}
    if known["gradient_draws"] and (variance := _gradient_variance(run, elbo, guide)) is not None:
        result["gradient_variance"] = variance
    if known["bound_samples"] and judged_by(task.objective) == ELBO():
        result["weighted_bound"] = run.weighted_bound(known["bound_samples"])
    return result


def snapshots(task: Task, script: Script, needs: dict[str, Result]) -> Result:
    """Train, and keep the parameters at some steps, and one batch."""
    run = ScriptProgram(task, script)
    kept: dict[str, str] = {}
    batch = run.batches.fixed("train")[: run.batches.size]

    def at(step: int, seconds: float) -> None:
        if not _finite():
            _explain(run, step)
        with Gradients(Program(run.model, run.guide, (torch.from_numpy(batch),), {})) as host:
            kept[str(step)] = packed({name: leaf.detach().cpu().numpy() for name, leaf in host.leaves.items()})

    _train(run, max(task.settings["snapshots"]), task.settings, task.settings["snapshots"], at)
    return {"snapshots": kept}


def reference(task: Task, script: Script, needs: dict[str, Result]) -> Result:
    """Return the gradient at a snapshot, by the mean of an unbiased estimator."""
    run = ScriptProgram(task, script)
    target = objective(task.objective)
    particles, sites = trusted(target, task.particles, 10)
    elbo = run.made(particles, estimators=sites, objective=target)
    found = {}
    for step, values in needs["snapshots"]["snapshots"].items():
        with _host(run, run.guide, values) as host:
            found[step] = packed(measure.reference(host, elbo, task.settings["draws"], task.seed))
    return {"references": found}


def gradients(task: Task, script: Script, needs: dict[str, Result]) -> Result:
    """Measure one estimator at a snapshot."""
    run = ScriptProgram(task, script)
    guide = config_estimators(run.guide, run.mapping)
    elbo = run.elbo()
    per, found = run.batches.size, {}
    for step, values in needs["snapshots"]["snapshots"].items():
        with _host(run, guide, values) as host:
            sites = host.sites()
            if run.chosen.learns:
                host.warm_up(elbo, task.settings["warm_up"])
            wanted = unpacked(needs["reference"]["references"][step])
            found[step] = measure.gradients(host, elbo, sites, wanted, task.settings["draws"], per, task.seed + 1)
            described = elbo.describe(run.model, guide, *host.program.args)
    return {"snapshots": found, "evaluations": measure.evaluations(elbo, described)}


def together(particles: int, chosen: Specification) -> bool:
    """Whether a step's particles and branches run as one: there is more than one of them."""
    return particles > 1 or any(e.uses_branches or e.relaxes for e in chosen.all)


@contextmanager
def _host(run: ScriptProgram, guide: Callable, values: str) -> Iterator[Gradients]:
    """Give the gradient at the parameters of a snapshot, on the batch that all estimators see."""
    batch, found = torch.from_numpy(run.batches.fixed("train")[: run.batches.size]), unpacked(values)
    with Gradients(Program(run.model, guide, (batch,), {}), run.task.seed) as host:
        with torch.no_grad():
            for name, leaf in host.leaves.items():
                leaf.copy_(torch.from_numpy(found[name]))
        yield host


def _train(
    run: ScriptProgram, steps: int, known: dict[str, Any], stops: list[int], at: Callable
) -> tuple[list[float], TraceGrad_ELBO, Callable]:
    """Train, calling `at(step, seconds so far)` at the stops; return the time of each step, the ELBO and the guide."""
    guide = config_estimators(run.guide, run.mapping)
    elbo = run.elbo()
    optimizer = split_optimizer(
        Adam({"lr": known["learning_rate"]}), Adam({"lr": known.get("baseline_learning_rate", 1e-2)})
    )
    for name, rate in known.get("gradient_descent", {}).items():
        optimizer = split_optimizer(optimizer, SGD({"lr": rate / run.batches.size}), belongs=name.__eq__)
    svi = SVI(run.model, guide, optimizer, elbo)
    seconds: list[float] = []
    for step in range(steps + 1):
        try:
            if step in stops:
                at(step, sum(seconds))
            if step < steps:
                batch = torch.from_numpy(run.batches.next())
                start = time.perf_counter()
                svi.step(batch)
                seconds.append(time.perf_counter() - start)
        except ValueError as error:
            # The first step was sound; what a density or a host's validation refuses later is what training led to.
            if step and (isinstance(error, ImpossibleValueError) or "invalid" in str(error) or not _finite()):
                _explain(run, step)
            raise
        if step == 0:
            check_parameters(known, pyro.get_param_store().keys())
    return seconds, elbo, guide


def _gradient_variance(run: ScriptProgram, elbo: TraceGrad_ELBO, guide: Callable) -> float | None:
    """Return the trace of the covariance of the guide's gradient of the loss per datum; None if it has no parameters."""
    batch = torch.from_numpy(run.batches.next())
    names = set(poutine.trace(guide).get_trace(batch).param_nodes)
    with Gradients(Program(run.model, guide, (batch,), {})) as host:
        inside = [indices for name, indices in host.blocks.items() if name in names]
        if not inside:
            return None
        rows = np.concatenate(list(host.draws(elbo)(run.task.settings["gradient_draws"], run.task.seed + 2)))
    return total_variance(rows[:, np.concatenate(inside)] / len(batch))


def _plate_nesting(model: Any, guide: Any, batch: torch.Tensor) -> int:
    """Return how many plate dimensions a program uses; the ELBO's own guess is the same and logs a line each time."""
    drawn = poutine.trace(guide).get_trace(batch)
    run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(batch)
    sites = [*drawn.nodes.values(), *run.nodes.values()]
    return max(
        (-f.dim for s in sites if s["type"] == "sample" for f in s["cond_indep_stack"] if f.vectorized), default=0
    )


def certificates(
    task: Task, script: Script, words: tuple[str, ...], elbos: tuple[str, ...], budget: dict[str, Any]
) -> Iterator[Callable[[], GradientCheck]]:
    """Yield what gives a certificate, for each estimator and each ELBO of the library, at the parameters that the task's training leaves."""
    run = ScriptProgram(task, script)
    batch = torch.from_numpy(run.batches.fixed("train")[: run.batches.size])
    if task.settings["steps"]:
        _train(run, task.settings["steps"], task.settings, [], lambda *args: None)
    for word in words:
        chosen = specification(word)
        mapping = chosen.mapping(script.discrete, script.baseline_inputs)
        particles = chosen.particles or task.particles
        target = objective(task.objective)
        elbo = run.made(particles, together(particles, chosen), estimators=mapping, objective=target)
        yield partial(check_gradients, run.model, run.guide, (batch,), elbo=elbo, **budget)
    for name in elbos:
        elbo = host_elbo(pyro.infer, name, task.particles)
        yield partial(check_gradients, run.model, run.guide, (batch,), elbo=elbo, **budget)


def chosen(task: Task, script: Script, candidates: list[Estimator] | None, seconds: float) -> Choice:
    """Return the choice of estimators, at the parameters that the task's training leaves."""
    run = ScriptProgram(task, script)
    batch = torch.from_numpy(run.batches.fixed("train")[: run.batches.size])
    if task.settings["steps"]:
        _train(run, task.settings["steps"], task.settings, [], lambda *args: None)
    return choose_estimators(
        run.model,
        run.guide,
        (batch,),
        seconds=seconds,
        candidates=candidates,
        num_particles=task.particles,
        max_plate_nesting=run.nesting,
        objective=objective(task.objective),
        seed=task.seed,
    )


def look(run: ScriptProgram) -> None:
    """Run the program a few times at its present parameters; raise the error that names a site or a parameter which is not finite."""
    check_finite(_parameters())
    elbo = run.made(2, estimators={"*": ScoreFunction()}, objective=objective(run.task.objective))
    with torch.random.fork_rng(devices=[]):
        for seed in range(LOOKS):
            torch.manual_seed(seed)
            elbo.diagnose(run.model, run.guide, run.fixed["train"][: run.batches.size])


def _parameters() -> dict[str, np.ndarray]:
    """Return the parameters in the store, unconstrained."""
    return {name: x.detach().cpu().numpy() for name, x in pyro.get_param_store().named_parameters()}


def _finite() -> bool:
    return all(np.isfinite(value).all() for value in _parameters().values())


def _explain(run: ScriptProgram, step: int) -> None:
    """Say why the objective is not finite: the program from the start, or training under this estimator."""
    if step == 0:
        look(run)
    raise Diverged(f"the objective is not finite after {step} steps; lower the learning rate")


class _Seen(poutine.messenger.Messenger):
    """Notes where in the script each site and parameter stands."""

    def __init__(self, run: ScriptProgram, side: str, found: dict[tuple[str, str], int]) -> None:
        super().__init__()
        self.path, self.side, self.found = run.script.path, side, found

    def _pyro_sample(self, msg: Any) -> None:
        if (line := caller_line(self.path, sys._getframe())) is not None:
            self.found.setdefault((self.side, msg["name"]), line)

    _pyro_param = _pyro_sample


def lines(run: ScriptProgram) -> Lines:
    """Return where the sites of the guide and of the model stand in the script, as far as they run."""
    found: dict[tuple[str, str], int] = {}
    drawn = poutine.trace(run.guide)
    batch = run.fixed["train"][: run.batches.size]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        with suppress(Exception), _Seen(run, "guide", found):
            drawn(batch)
        with suppress(Exception), _Seen(run, "model", found), poutine.replay(trace=getattr(drawn, "trace", None)):
            run.model(batch)
    return found
