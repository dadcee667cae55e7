"""Variance and time of the estimators of a mixture that is fitted to a target with several modes: `make bench-mixtures`.

The target has modes in a row, `gap` apart, and so has the guide, whose parameters stand a little beside the best ones. Several elements are as many
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


def program(
    gap: float, dims: int, elements: int = 1, components: int = 2
) -> tuple[Callable, Callable, dict[str, jax.Array]]:
    """Return model, guide and parameters."""
    whole = (elements,) if elements > 1 else ()
    along = jnp.linspace(-1.0, 1.0, components)[:, None]
    modes = jnp.broadcast_to(gap / 2 * (components - 1) * along, (*whole, components, dims))
    spread = float(jnp.mean(modes**2)) + 1

    def mixed(logits: Any, loc: Any, scale: Any) -> Any:
        parts = dist.Normal(loc, scale).to_event(1)
        logits = jnp.broadcast_to(logits, (*whole, components))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts).to_event(len(whole))

    def model() -> None:
        x = numpyro.sample("x", mixed(-0.4 * along[:, 0], modes, jnp.ones(())))
        if elements > 1:
            numpyro.sample("y", dist.Normal(jnp.sum(x**2), gap * elements), obs=spread * elements * dims)

    def guide() -> None:
        a, m, s = (numpyro.param(name) for name in "ams")
        numpyro.sample("x", mixed(a, m, jnp.exp(s)))

    start = {
        "a": jnp.broadcast_to(0.1 * along[:, 0], (*whole, components)),
        "m": modes + 0.2,
        "s": jnp.full(modes.shape, -0.2),
    }
    return model, guide, start


def measured(
    gap: float, dims: int, elements: int, components: int, draws: int, seconds: float
) -> list[tuple[str, float, float, float]]:
    """Return for each estimator its name, the variance, the error of the mean, and the time of a step in microseconds."""
    model, guide, params = program(gap, dims, elements, components)
    every, steps = {}, {}
    for name, (estimator, particles) in ESTIMATORS.items():
        elbo = TraceGrad_ELBO(particles, estimators={"x": estimator})

        def gradient(key: jax.Array, elbo: Any = elbo) -> jax.Array:
            found = jax.grad(lambda p: elbo.loss(key, p, model, guide))(params)
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(found)])

        keys = jax.random.split(jax.random.key(0), draws)
        every[name] = np.asarray(jax.jit(lambda keys, one=gradient: jax.lax.map(one, keys, batch_size=1000))(keys))
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
    parser.add_argument("--gaps", type=float, nargs="*", default=[2.0, 6.0, 12.0], help="distances of the modes")
    parser.add_argument("--dims", type=int, nargs="*", default=[1, 10], help="numbers of dimensions")
    parser.add_argument("--components", type=int, nargs="*", default=[2, 10], help="numbers of components")
    parser.add_argument("--elements", type=int, nargs="*", default=[1, 8], help="numbers of elements")
    parser.add_argument("--draws", type=int, default=20_000, help="gradients of each estimator")
    parser.add_argument("--seconds", type=float, default=5.0, help="timing for each target")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mixtures.csv")
    given, rows = parser.parse_args(), []
    for components, elements, dims, gap in product(given.components, given.elements, given.dims, given.gaps):
        many = [f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((elements, "element"), (dims, "dimension"))]
        title = f"{components} components, {' of '.join(many)}, modes {gap:g} apart in each"
        table = Table("estimator", "variance", "error / s.e.", "µs", "variance × ms", title=title)
        for name, variance, error, time in measured(gap, dims, elements, components, given.draws, given.seconds):
            table.add_row(name, f"{variance:.3g}", f"{error:.1f}", f"{time:.0f}", f"{variance * time / 1e3:.3g}")
            rows.append((components, elements, dims, gap, name, variance, error, time))
        Console().print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(
        rows, columns=["components", "elements", "dims", "gap", "estimator", "variance", "error", "microseconds"]
    )
    frame.to_csv(given.out, index=False)


if __name__ == "__main__":
    main()
