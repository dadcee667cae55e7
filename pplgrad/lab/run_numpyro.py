"""A piece of a study in NumPyro."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.optim import SGD, Adam
from numpyro.primitives import Messenger

from pplgrad import Assessment
from pplgrad.core.estimator import Estimator
from pplgrad.core.program import Program
from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.choosing import Choice
from pplgrad.lab.faults import Lines, caller_line
from pplgrad.lab.rows import Data, arrays_of, count, mapped, parts, together
from pplgrad.lab.script import Script, check_parameters
from pplgrad.lab.script_run import At, ScriptRun
from pplgrad.lab.specs import Specification
from pplgrad.lab.tasks import Task
from pplgrad.numpyro import (
    TraceGrad_ELBO,
    assess_fit,
    check_gradients,
    choose_estimators,
    config_estimators,
    is_baseline_param,
    split_optimizer,
)
from pplgrad.numpyro.diagnostics import Gradients

# An error in a callback of the script is reported in one sentence; JAX would also log its traceback.
logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)

MOST_BYTES = 2**27
"""The batches of so many steps are made before they are taken as one compiled loop, whatever lies between two stops."""


class Run(ScriptRun):
    """A script's program; `params` are those at which it is looked at, none for those that it starts with."""

    backend = "numpyro"
    host = numpyro.infer

    def __init__(self, task: Task, script: Script) -> None:
        self.params: dict[str, Any] = {}
        self._svi: Any = None
        self._state: Any = None
        super().__init__(task, script)

    def array(self, data: np.ndarray) -> jax.Array:
        """Return data as an array of JAX's."""
        return jnp.asarray(data)

    def with_estimators(self, mapping: dict[str, Estimator]) -> Callable:
        """Return the guide with estimators at its sites."""
        return config_estimators(self.guide, mapping)

    def make_elbo(self, particles: int, chosen: Specification | None = None, **options: Any) -> TraceGrad_ELBO:
        """Return an ELBO."""
        return TraceGrad_ELBO(particles, **options)

    def train(self, stops: list[int], at: At) -> list[float]:
        """Train until the last stop, calling `at` at each; return the seconds of a step between two stops."""
        self._start()
        seconds: list[float] = self.checkpoint.progress.setdefault("step_seconds", [])
        total = self.checkpoint.progress.get("total", 0.0)
        first = self.checkpoint.go_on(self.batches, self._load)
        compiled: dict[int, Any] = {}
        most = max(1, MOST_BYTES // sum(x.nbytes for x in arrays_of(self.batch)))
        for begin, stop in zip([0, *stops[:-1]], stops, strict=True):
            if stop <= first and first:
                continue
            spent = 0.0
            for length in _lengths(stop - begin, most):
                data = mapped(jnp.asarray, together(np.stack, [self.batches.next() for _ in range(length)]))
                if length not in compiled:
                    # Compiling is no training, and is not counted.
                    compiled[length] = self._advance.lower(self._state, data).compile()
                start = time.perf_counter()
                self._state, losses = compiled[length](self._state, data)
                losses.block_until_ready()
                spent += time.perf_counter() - start
            total += spent
            if stop > begin:
                seconds.append(spent / (stop - begin))
            if at(stop, total):
                break
            self.checkpoint.progress["total"] = total
            self.checkpoint.keep(stop, self.batches, self._saved)
        return seconds or [total / max(stops[-1], 1)]

    def _start(self) -> None:
        known = self.task.settings
        optimizer = split_optimizer(Adam(known["learning_rate"]), Adam(known.get("baseline_learning_rate", 1e-2)))
        for name, rate in known.get("gradient_descent", {}).items():
            optimizer = split_optimizer(optimizer, SGD(rate / self.batches.size), belongs=name.__eq__)
        self._svi = SVI(self.model, self.configured, optimizer, self.elbo)
        # A batch of the stream would be lost to training, and all later ones would differ from Pyro's.
        self._state = self._svi.init(jax.random.key(self.task.seed), self.batch)
        check_parameters(known, self._present())
        if not self.finite():
            self.explain(0)

    def _saved(self) -> bytes:
        """Return the state of SVI: its leaves as arrays, those of keys as their numbers."""
        file = io.BytesIO()
        np.savez(file, *(np.asarray(jax.random.key_data(x) if _is_key(x) else x) for x in jax.tree.leaves(self._state)))
        return file.getvalue()

    def _load(self, saved: bytes) -> None:
        leaves, tree = jax.tree.flatten(self._state)
        with np.load(io.BytesIO(saved), allow_pickle=False) as file:
            found = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(leaves))]
        keys = [jax.random.wrap_key_data(x) if _is_key(old) else x for x, old in zip(found, leaves, strict=True)]
        self._state = jax.tree.unflatten(tree, keys)

    @cached_property
    def _advance(self) -> Any:
        return jax.jit(lambda state, data: jax.lax.scan(lambda s, x: self._svi.update(s, x), state, data))

    def trained(self) -> None:
        """Take the task's training steps, if there are any; the program is looked at there."""
        super().trained()
        if self._state is not None:
            self.params = _without_baselines(self._present())

    def _present(self) -> dict[str, Any]:
        """Return all parameters as training left them."""
        return self._svi.get_params(self._state)

    def bound(self, which: str) -> float:
        """Return the evidence lower bound (or the reward) per datum at hard draws, from draws of its own."""
        return float(self._bound(self._present(), self.fixed[which]))

    @cached_property
    def _bound(self) -> Callable:
        key = jax.random.key(self.task.seed + 1)
        return jax.jit(lambda p, x: -self.judge(x).loss(key, p, self.model, self.guide, x) / count(x))

    def test_loss(self, elbo: TraceGrad_ELBO) -> float:
        """Return an ELBO's loss on the test data, from draws of its own."""
        key, test, params = jax.random.key(self.task.seed + 1), self.fixed["test"], self._present()
        # Parts of one length are compiled once.
        size = -(-count(test) // (1 if self.script.whole_data else -(-count(test) // 100)))
        loss = jax.jit(lambda x: elbo.loss(key, params, self.model, self.guide, x))
        return sum(float(loss(part)) for part in parts(test, size))

    def parameters(self) -> dict[str, np.ndarray]:
        """Return `params`, and what the guide starts the others with."""
        seen = self._traced_guide(self.batch, self.params)
        return {name: np.asarray(x) for name, x in seen.items()} | self.params

    def _traced_guide(self, batch: Data, params: dict[str, Any]) -> dict[str, Any]:
        seeded = handlers.seed(handlers.substitute(self.guide, params), jax.random.key(0))
        seen = handlers.trace(seeded).get_trace(batch)
        return {name: site["value"] for name, site in seen.items() if site["type"] == "param"}

    def finite(self) -> bool:
        """Return whether all parameters are finite, the baselines' among them."""
        return all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(self._present()))

    def unconstrained(self) -> dict[str, np.ndarray]:
        """Return the program's parameters as the optimizer sees them."""
        return {name: np.asarray(x) for name, x in _without_baselines(self._optimized()).items()}

    def _optimized(self) -> dict[str, Any]:
        return self._svi.optim.get_params(self._state.optim_state)

    def guide_parameters(self, batch: Data) -> set[str]:
        """Return the names of the parameters that the guide registers."""
        return set(self._traced_guide(batch, self._present()))

    def at_present(self, batch: Data) -> Any:
        """Return a context that gives the gradient where training is."""
        found = self._gradients(self.configured, batch)
        everything = self._optimized()
        # Unconstrained, as in Pyro: the parameters that the optimizer moves.
        found.params = {name: everything[name] for name in found.params}
        found.learned = {name: everything[name] for name in found.learned}
        found.mutable = self._state.mutable_state or {}
        return nullcontext(found)

    def at_snapshots(self, guide: Callable, kept: dict[str, dict[str, np.ndarray]]) -> Iterator[tuple[str, Gradients]]:
        """Yield each snapshot's step and the gradient at its parameters, on the batch that all estimators see."""
        found = self._gradients(guide, self.batch)
        first = found.learned, found.mutable
        for step, values in kept.items():
            found.params = {name: jnp.asarray(values[name]) for name in found.params}
            found.learned, found.mutable = first
            yield step, found

    def _gradients(self, guide: Callable, batch: Data) -> Gradients:
        return Gradients(Program(self.model, guide, (batch,), {}), None, self.task.seed)

    def describe(self, elbo: TraceGrad_ELBO, host: Gradients) -> Any:
        """Return what the ELBO says of the configured program."""
        return elbo.describe(
            jax.random.key(0), host.constrain(host.params), self.model, self.configured, *host.program.args
        )

    def check(self, guide: Callable, elbo: Any, budget: dict[str, Any]) -> GradientCheck:
        """Return the certificate of an ELBO at `params`."""
        return check_gradients(self.model, guide, (self.batch,), params=self.params or None, elbo=elbo, **budget)

    def choose(self, **options: Any) -> Choice:
        """Return the choice of estimators at `params`."""
        return choose_estimators(self.model, self.guide, (self.batch,), params=self.params or None, **options)

    def assess(self, batch: Data, **options: Any) -> Assessment:
        """Return the assessment of the guide at `params`."""
        return assess_fit(self.model, self.guide, (batch,), params=self.params or None, **options)

    def diagnose(self, elbo: TraceGrad_ELBO, seed: int) -> None:
        """Estimate once, with every check of densities on."""
        elbo.diagnose(jax.random.key(seed), self.params, self.model, self.guide, self.batch)

    def look_at_start(self, step: int) -> None:
        """Look for what was wrong before training."""
        # Under jit nothing is raised, and what was wrong at the start may be seen later.
        self.params = {} if step else _without_baselines(self._present())
        self.look()

    def lines(self) -> Lines:
        """Return where the sites of the guide and of the model stand in the script, as far as they run."""
        found: dict[tuple[str, str], int] = {}
        drawn: dict = {}

        def seeded(program: Callable, side: str) -> Callable:
            seen = _Seen(self, side, found, program)
            return handlers.seed(handlers.substitute(seen, self.params), jax.random.key(0))

        with suppress(Exception), handlers.trace() as seen:
            seeded(self.guide, "guide")(self.batch)
            drawn = dict(seen)
        with suppress(Exception):
            handlers.replay(seeded(self.model, "model"), drawn)(self.batch)
        return found


def _lengths(steps: int, most: int) -> list[int]:
    """Return the numbers of steps that are compiled as one, equal but for the last.

    >>> _lengths(5, 2), _lengths(2, 5), _lengths(0, 5)
    ([2, 2, 1], [2], [])
    """
    return [min(most, steps - begin) for begin in range(0, steps, most)]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_baselines(params: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in params.items() if not is_baseline_param(name)}


class _Seen(Messenger):
    """Notes where in the script each site and parameter stands."""

    def __init__(self, run: Run, side: str, found: dict[tuple[str, str], int], fn: Callable) -> None:
        super().__init__(fn)
        self.path, self.side, self.found = run.script.path, side, found

    def process_message(self, msg: dict[str, Any]) -> None:
        """Note the line that called."""
        if msg["type"] in ("sample", "param") and (line := caller_line(self.path, sys._getframe())) is not None:
            self.found.setdefault((self.side, msg["name"]), line)
