"""The pieces of a study in NumPyro."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.optim import SGD, Adam
from numpyro.primitives import Messenger

from pplgrad import ELBO, IWAE, ScoreFunction
from pplgrad.core.estimator import Estimator
from pplgrad.core.program import Program
from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.checking import trusted
from pplgrad.diagnostics.choosing import Choice
from pplgrad.errors import ProgramError
from pplgrad.lab import measure
from pplgrad.lab.data import Batches, evaluation_steps, packed, total_variance, unpacked
from pplgrad.lab.faults import LOOKS, Diverged, Lines, caller_line, check_finite
from pplgrad.lab.script import Script, check_parameters
from pplgrad.lab.specs import host_elbo, judged_by, objective, specification
from pplgrad.lab.tasks import Result, Task
from pplgrad.numpyro import (
    TraceGrad_ELBO,
    check_gradients,
    choose_estimators,
    config_estimators,
    is_baseline_param,
    split_optimizer,
)
from pplgrad.numpyro.diagnostics import Gradients

# What a callback of the script raises is told in a sentence; JAX would log its traceback beside that.
logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)


class ScriptProgram:
    """A script's program with a batch stream, and the ELBOs of a task."""

    def __init__(self, task: Task, script: Script) -> None:
        self.task, self.script = task, script
        self.params: dict[str, Any] = {}
        script.made["run"] = self
        self.batches = Batches(task, script)
        self.model, self.guide = script.program("numpyro", task.options, self.batches.train, task.seed)
        self.chosen = specification(task.estimator)
        self.mapping = self.chosen.mapping(script.discrete, script.baseline_inputs)
        self.configured = config_estimators(self.guide, self.mapping)
        self.fixed = {which: jnp.asarray(self.batches.fixed(which)) for which in ("train", "test")}
        self.hard = dict.fromkeys(script.discrete, ScoreFunction())

    def elbo(self) -> TraceGrad_ELBO:
        """Return the task's ELBO; the estimators are on the guide."""
        return TraceGrad_ELBO(self.chosen.particles or self.task.particles, objective=objective(self.task.objective))

    def bound(self) -> Callable[[dict, jax.Array], jax.Array]:
        """Return the evidence lower bound (or the reward) per datum at hard draws, from draws of its own."""
        # A relaxation has an objective of its own; what is compared is the bound at hard draws.
        evaluate = TraceGrad_ELBO(10, estimators=self.hard, objective=judged_by(self.task.objective))
        key = jax.random.key(self.task.seed + 1)
        return jax.jit(lambda p, x: -evaluate.loss(key, p, self.model, self.guide, x) / x.shape[0])

    def weighted_bound(self, params: dict, samples: int) -> float:
        """Return the importance-weighted bound per test datum; one weight for the whole program where data share a latent."""
        key, test = jax.random.key(self.task.seed + 1), self.fixed["test"]
        # Parts of one length are compiled once.
        count = 1 if self.script.whole_data else -(-len(test) // 100)
        size = -(-len(test) // count)
        parts = [test[start : start + size] for start in range(0, len(test), size)]
        for plates in (None, ()):
            evaluate = TraceGrad_ELBO(samples, estimators=self.hard, objective=IWAE(plates=plates))
            loss = jax.jit(lambda x, elbo=evaluate: elbo.loss(key, params, self.model, self.guide, x))
            try:
                return -sum(float(loss(x)) for x in parts) / len(test)
            except ProgramError:
                if plates == ():
                    raise
        raise AssertionError


def training(task: Task, script: Script, needs: dict[str, Result]) -> Result:
    """Train under one estimator; return its curve, its gradient's variance at the end, and its time."""
    run, known = ScriptProgram(task, script), task.settings
    bound = run.bound()
    curve: list[dict[str, float]] = []

    def at(step: int, seconds: float, params: dict, *rest: Any) -> None:
        curve.append(measure.curve_point(step, seconds, lambda which: float(bound(params, run.fixed[which]))))
        # Nothing can be raised under jit, and NaN parameters fail later where no message says why.
        if not np.isfinite([curve[-1]["train"], curve[-1]["test"]]).all():
            _explain(run, step, params)

    stops = evaluation_steps(known["steps"], known["points"])
    per_step, elbo, svi, state = _train(run, known, stops, at)
    result: Result = {"curve": curve, "milliseconds": 1e3 * float(np.median(per_step))}
    if known["gradient_draws"] and (variance := _gradient_variance(run, elbo, svi, state)) is not None:
        result["gradient_variance"] = variance
    if known["bound_samples"] and judged_by(task.objective) == ELBO():
        result["weighted_bound"] = run.weighted_bound(svi.get_params(state), known["bound_samples"])
    return result


def snapshots(task: Task, script: Script, needs: dict[str, Result]) -> Result:
    """Train, and keep the parameters at some steps."""
    run = ScriptProgram(task, script)
    kept: dict[str, str] = {}

    def at(step: int, seconds: float, params: dict, unconstrained: dict) -> None:
        if not _finite(params):
            _explain(run, step, params)
        kept[str(step)] = packed({n: np.asarray(x) for n, x in unconstrained.items() if not is_baseline_param(n)})

    _train(run, task.settings, sorted(task.settings["snapshots"]), at)
    return {"snapshots": kept}


def reference(task: Task, script: Script, needs: dict[str, Result]) -> Result:
    """Return the gradient at a snapshot, by the mean of an unbiased estimator."""
    run = ScriptProgram(task, script)
    target = objective(task.objective)
    particles, sites = trusted(target, task.particles, 10)
    host = _host(run, run.guide)
    elbo = TraceGrad_ELBO(particles, estimators=sites, objective=target)
    found = {}
    for step, values in needs["snapshots"]["snapshots"].items():
        _move(host, values)
        found[step] = packed(measure.reference(host, elbo, task.settings["draws"], task.seed))
    return {"references": found}


def gradients(task: Task, script: Script, needs: dict[str, Result]) -> Result:
    """Measure one estimator at a snapshot."""
    run = ScriptProgram(task, script)
    elbo = run.elbo()
    host = _host(run, run.configured)
    sites = _host(run, run.guide).sites()
    first, per, found = (host.learned, host.mutable), run.batches.size, {}
    for step, values in needs["snapshots"]["snapshots"].items():
        _move(host, values)
        host.learned, host.mutable = first
        if run.chosen.learns:
            host.warm_up(elbo, task.settings["warm_up"])
        wanted = unpacked(needs["reference"]["references"][step])
        found[step] = measure.gradients(host, elbo, sites, wanted, task.settings["draws"], per, task.seed + 1)
    model, guide, args, _ = host.program
    described = elbo.describe(jax.random.key(0), host.constrain(host.params), model, guide, *args)
    return {"snapshots": found, "evaluations": measure.evaluations(elbo, described)}


def _host(run: ScriptProgram, guide: Callable) -> Gradients:
    """Return the gradient on the batch that all estimators see."""
    return Gradients(Program(run.model, guide, (run.fixed["train"][: run.batches.size],), {}), None, run.task.seed)


def _move(host: Gradients, values: str) -> None:
    """Go to the parameters of a snapshot."""
    found = unpacked(values)
    host.params = {name: jnp.asarray(found[name]) for name in host.params}


def _train(
    run: ScriptProgram, known: dict[str, Any], stops: list[int], at: Callable
) -> tuple[list[float], TraceGrad_ELBO, SVI, Any]:
    """Train, calling `at(step, seconds so far, parameters, unconstrained ones)` at the stops; return the time of a step."""
    elbo = run.elbo()
    optimizer = split_optimizer(Adam(known["learning_rate"]), Adam(known.get("baseline_learning_rate", 1e-2)))
    for name, rate in known.get("gradient_descent", {}).items():
        optimizer = split_optimizer(optimizer, SGD(rate / run.batches.size), belongs=name.__eq__)
    svi = SVI(run.model, run.configured, optimizer, elbo)
    # A batch of the stream would be lost to training, and all later ones would differ from Pyro's.
    state = svi.init(jax.random.key(run.task.seed), run.fixed["train"][: run.batches.size])
    check_parameters(known, svi.get_params(state))
    if not _finite(svi.get_params(state)):
        _explain(run, 0, svi.get_params(state))

    @jax.jit
    def advance(state: Any, data: jax.Array) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda s, x: svi.update(s, x), state, data)

    per_step: list[float] = []
    total = 0.0
    compiled: dict[int, Any] = {}
    for begin, stop in zip([0, *stops[:-1]], stops, strict=True):
        if (length := stop - begin) > 0:
            data = jnp.asarray(np.stack([run.batches.next() for _ in range(length)]))
            if length not in compiled:
                # Compiling is no training, and is not counted.
                compiled[length] = advance.lower(state, data).compile()
            start = time.perf_counter()
            state, losses = compiled[length](state, data)
            losses.block_until_ready()
            spent = time.perf_counter() - start
            total += spent
            per_step.append(spent / length)
        at(stop, total, svi.get_params(state), svi.optim.get_params(state.optim_state))
    return per_step or [total / max(stops[-1], 1)], elbo, svi, state


def _gradient_variance(run: ScriptProgram, elbo: Any, svi: SVI, state: Any) -> float | None:
    """Return the trace of the covariance of the guide's gradient of the loss per datum; None if it has no parameters."""
    batch = jnp.asarray(run.batches.next())
    host = Gradients(Program(run.model, run.configured, (batch,), {}), None, run.task.seed)
    everything = svi.optim.get_params(state.optim_state)
    # Unconstrained, as in Pyro: the parameters that the optimizer moves.
    host.params = {name: everything[name] for name in host.params}
    host.learned = {name: everything[name] for name in host.learned}
    host.mutable = state.mutable_state or {}
    seeded = handlers.seed(handlers.substitute(run.guide, svi.get_params(state)), jax.random.key(0))
    names = {name for name, site in handlers.trace(seeded).get_trace(batch).items() if site["type"] == "param"}
    inside = [indices for name, indices in host.blocks.items() if name in names]
    if not inside:
        return None
    rows = np.concatenate(list(host.draws(elbo)(run.task.settings["gradient_draws"], run.task.seed + 2)))
    return total_variance(rows[:, np.concatenate(inside)].astype(float) / batch.shape[0])


def certificates(
    task: Task, script: Script, words: tuple[str, ...], elbos: tuple[str, ...], budget: dict[str, Any]
) -> Iterator[Callable[[], GradientCheck]]:
    """Yield what gives a certificate, for each estimator and each ELBO of the library, at the parameters that the task's training leaves."""
    run = ScriptProgram(task, script)
    batch = run.fixed["train"][: run.batches.size]
    params = _trained(run)
    for word in words:
        chosen = specification(word)
        mapping = chosen.mapping(script.discrete, script.baseline_inputs)
        guide = config_estimators(run.guide, mapping)
        particles = chosen.particles or task.particles
        elbo = TraceGrad_ELBO(particles, estimators=mapping, objective=objective(task.objective))
        yield partial(check_gradients, run.model, guide, (batch,), params=params, elbo=elbo, **budget)
    for name in elbos:
        elbo = host_elbo(numpyro.infer, name, task.particles)
        yield partial(check_gradients, run.model, run.guide, (batch,), params=params, elbo=elbo, **budget)


def chosen(task: Task, script: Script, candidates: list[Estimator] | None, seconds: float) -> Choice:
    """Return the choice of estimators, at the parameters that the task's training leaves."""
    run = ScriptProgram(task, script)
    return choose_estimators(
        run.model,
        run.guide,
        (run.fixed["train"][: run.batches.size],),
        params=_trained(run),
        seconds=seconds,
        candidates=candidates,
        num_particles=task.particles,
        objective=objective(task.objective),
        seed=task.seed,
    )


def _trained(run: ScriptProgram) -> dict | None:
    """Return the program's parameters after the task's training steps, or None if there are none."""
    kept: list[dict] = []
    if run.task.settings["steps"]:
        stops = [run.task.settings["steps"]]
        _train(run, run.task.settings, stops, lambda step, seconds, params, rest: kept.append(params))
    if not kept:
        return None
    if not _finite(kept[-1]):
        _explain(run, run.task.settings["steps"], kept[-1])
    run.params = {name: x for name, x in kept[-1].items() if not is_baseline_param(name)}
    return run.params


def look(run: ScriptProgram) -> None:
    """Run the program a few times at its present parameters; raise the error that names a site or a parameter which is not finite."""
    batch = run.fixed["train"][: run.batches.size]
    seeded = handlers.seed(handlers.substitute(run.guide, run.params), jax.random.key(0))
    seen = handlers.trace(seeded).get_trace(batch)
    check_finite(
        {name: np.asarray(site["value"]) for name, site in seen.items() if site["type"] == "param"} | run.params
    )
    elbo = TraceGrad_ELBO(2, estimators={"*": ScoreFunction()}, objective=objective(run.task.objective))
    for seed in range(LOOKS):
        elbo.diagnose(jax.random.key(seed), run.params, run.model, run.guide, batch)


def _finite(params: dict) -> bool:
    return all(np.isfinite(np.asarray(x)).all() for leaf in params.values() for x in jax.tree.leaves(leaf))


def _explain(run: ScriptProgram, step: int, params: dict) -> None:
    """Say why the objective is not finite: the program from the start, or training under this estimator."""
    # Under jit nothing is raised, and what was wrong at the start may be seen later.
    run.params = {} if step else {name: x for name, x in params.items() if not is_baseline_param(name)}
    look(run)
    raise Diverged(f"the objective is not finite after {step} steps; lower the learning rate")


class _Seen(Messenger):
    """Notes where in the script each site and parameter stands."""

    def __init__(self, run: ScriptProgram, side: str, found: dict[tuple[str, str], int], fn: Callable) -> None:
        super().__init__(fn)
        self.path, self.side, self.found = run.script.path, side, found

    def process_message(self, msg: dict[str, Any]) -> None:
        """Note the line that called."""
        if msg["type"] in ("sample", "param") and (line := caller_line(self.path, sys._getframe())) is not None:
            self.found.setdefault((self.side, msg["name"]), line)


def lines(run: ScriptProgram) -> Lines:
    """Return where the sites of the guide and of the model stand in the script, as far as they run."""
    found: dict[tuple[str, str], int] = {}
    batch = run.fixed["train"][: run.batches.size]
    drawn: dict = {}

    def seeded(program: Callable, side: str) -> Callable:
        return handlers.seed(handlers.substitute(_Seen(run, side, found, program), run.params), jax.random.key(0))

    with suppress(Exception), handlers.trace() as seen:
        seeded(run.guide, "guide")(batch)
        drawn = dict(seen)
    with suppress(Exception):
        handlers.replay(seeded(run.model, "model"), drawn)(batch)
    return found
