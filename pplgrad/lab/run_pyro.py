"""A piece of a study in Pyro."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import SGD, Adam

from pplgrad import Assessment
from pplgrad.core.estimator import Estimator
from pplgrad.core.program import Program
from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.choosing import Choice
from pplgrad.errors import ImpossibleValueError
from pplgrad.lab.faults import Lines, caller_line
from pplgrad.lab.rows import Data, count, mapped, parts
from pplgrad.lab.script import Script, check_parameters
from pplgrad.lab.script_run import At, ScriptRun
from pplgrad.lab.specs import Specification
from pplgrad.lab.tasks import Task
from pplgrad.pyro import (
    TraceGrad_ELBO,
    assess_fit,
    check_gradients,
    choose_estimators,
    config_estimators,
    load_training_state,
    split_optimizer,
    training_state,
)
from pplgrad.pyro.diagnostics import Gradients


class Run(ScriptRun):
    """A script's program at the parameters in the store."""

    backend = "pyro"
    host = pyro.infer

    def __init__(self, task: Task, script: Script) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(task.seed)
        super().__init__(task, script)
        self.nesting = _plate_nesting(self.model, self.guide, self.batch)

    def array(self, data: np.ndarray) -> torch.Tensor:
        """Return data as a tensor."""
        return torch.from_numpy(data)

    def with_estimators(self, mapping: dict[str, Estimator]) -> Callable:
        """Return the guide with estimators at its sites."""
        return config_estimators(self.guide, mapping)

    def make_elbo(self, particles: int, chosen: Specification | None = None, **options: Any) -> TraceGrad_ELBO:
        """Return an ELBO, whose particles and branches run as one where there is more than one of them."""
        together = particles > 1 or any(
            e.uses_branches or e.enumerates or e.relaxes for e in (chosen.all if chosen else ())
        )
        if chosen is not None and self.task.settings.get("compile"):
            options["compile"] = True
        return TraceGrad_ELBO(
            particles, vectorize_particles=together or chosen is None, max_plate_nesting=self.nesting, **options
        )

    def train(self, stops: list[int], at: At) -> list[float]:
        """Train until the last stop, calling `at` at each; return each step's seconds, but for those that find the structure."""
        svi = SVI(self.model, self.configured, self._optimizer(), self.elbo)
        seconds: list[float] = self.checkpoint.progress.setdefault("step_seconds", [])
        first = self.checkpoint.go_on(self.batches, partial(self._load, svi))
        for step in range(first, stops[-1] + 1):
            try:
                if step in stops and not 0 < step == first:
                    if at(step, sum(seconds)):
                        break
                    self.checkpoint.keep(step, self.batches, partial(_saved, svi))
                if step < stops[-1]:
                    batch = mapped(torch.from_numpy, self.batches.next())
                    start = time.perf_counter()
                    svi.step(batch)
                    seconds.append(time.perf_counter() - start)
            except ValueError as error:
                # The first step was sound; what a density or a host's validation refuses later is what training led to.
                if step and (isinstance(error, ImpossibleValueError) or "invalid" in str(error) or not self.finite()):
                    self.explain(step)
                raise
            if step == 0:
                check_parameters(self.task.settings, pyro.get_param_store().keys())
        return seconds[3:] or seconds

    def _load(self, svi: SVI, saved: bytes) -> None:
        load_training_state(svi, torch.load(io.BytesIO(saved), weights_only=True), self.batch)

    def _optimizer(self) -> Any:
        known = self.task.settings
        result = split_optimizer(
            Adam({"lr": known["learning_rate"]}), Adam({"lr": known.get("baseline_learning_rate", 1e-2)})
        )
        for name, rate in known.get("gradient_descent", {}).items():
            result = split_optimizer(result, SGD({"lr": rate / self.batches.size}), belongs=name.__eq__)
        return result

    def bound(self, which: str) -> float:
        """Return the evidence lower bound (or the reward) per datum at hard draws, from draws of its own."""
        data = self.fixed[which]
        return -self._loss(self.judge(data), (data,)) / count(data)

    def test_loss(self, elbo: TraceGrad_ELBO) -> float:
        """Return an ELBO's loss on the test data, from draws of its own."""
        test = self.fixed["test"]
        return self._loss(elbo, parts(test, count(test) if self.script.whole_data else 100))

    def _loss(self, elbo: TraceGrad_ELBO, batches: Sequence[Data]) -> float:
        # Evaluation draws from a stream of its own, so that it does not move the training's.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.task.seed + 1)
            return sum(elbo.loss(self.model, self.guide, x) for x in batches)

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the parameters in the store, unconstrained."""
        return {name: x.detach().cpu().numpy() for name, x in pyro.get_param_store().named_parameters()}

    def finite(self) -> bool:
        """Return whether all parameters are finite, the baselines' among them."""
        return all(np.isfinite(value).all() for value in self.parameters().values())

    def unconstrained(self) -> dict[str, np.ndarray]:
        """Return the program's parameters as the optimizer sees them."""
        with Gradients(Program(self.model, self.guide, (self.batch,), {})) as found:
            return {name: leaf.detach().cpu().numpy().copy() for name, leaf in found.leaves.items()}

    def guide_parameters(self, batch: Data) -> set[str]:
        """Return the names of the parameters that the guide registers."""
        return set(poutine.trace(self.configured).get_trace(batch).param_nodes)

    def at_present(self, batch: Data) -> Gradients:
        """Return a context that gives the gradient at the parameters in the store."""
        return Gradients(Program(self.model, self.configured, (batch,), {}))

    def at_snapshots(self, guide: Callable, kept: dict[str, dict[str, np.ndarray]]) -> Iterator[tuple[str, Gradients]]:
        """Yield each snapshot's step and the gradient at its parameters, on the batch that all estimators see."""
        for step, values in kept.items():
            with Gradients(Program(self.model, guide, (self.batch,), {}), self.task.seed) as found:
                with torch.no_grad():
                    for name, leaf in found.leaves.items():
                        leaf.copy_(torch.from_numpy(values[name]))
                yield step, found

    def describe(self, elbo: TraceGrad_ELBO, host: Gradients) -> Any:
        """Return what the ELBO says of the configured program."""
        return elbo.describe(self.model, self.configured, *host.program.args)

    def check(self, guide: Callable, elbo: Any, budget: dict[str, Any]) -> GradientCheck:
        """Return the certificate of an ELBO at the parameters in the store."""
        return check_gradients(self.model, guide, (self.batch,), elbo=elbo, **budget)

    def choose(self, **options: Any) -> Choice:
        """Return the choice of estimators at the parameters in the store."""
        return choose_estimators(self.model, self.guide, (self.batch,), max_plate_nesting=self.nesting, **options)

    def assess(self, batch: Data, **options: Any) -> Assessment:
        """Return the assessment of the guide at the parameters in the store."""
        return assess_fit(self.model, self.guide, (batch,), **options)

    def diagnose(self, elbo: TraceGrad_ELBO, seed: int) -> None:
        """Estimate once, with every check of densities on."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            elbo.diagnose(self.model, self.guide, self.batch)

    def look_at_start(self, step: int) -> None:
        """Look for what was wrong before training; the store has the parameters of step `step`."""
        if step == 0:
            self.look()

    def lines(self) -> Lines:
        """Return where the sites of the guide and of the model stand in the script, as far as they run."""
        found: dict[tuple[str, str], int] = {}
        drawn = poutine.trace(self.guide)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            with suppress(Exception), _Seen(self, "guide", found):
                drawn(self.batch)
            with suppress(Exception), _Seen(self, "model", found), poutine.replay(trace=getattr(drawn, "trace", None)):
                self.model(self.batch)
        return found


def _saved(svi: SVI) -> bytes:
    file = io.BytesIO()
    torch.save(training_state(svi), file)
    return file.getvalue()


def _plate_nesting(model: Any, guide: Any, batch: Data) -> int:
    """Return how many plate dimensions a program uses; the ELBO's own guess is the same and logs a line each time."""
    drawn = poutine.trace(guide).get_trace(batch)
    run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(batch)
    sites = [*drawn.nodes.values(), *run.nodes.values()]
    return max(
        (-f.dim for s in sites if s["type"] == "sample" for f in s["cond_indep_stack"] if f.vectorized), default=0
    )


class _Seen(poutine.messenger.Messenger):
    """Notes where in the script each site and parameter stands."""

    def __init__(self, run: Run, side: str, found: dict[tuple[str, str], int]) -> None:
        super().__init__()
        self.path, self.side, self.found = run.script.path, side, found

    def _pyro_sample(self, msg: Any) -> None:
        if (line := caller_line(self.path, sys._getframe())) is not None:
            self.found.setdefault((self.side, msg["name"]), line)

    _pyro_param = _pyro_sample
