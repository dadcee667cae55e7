"""The tables of a study: means over seeds, with their intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from pplgrad.lab.intervals import geometric_mean_and_factor, mean_and_half_width
from pplgrad.lab.results import judged

COSTS = ("milliseconds", "evaluations", "peak_bytes")
PRODUCTS = {"mse × evaluations": "evaluations", "mse × ms": "milliseconds"}
CROWDED = 1.25
"""Processes for each core from which on times are too long."""


def best_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the training rows of the learning rate that each estimator went on with: the best on its first seed without failure."""
    training = frame[(frame["kind"] == "training") & frame["error"].isna()]
    if training.empty:
        return training
    seeds = training.groupby(["backend", "estimator"])["seed"].transform("min")
    first = training[(training["seed"] == seeds) & (training["part"] == "curve") & (training["quantity"] == "train")]
    last = first[first["step"] == first.groupby(["backend", "estimator", "learning_rate"])["step"].transform("max")]
    chosen = last.loc[last.groupby(["backend", "estimator"], sort=False)["value"].idxmax()]
    return training.merge(chosen[["backend", "estimator", "learning_rate"]])


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Return training curves: columns backend, estimator, seed, step, `time`, train and test.

    `time` is in seconds: steps times the median time of one, so that compiling and warming up are left out. It is the
    mean over an estimator's seeds, which share their points in time then.
    """
    training = best_rates(frame)
    if training.empty:
        return pd.DataFrame(columns=["backend", "estimator", "seed", "step", "time", "train", "test"])
    points = training[training["part"] == "curve"].pivot_table(
        index=["backend", "estimator", "seed", "step"], columns="quantity", values="value", sort=False
    )
    ends = training[training["quantity"] == "milliseconds"]
    milliseconds = ends.groupby(["backend", "estimator"], sort=False)["value"].mean()
    points = points.join(milliseconds.rename("ms"), on=["backend", "estimator"]).reset_index()
    points["time"] = points["step"].astype(float) * points["ms"] / 1e3
    return points[["backend", "estimator", "seed", "step", "time", "train", "test"]]


def budgets(points: pd.DataFrame) -> dict[str, float]:
    """Return, for each library, the time at which estimators are compared: when the first has taken all its steps."""
    ends = points.groupby(["backend", "estimator"], sort=False)["time"].max()
    return {str(backend): float(ends[backend].min()) for backend in dict.fromkeys(points["backend"])}


def at_budget(points: pd.DataFrame) -> pd.DataFrame:
    """Return the test value that each seed has reached at its library's budget, between the points of its curve by a line."""
    times, found = budgets(points), []
    for (backend, estimator, seed), one in points.groupby(["backend", "estimator", "seed"], sort=False):
        value = float(np.interp(times[backend], one["time"], one["test"]))
        found.append((backend, estimator, seed, value))
    return pd.DataFrame(found, columns=["backend", "estimator", "seed", "test"])


def training_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what training reached, the best test value at equal time first in each library.

    Columns: (quantity, "mean" | "half") for the quantities at the end, and for `at budget`, the test value at equal time.
    """
    training = best_rates(frame)
    if training.empty:
        return pd.DataFrame()
    end = training[(training["part"] == "end") | (training["step"] == training["step"].max())]
    end = end[~end["quantity"].isin(["seconds", "load"])]
    index = ["backend", "estimator"]
    parts = {q: _means(rows.set_index(index)["value"]) for q, rows in end.groupby("quantity", sort=False)}
    budget = at_budget(curves(frame)).set_index(index)["test"]
    table = pd.concat({"at budget": _means(budget), **parts}, axis=1)
    table["learning_rate", ""] = training.groupby(index, sort=False)["learning_rate"].first()
    return _best_first(table, "at budget")


def gradient_table(frame: pd.DataFrame, part: str = "program") -> pd.DataFrame:
    """Return what was measured of each estimator's gradient at each snapshot, the best efficiency first in each library.

    Columns: (quantity, "mean" | "half"). `mse × evaluations` and `mse × ms` are what is left at equal evaluations and at equal time;
    `efficiency` is the inverse of the latter. These three are geometric means, and their "half" is the factor of the interval.
    """
    rows = frame[(frame["kind"] == "gradients") & frame["error"].isna()]
    # No site's density may read a parameter: weights of logged decisions are the reward's.
    shown = rows[(rows["part"] == part) & ~rows["quantity"].isin([*COSTS, "load"])]
    if shown.empty:
        return pd.DataFrame()
    where = ["step", "backend", "estimator"]
    named = where if part == "program" else [*where, "name"]
    seeds = shown.pivot_table(index=[*named, "seed"], columns="quantity", values="value", sort=False)
    costs = rows[rows["quantity"].isin(COSTS)].pivot_table(
        index=[*where, "seed"], columns="quantity", values="value", sort=False
    )
    seeds = seeds.join(costs, on=[*where, "seed"])
    seeds = seeds.droplevel("seed")
    table = pd.concat({q: _means(seeds[q]) for q in seeds.columns}, axis=1)
    for product, cost in PRODUCTS.items():
        found = _means(seeds["mse"] * seeds[cost], geometric_mean_and_factor)
        table = table.join(pd.concat({product: found}, axis=1))
    table["efficiency", "mean"] = 1 / table["mse × ms", "mean"].replace(0, np.nan)
    table["efficiency", "half"] = table["mse × ms", "half"]
    return _best_first(table, "efficiency")


def steps_of(table: pd.DataFrame) -> list[int]:
    """Return the snapshots of a table of gradients."""
    return [] if table.empty else list(dict.fromkeys(table.index.get_level_values("step")))


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Return variance and squared bias of one snapshot and library as shares of the squared gradient, in the rows' order.

    Columns: `estimator`, `variance`, `bias2`, and one standard error about the latter from `low` to `high`. Nothing is below the share
    `least`, so that a logarithmic axis can show it; an estimate of the squared bias that is not above it is NaN.
    """
    means = pd.DataFrame({q: rows[q, "mean"].to_numpy(float) for q in ("variance", "bias2", "bias2_se", "gradient2")})
    # The squared norm is estimated without its noise, and may come out negative where the gradient is near zero.
    norm = max(float(means["gradient2"].median()), 1e-3 * float(means["variance"].min()), 1e-30)
    low, high = ((means["bias2"] + sign * means["bias2_se"]) / norm for sign in (-1, 1))
    # The axis begins where the upper ends of all intervals are seen, or two decades below the smallest variance.
    least = max(1e-8, min(float(means["variance"].min()) / norm / 100, float(high.where(high > 0).min()) / 2))
    low, high = low.clip(lower=least), high.clip(lower=least)
    return pd.DataFrame(
        {
            "estimator": rows.index.get_level_values("estimator"),
            "variance": means["variance"] / norm,
            "bias2": (means["bias2"] / norm).where(means["bias2"] / norm > least),
            "low": low,
            "high": high,
            "least": least,
        }
    )


def window(values: pd.Series) -> tuple[float, float] | None:
    """Return the range of values to look at, without the first steps' values, which would flatten all that follows."""
    known = values[np.isfinite(values)]
    if known.empty:
        return None
    low, high = np.quantile(known, [0.1, 1.0])
    return (float(low), float(high)) if high > low else None


def crowded(frame: pd.DataFrame) -> float | None:
    """Return how many processes asked for each core at most, if it was so many that times are too long."""
    load = frame.loc[frame["quantity"] == "load", "value"].max()
    return float(load) if load > CROWDED else None


def what_is_judged(frame: pd.DataFrame) -> str:
    """Return the name of what curves show, with its unit."""
    what, unit = judged(frame)
    return f"{what}, {unit} / datum"


def _means(values: pd.Series, mean: Callable[[np.ndarray], tuple[float, float]] = mean_and_half_width) -> pd.DataFrame:
    """Return the mean of the values that share their index, and half the width of its interval."""
    names = list(values.index.names)
    found = {key: mean(own.to_numpy(float)) for key, own in values.groupby(level=names, sort=False)}
    table = pd.DataFrame.from_dict(found, orient="index", columns=["mean", "half"])
    table.index = pd.MultiIndex.from_tuples(found, names=names)
    return table


def _best_first(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return rows sorted by a mean, the largest first, within each snapshot and library, those in the order of the study."""
    outer = [name for name in table.index.names if name in ("step", "backend")]
    keys = list(zip(*(table.index.get_level_values(name) for name in outer), strict=True))
    order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    values = -table[quantity, "mean"].to_numpy(float)
    places = np.array([order[key] for key in keys])
    return table.iloc[np.lexsort((np.where(np.isnan(values), np.inf, values), places))]
