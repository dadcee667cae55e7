"""What a study leaves: tidy files, a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from rich.table import Table

matplotlib.use("Agg", force=False)

COLUMNS = {
    "elbo_train": "ELBO train, nats",
    "elbo_test": "ELBO test, nats",
    "gradient_variance": "gradient variance",
    "milliseconds_per_step": "step, ms",
}
# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def tidy(results: list[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row for each run, and one row for each point of each run's curve."""
    runs, curves = [], []
    for result in results:
        config = result["config"]
        key = {name: config[name] for name in ("backend", "estimator", "seed")}
        settings = {
            name: config[name]
            for name in ("steps", "particles", "batch_size", "learning_rate", "baseline_learning_rate")
        }
        described = {"options": json.dumps(config["options"]), "versions": json.dumps(config["versions"])}
        curve = pd.DataFrame(result["curve"])
        runs.append(
            {
                **key,
                "elbo_train": curve["train"].iloc[-1],
                "elbo_test": curve["test"].iloc[-1],
                "gradient_variance": result["gradient_variance"],
                "milliseconds_per_step": result["milliseconds_per_step"],
                **settings,
                **described,
            }
        )
        curves.append(curve.rename(columns={"train": "elbo_train", "test": "elbo_test"}).assign(**key))
    return pd.DataFrame(runs), pd.concat(curves, ignore_index=True)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over seeds for each backend and estimator, in the order they were given."""
    groups = runs.groupby(["backend", "estimator"], sort=False)[list(COLUMNS)]
    return pd.concat({"mean": groups.mean(), "sd": groups.std(ddof=1)}, axis=1)


def table(runs: pd.DataFrame) -> Table:
    """Return the summary as a table for the screen: mean ± standard deviation over seeds."""
    result = Table(caption="mean ± standard deviation over seeds; ELBO / datum")
    for name in ("backend", "estimator"):
        result.add_column(name)
    for name in COLUMNS.values():
        result.add_column(name, justify="right")
    found = summary(runs)
    for index, row in found.iterrows():
        cells = [spread(row["mean", name], row["sd", name]) for name in COLUMNS]
        result.add_row(*index, *cells)  # type: ignore[misc]
    return result


def spread(mean: float, deviation: float) -> str:
    """Return a mean and its standard deviation with four significant digits of the mean.

    >>> spread(-31.4159, 0.2718), spread(0.000123, float("nan"))
    ('-31.42 ± 0.2718', '0.000123')
    """
    return f"{mean:.4g}" if pd.isna(deviation) else f"{mean:.4g} ± {deviation:.4g}"


def picture(curves: pd.DataFrame, title: str) -> Any:
    """Return a figure of the test ELBO against steps, one panel a backend, mean and range over seeds."""
    import matplotlib.pyplot as plt

    backends = list(dict.fromkeys(curves["backend"]))
    figure, axes = plt.subplots(1, len(backends), figsize=(5.2 * len(backends), 4), sharey=True, squeeze=False)
    styles = ["-", "--", "-.", ":"]
    for axis, backend in zip(axes[0], backends, strict=True):
        mine = curves[curves["backend"] == backend]
        for i, name in enumerate(dict.fromkeys(mine["estimator"])):
            by_step = mine[mine["estimator"] == name].groupby("step")["elbo_test"]
            mean, low, high = by_step.mean(), by_step.min(), by_step.max()
            colour = PALETTE[i % len(PALETTE)]
            axis.plot(mean.index, mean, styles[i % len(styles)], color=colour, label=name)
            axis.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(backend)
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test ELBO / datum, nats")
    axes[0][-1].legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def write(results: list[dict[str, Any]], out: Path, title: str) -> tuple[pd.DataFrame, list[Path]]:
    """Write runs.csv, curves.parquet, curves.png and curves.svg; return the runs and the files."""
    import matplotlib.pyplot as plt

    runs, curves = tidy(results)
    files = [out / name for name in ("runs.csv", "runs.parquet", "curves.parquet", "curves.png", "curves.svg")]
    runs.to_csv(files[0], index=False)
    runs.to_parquet(files[1])
    curves.to_parquet(files[2])
    figure = picture(curves, title)
    figure.savefig(files[3], dpi=150)
    figure.savefig(files[4])
    plt.close(figure)
    return runs, files
