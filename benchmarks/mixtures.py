"""Variance and time of the estimators of a mixture that is fitted to a target with two modes: `make bench-mixtures`.

The target has modes at ±`gap`/2, and so has the guide, whose parameters stand a little beside the best ones. Several elements are as many
draws of such a mixture, each with components of its own, in one event; an observation of the sum of their squares couples them. `variance` is the trace of the
covariance of the gradient of one jitted step (NumPyro), `error` the distance of its mean from that of all estimators' means in standard
errors, and a step is the loss and its gradient, the estimators taking turns. The last column is what is left at equal time.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.shared import ROOT, in_turns
from pplgrad import ImplicitReparam, LeaveOneOut, ScoreFunction, StratifiedMixture
from pplgrad.numpyro import TraceGrad_ELBO

ESTIMATORS: dict[str, tuple[Any, int]] = {
    "score+loo, 2 particles": (ScoreFunction(LeaveOneOut()), 2),
    "score+loo, 4 particles": (ScoreFunction(LeaveOneOut()), 4),
    "StratifiedMixture, path of the draw": (StratifiedMixture(paths="draw"), 1),
    "StratifiedMixture, all paths": (StratifiedMixture(paths="all"), 1),
    "ImplicitReparam": (ImplicitReparam(), 1),
}


def program(gap: float, dims: int, elements: int = 1) -> tuple[Callable, Callable, dict[str, jax.Array]]:
    """Return model, guide and parameters."""
    sign, whole = jnp.array([[-1.0], [1.0]]), (elements,) if elements > 1 else ()

    def mixed(logits: Any, loc: Any, scale: Any) -> Any:
        components = dist.Normal(loc, scale).to_event(1)
        logits = jnp.broadcast_to(logits, (*whole, 2))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components).to_event(len(whole))

    def model() -> None:
        x = numpyro.sample(
            "x", mixed(jnp.array([0.4, -0.4]), jnp.broadcast_to(sign * gap / 2, (*whole, 2, dims)), jnp.ones(()))
        )
        if elements > 1:
            numpyro.sample("y", dist.Normal(jnp.sum(x**2), gap * elements), obs=(1 + gap**2 / 4) * elements * dims)

    def guide() -> None:
        a, m, s = (numpyro.param(name) for name in "ams")
        numpyro.sample("x", mixed(a, m, jnp.exp(s)))

    start = {
        "a": jnp.broadcast_to(jnp.array([0.0, 0.2]), (*whole, 2)),
        "m": jnp.broadcast_to(sign * gap / 2 + 0.2, (*whole, 2, dims)),
        "s": jnp.full((*whole, 2, dims), -0.2),
    }
    return model, guide, start


def measured(gap: float, dims: int, elements: int, draws: int, seconds: float) -> list[tuple[str, float, float, float]]:
    """Return for each estimator its name, the variance, the error of the mean, and the time of a step in microseconds."""
    model, guide, params = program(gap, dims, elements)
    every, steps = {}, {}
    for name, (estimator, particles) in ESTIMATORS.items():
        elbo = TraceGrad_ELBO(particles, estimators={"x": estimator})

        def gradient(key: jax.Array, elbo: Any = elbo) -> jax.Array:
            found = jax.grad(lambda p: elbo.loss(key, p, model, guide))(params)
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(found)])

        every[name] = np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(0), draws)))
        step, keys = jax.jit(gradient), iter(jax.random.split(jax.random.key(1), 10**5))
        steps[name] = lambda step=step, keys=keys: step(next(keys)).block_until_ready()
    times = in_turns(steps, seconds)
    precision = {name: 1 / (x.var(0) + 1e-12) for name, x in every.items()}
    centre = sum(precision[name] * x.mean(0) for name, x in every.items()) / sum(precision.values())
    rows = []
    for name, x in every.items():
        error = np.abs((x.mean(0) - centre) / (x.std(0) / draws**0.5 + 1e-9)).max()
        rows.append((name, float(x.var(0).sum()), float(error), 1e3 * float(np.median(times[name]))))
    return rows


def main() -> None:
    """Measure and print a table for each target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gaps", type=float, nargs="*", default=[2.0, 6.0, 12.0], help="distances of the two modes")
    parser.add_argument("--dims", type=int, nargs="*", default=[1, 10], help="numbers of dimensions")
    parser.add_argument("--elements", type=int, nargs="*", default=[1, 8], help="numbers of elements")
    parser.add_argument("--draws", type=int, default=20_000, help="gradients of each estimator")
    parser.add_argument("--seconds", type=float, default=5.0, help="timing for each target")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mixtures.csv")
    given, rows = parser.parse_args(), []
    for elements, dims, gap in product(given.elements, given.dims, given.gaps):
        title = f"{elements} element{'s' if elements > 1 else ''} of {dims} dimension{'s' if dims > 1 else ''}, modes {gap:g} apart in each"
        table = Table("estimator", "variance", "error / s.e.", "µs", "variance × ms", title=title)
        for name, variance, error, time in measured(gap, dims, elements, given.draws, given.seconds):
            table.add_row(name, f"{variance:.3g}", f"{error:.1f}", f"{time:.0f}", f"{variance * time / 1e3:.3g}")
            rows.append((elements, dims, gap, name, variance, error, time))
        Console().print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows, columns=["elements", "dims", "gap", "estimator", "variance", "error", "microseconds"])
    frame.to_csv(given.out, index=False)


if __name__ == "__main__":
    main()
