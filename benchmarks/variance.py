"""Gradient variance and time of every estimator on the sigmoid belief network: `make variance`.

One network is trained on digits (NumPyro, leave-one-out over 2 particles); at its start, early, and late, each estimator's
gradient of the loss per datum is drawn at the same parameters and on the same batch. `variance` is the trace of the
covariance of the guide's gradient; `bias` the norm of the difference of the mean gradient from DisARM's, both from as
many draws as the table says, beside what chance would give. A step is the jitted loss and its gradient, the estimators taking
turns. Variance times evaluations (or time) is what is left at equal evaluations (or time).
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpyro.infer import SVI
from numpyro.optim import Adam
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.shared import OPTIONS, ROOT, in_turns, sbn
from pplgrad import (
    ARM,
    ARMS,
    CARMS,
    REBAR,
    RODEO,
    DisARM,
    DoubleCV,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    MeasureValued,
    MuProp,
    ReinMax,
    ScoreFunction,
    StickBreakingDisARM,
    StraightThrough,
    TreeDisARM,
)
from pplgrad.lab.palette import COLOURS
from pplgrad.numpyro import TraceGrad_ELBO

ESTIMATORS: dict[str, tuple[Any, int]] = {
    "score": (ScoreFunction(), 1),
    "score+loo, 2 particles": (ScoreFunction(LeaveOneOut()), 2),
    "score, 2 samples": (ScoreFunction(samples=2), 1),
    "score, 4 samples": (ScoreFunction(samples=4), 1),
    "ARM": (ARM(), 1),
    "DisARM": (DisARM(), 1),
    "ARMS(4)": (ARMS(4), 1),
    "StickBreakingDisARM": (StickBreakingDisARM(), 1),
    "TreeDisARM": (TreeDisARM(), 1),
    "CARMS(4)": (CARMS(4), 1),
    "LocalExpectation": (LocalExpectation(), 1),
    "MeasureValued": (MeasureValued(), 1),
    "MuProp": (MuProp(), 1),
    "DoubleCV": (DoubleCV(scale=1.0, learn=False), 1),
    "RODEO": (RODEO(learn=False), 1),
    "REBAR": (REBAR(0.5, learn=False), 1),
    "GumbelSoftmax(0.5)": (GumbelSoftmax(0.5), 1),
    "StraightThrough": (StraightThrough(), 1),
    "GumbelRao": (GumbelRao(10, 0.5), 1),
    "ReinMax": (ReinMax(), 1),
    "GappedStraightThrough": (GappedStraightThrough(), 1),
}


def main() -> None:
    """Train, measure at the stops, print the table, write it and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--stops", type=int, nargs="*", default=[0, 100, 2000], help="training steps")
    parser.add_argument("--draws", type=int, default=200, help="gradients of each estimator")
    parser.add_argument("--seconds", type=float, default=10.0, help="timing at each stop")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "variance.csv")
    given = parser.parse_args()
    options = {**OPTIONS, "latents": given.latents}
    train, _ = sbn().load(options, 0)
    model, guide = sbn().numpyro_program(options, train, 0)
    batch = jnp.asarray(train[:100], jnp.float32)
    svi = SVI(model, guide, Adam(1e-3), TraceGrad_ELBO(2, estimators={"z*": ScoreFunction(LeaveOneOut())}))
    state, rng, done, rows = svi.init(jax.random.key(0), batch), np.random.default_rng(0), 0, []
    update = jax.jit(svi.update)
    compiled: dict[str, Any] = {}
    for stop in given.stops:
        for _ in range(stop - done):
            state, _ = update(state, jnp.asarray(train[rng.integers(0, len(train), 100)], jnp.float32))
        done = stop
        rows += measured(stop, svi.get_params(state), model, guide, batch, given, compiled)
    frame = pd.DataFrame(rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(given.out, index=False)
    show(frame, given)
    draw(frame, given.out.with_suffix(".png"))


def measured(
    stop: int, params: dict, model: Any, guide: Any, batch: Any, given: argparse.Namespace, compiled: dict
) -> list[dict]:
    """Return a row for each estimator at one point of training."""
    draws = given.draws
    names = sorted(name for name in params if name.startswith("encode"))
    for short, (estimator, particles) in ESTIMATORS.items():
        if short not in compiled:
            elbo = TraceGrad_ELBO(particles, estimators={"z*": estimator})

            def gradient(params: dict, key: jax.Array, elbo: Any = elbo) -> jax.Array:
                found = jax.grad(lambda p: elbo.loss(key, p, model, guide, batch) / len(batch))(params)
                return jnp.concatenate([found[name].ravel() for name in names])

            described = elbo.describe(jax.random.key(0), params, model, guide, batch)
            extra = sum(row["evaluations"] for row in described.rows)
            compiled[short] = jax.jit(gradient).lower(params, jax.random.key(0)).compile(), particles * (1 + extra)
    means, found = {}, {}
    for short, (gradient, _) in tqdm(compiled.items(), desc=f"after {stop} steps"):
        rows = np.stack([np.asarray(gradient(params, key)) for key in jax.random.split(jax.random.key(1), draws)])
        means[short], found[short] = rows.mean(0), float(rows.var(0, ddof=1).sum())
    key = jax.random.key(2)
    steps = {
        short: (lambda g=gradient: jax.block_until_ready(g(params, key))) for short, (gradient, _) in compiled.items()
    }
    times = in_turns(steps, given.seconds)
    result = []
    for short, (_, evaluations) in compiled.items():
        chance = np.sqrt((found[short] + found["DisARM"]) / draws)
        result.append(
            {
                "steps": stop,
                "estimator": short,
                "unbiased": ESTIMATORS[short][0].declaration.unbiased,
                "evaluations": evaluations,
                "variance": found[short],
                "bias": float(np.linalg.norm(means[short] - means["DisARM"])),
                "bias_by_chance": float(chance),
                "ms": float(np.median(times[short])),
            }
        )
    return result


def show(frame: pd.DataFrame, given: argparse.Namespace) -> None:
    """Print the table."""
    table = Table(caption=f"{given.latents} latents, {given.draws} draws; written to {given.out}")
    columns = ("steps", "estimator", "evaluations", "variance", "bias (chance)", "step, ms", "var × eval", "var × ms")
    for column in columns:
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for _, row in frame.iterrows():
        table.add_row(
            str(row["steps"]),
            row["estimator"],
            str(row["evaluations"]),
            f"{row['variance']:.3g}",
            f"{row['bias']:.2g} ({row['bias_by_chance']:.2g})",
            f"{row['ms']:.2g}",
            f"{row['variance'] * row['evaluations']:.3g}",
            f"{row['variance'] * row['ms']:.3g}",
        )
    Console(width=120).print(table)


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw variance against time, a panel for each point of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stops = list(dict.fromkeys(frame["steps"]))
    figure, panels = plt.subplots(len(stops), 1, figsize=(8, 4.5 * len(stops)), squeeze=False)
    for panel, stop in zip(panels[:, 0], stops, strict=True):
        rows = frame[frame["steps"] == stop]
        for unbiased, mark, color in ((True, "o", COLOURS[0]), (False, "X", COLOURS[1])):
            mine = rows[rows["unbiased"] == unbiased]
            panel.plot(mine["ms"], mine["variance"], mark, color=color, label="unbiased" if unbiased else "biased")
        panel.set(xscale="log", yscale="log", xlabel="step, ms", title=f"after {stop} steps")
        panel.set_ylabel("variance of the guide's gradient")
        panel.margins(0.12)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="lower left")
        named_beside(panel, rows)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def named_beside(panel: Any, rows: pd.DataFrame) -> None:
    """Write the estimators' names in one column beside a panel, in the order of their variance, each with a line to its point.

    So many points lie close together that names at the points would cover one another.
    """
    ordered = rows.sort_values("variance", ascending=False)
    for place, (_, row) in zip(np.linspace(1.0, 0.0, len(ordered)), ordered.iterrows(), strict=True):
        panel.annotate(
            row["estimator"],
            (row["ms"], row["variance"]),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "color": "grey",
                "lw": 0.4,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0.0, 0.5),
            },
            annotation_clip=False,
        )


if __name__ == "__main__":
    main()
