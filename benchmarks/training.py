"""The bound that each estimator reaches in equal time: the second half of `make variance`.

The sigmoid belief network of models/sbn.py on the digits, a batch of 100, Adam. Every estimator starts from the same
parameters and trains for the same seconds of wall time, compiling apart, on one thread; then the evidence lower bound per
datum of the test set is estimated with ten particles. What an estimator learns is learned along the way.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.shared import OPTIONS, ROOT, sbn
from benchmarks.variance import ESTIMATORS
from pplgrad import REBAR, RELAX, RODEO, DoubleCV
from pplgrad.lab.palette import COLOURS

LEARNING = {
    "DoubleCV": (DoubleCV(), 1),
    "RODEO": (RODEO(), 1),
    "REBAR": (REBAR(), 1),
    "RELAX": (RELAX(), 1),
}
CHOSEN: dict[str, tuple[Any, int]] = {**ESTIMATORS, **LEARNING}
EVERY = 10
"""Steps between two looks at the clock."""


def main() -> None:
    """Train with each estimator in each library, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="training time of each estimator")
    parser.add_argument("--libraries", nargs="*", choices=["pyro", "numpyro"], default=["numpyro", "pyro"])
    parser.add_argument("--estimators", nargs="*", choices=list(CHOSEN), default=list(CHOSEN))
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "training.csv")
    given = parser.parse_args()
    rows = []
    for library in given.libraries:
        train = in_numpyro if library == "numpyro" else in_pyro
        for short in tqdm(given.estimators, desc=library):
            steps, bound = train(*CHOSEN[short], given)
            unbiased = CHOSEN[short][0].declaration.unbiased
            row = {"library": library, "estimator": short, "unbiased": unbiased, "steps": steps, "bound": bound}
            rows.append({**row, "seconds": given.seconds})
    frame = pd.DataFrame(rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(given.out, index=False)
    table = Table(caption=f"{given.latents} latents, {given.seconds:g} s each; written to {given.out}")
    for column in ("library", "estimator", "steps", "test ELBO, nats / datum"):
        table.add_column(column, justify="left" if column in ("library", "estimator") else "right")
    for _, row in frame.sort_values(["library", "bound"], ascending=[True, False]).iterrows():
        name = row["estimator"] if row["unbiased"] else f"{row['estimator']} (biased)"
        table.add_row(row["library"], name, str(row["steps"]), f"{row['bound']:.2f}")
    Console(width=100).print(table)
    draw(frame, given.out.with_suffix(".png"))


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw the bounds, a panel for each library."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    libraries = list(dict.fromkeys(frame["library"]))
    figure, panels = plt.subplots(1, len(libraries), figsize=(6 * len(libraries), 6), squeeze=False)
    for panel, library in zip(panels[0], libraries, strict=True):
        rows = frame[frame["library"] == library].sort_values("bound")
        # Points: the length of a bar says nothing on an axis that does not begin at zero.
        for unbiased, mark, color in ((True, "o", COLOURS[0]), (False, "X", COLOURS[1])):
            mine = rows["unbiased"] == unbiased
            values = rows["bound"].where(mine)
            panel.plot(values, rows["estimator"], mark, color=color, label="unbiased" if unbiased else "biased")
        panel.set(xlabel="test ELBO, nats / datum", title=f"{library}, {frame['seconds'].iloc[0]:g} s each")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def in_numpyro(estimator: Any, particles: int, given: argparse.Namespace) -> tuple[int, float]:
    """Train in NumPyro; return the steps taken and the bound."""
    import jax
    import jax.numpy as jnp
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    options = {**OPTIONS, "latents": given.latents}
    train, test = sbn().load(options, 0)
    model, guide = sbn().numpyro_program(options, train, 0)
    configured = config_estimators(guide, {"z*": estimator})
    svi = SVI(model, configured, Adam(given.learning_rate), TraceGrad_ELBO(particles))
    data, rng = jnp.asarray(train, jnp.float32), np.random.default_rng(0)
    state = svi.init(jax.random.key(0), data[:100])

    def several(state: Any, picked: Any) -> Any:
        return jax.lax.scan(lambda s, index: svi.update(s, data[index]), state, picked)[0]

    picked = jnp.asarray(rng.integers(0, len(train), (EVERY, 100)))
    update = jax.jit(several).lower(state, picked).compile()
    steps, end = 0, time.perf_counter() + given.seconds
    while time.perf_counter() < end:
        state = jax.block_until_ready(update(state, jnp.asarray(rng.integers(0, len(train), (EVERY, 100)))))
        steps += EVERY
    bound = Trace_ELBO(10)
    bound.can_infer_discrete = True
    loss = bound.loss(jax.random.key(1), svi.get_params(state), model, guide, jnp.asarray(test, jnp.float32))
    return steps, -float(loss) / len(test)


def in_pyro(estimator: Any, particles: int, given: argparse.Namespace) -> tuple[int, float]:
    """Train in Pyro; return the steps taken and the bound."""
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.optim import Adam

    from pplgrad.pyro import TraceGrad_ELBO

    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    options = {**OPTIONS, "latents": given.latents}
    train, test = sbn().load(options, 0)
    model, guide = sbn().pyro_program(options, train, 0)
    elbo = TraceGrad_ELBO(particles, vectorize_particles=True, max_plate_nesting=1, estimators={"z*": estimator})
    svi = SVI(model, guide, Adam({"lr": given.learning_rate}), elbo)
    data, rng = torch.tensor(train, dtype=torch.float32), np.random.default_rng(0)
    for _ in range(3):
        # The first steps watch the program to find its structure, which is the compiling of this library.
        elbo.differentiable_loss(model, guide, data[:100])
    steps, end = 0, time.perf_counter() + given.seconds
    while time.perf_counter() < end:
        svi.step(data[rng.integers(0, len(train), 100)])
        steps += 1
    bound = Trace_ELBO(num_particles=10)
    with torch.no_grad():
        return steps, -bound.loss(model, guide, torch.tensor(test, dtype=torch.float32)) / len(test)


if __name__ == "__main__":
    main()
