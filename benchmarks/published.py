"""The published comparisons at full size as one Markdown table for each study: `python -m benchmarks.published`.

The variance is the trace of the covariance of the guide's gradient of the loss per datum; evaluations of the program are those of
all particles. Of several seeds the table has the mean, and ± the standard deviation of what ends a training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import xarray

from benchmarks.shared import ROOT
from benchmarks.tables import table
from pplgrad.lab import load_study

STUDIES = (
    "arms_2021_linear_fashion",
    "arms_2021_nonlinear_fashion",
    "rodeo_2022_linear_fashion",
    "rodeo_2022_nonlinear_fashion",
)


def main() -> None:
    """Print the table of each study that has results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "studies", nargs="*", type=Path, help="folders of studies; those of `make fashion` if none is given"
    )
    given = parser.parse_args()
    for folder in given.studies or [ROOT / "results" / name for name in STUDIES]:
        print(f"\n### {folder.name}\n\n{study_table(folder)}")


def study_table(folder: Path) -> str:
    """Return a study's table, the least variance at the last snapshot first among those with as many evaluations."""
    found = load_study(folder).dataset
    stops = [int(stop) for stop in found["snapshot"].values]
    columns = (
        "library",
        "estimator",
        "evaluations",
        *(f"variance at {stop:,}" for stop in stops),
        "step, ms",
        "train ELBO",
        "test ELBO",
        "bound of 100",
        "seeds",
    )
    rows = []
    for library in found["backend"].values:
        for name in ordered(found.sel(backend=library)):
            one = found.sel(backend=library, estimator=name)
            spread = [variance_of(one, stop) for stop in stops]
            train, end = (one[f"curve_{which}"].isel(step=-1, learning_rate=0) for which in ("train", "test"))
            if np.isnan(spread).all() and np.isnan(end).all():
                continue
            rows.append(
                (
                    str(library),
                    f"`{name}`",
                    f"{np.nanmean(one['gradient_evaluations']):.0f}",
                    *(f"{value:,.0f}" for value in spread),
                    f"{np.nanmedian(one['gradient_milliseconds']):.3g}",
                    with_spread(train.values),
                    with_spread(end.values),
                    with_spread(one["end_weighted_bound"].isel(learning_rate=0).values),
                    str(int((~np.isnan(end)).sum())),
                )
            )
    return table(columns, rows)


def ordered(found: xarray.Dataset) -> list[str]:
    """Return the estimators by their evaluations, and those with as many by their variance at the last snapshot."""
    keys = {
        str(name): (
            float(np.nanmean(found["gradient_evaluations"].sel(estimator=name))),
            variance_of(found.sel(estimator=name), found["snapshot"].values[-1]),
        )
        for name in found["estimator"].values
    }
    return sorted(keys, key=lambda name: keys[name])


def variance_of(found: xarray.Dataset, stop: int) -> float:
    """Return the variance of the gradient of all sites of the guide at a snapshot, the mean over seeds."""
    return float(found["site_variance"].sel(snapshot=stop).sum("site", min_count=1).mean())


def with_spread(values: np.ndarray) -> str:
    """Return the mean of what was measured and its standard deviation over seeds.

    >>> with_spread(np.array([-250.0, -251.0, np.nan])), with_spread(np.array([np.nan]))
    ('-250.50 ± 0.71', '')
    """
    values = values[~np.isnan(values)]
    if not values.size:
        return ""
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if values.size > 1 else "")


if __name__ == "__main__":
    main()
