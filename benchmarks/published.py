"""The published comparisons at full size as one Markdown table for each study: `python -m benchmarks.published`.

The variance is the trace of the covariance of the guide's gradient of the loss per datum, the mean over seeds; evaluations of the program
are those of all particles; ± is half the width of the 95% interval over seeds, of what ends a training.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pandas as pd

from benchmarks.shared import ROOT
from benchmarks.tables import table
from pplgrad.lab.results import read
from pplgrad.lab.summaries import gradient_table, steps_of, training_table

ENDS = {"train": "train ELBO", "test": "test ELBO", "weighted_bound": "importance-weighted bound"}


def main() -> None:
    """Print the table of each study that has results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "studies", nargs="*", type=Path, help="folders of studies; default: those that `make fashion` has made"
    )
    given = parser.parse_args()
    made = [ROOT / "studies" / "fashion" / path.stem for path in sorted((ROOT / "studies").glob("*_fashion.toml"))]
    for folder in given.studies or [folder for folder in made if (folder / "study.parquet").exists()]:
        print(f"\n### {folder.name}\n\n{study_table(folder)}")


def study_table(folder: Path) -> str:
    """Return a study's table, the fewest evaluations first, and among as many the least variance at the last snapshot."""
    frame, _ = read(folder)
    trained, gradients = training_table(frame), gradient_table(frame, "site")
    stops = steps_of(gradients)
    variances = gradients["variance", "mean"].groupby(level=["step", "backend", "estimator"], sort=False).sum()
    costs = gradients.xs(stops[-1], level="step").groupby(level=["backend", "estimator"], sort=False).first()
    by_evaluations = sorted(
        costs.index, key=lambda of: (of[0], costs.loc[of, ("evaluations", "mean")], variances[stops[-1], *of])
    )
    ended = frame[(frame["kind"] == "training") & frame["error"].isna()]
    seeds = ended.groupby(["backend", "estimator"])["seed"].nunique()
    rows = [
        (
            library,
            f"`{estimator}`",
            f"{costs.loc[(library, estimator), ('evaluations', 'mean')]:.0f}",
            *(f"{variances[stop, library, estimator]:,.0f}" for stop in stops),
            f"{costs.loc[(library, estimator), ('milliseconds', 'mean')]:.3g}",
            *(with_interval(trained, (library, estimator), quantity) for quantity in ENDS),
            str(seeds.get((library, estimator), 0)),
        )
        for library, estimator in by_evaluations
    ]
    columns = (
        "library",
        "estimator",
        "evaluations",
        *(f"variance at {stop:,}" for stop in stops),
        "step, ms",
        *ENDS.values(),
        "seeds",
    )
    return table(columns, rows)


def with_interval(trained: pd.DataFrame, row: tuple[str, str], quantity: str) -> str:
    """Return a mean and half the width of its interval, where there are several seeds; nothing of what does not train."""
    if row not in trained.index:
        return ""
    mean, half = (float(trained.loc[row, (quantity, what)]) for what in ("mean", "half"))
    return f"{mean:.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


if __name__ == "__main__":
    main()
