"""The tables of a study's page and of the terminal, as text and with what they are sorted by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pplgrad.lab.intervals import with_factor, with_half_width
from pplgrad.lab.results import UNITS, judged
from pplgrad.lab.summaries import best_rates, budgets, curves, gradient_table, steps_of, training_table

# Of training, and of gradients: no quantity has the name of another one.
TRAINING = {
    "at budget": "test {}, equal time",
    "test": "test {}, end",
    "weighted_bound": "importance-weighted bound, test",
    "train": "train {}, end",
    "milliseconds": "training step",
    "gradient_variance": "variance of the guide's gradient",
}
GRADIENTS = {
    "efficiency": "efficiency",
    "mse": "MSE",
    "variance": "variance of the program's gradient",
    "bias2": "bias²",
    "milliseconds": "time of a gradient",
    "evaluations": "evaluations",
    "peak_bytes": "peak memory",
    "mse × ms": "MSE × ms",
    "mse × evaluations": "MSE × evaluations",
}
PARTS = {"variance": "variance", "bias2": "bias²", "mse": "MSE", "gradient2": "|gradient|²"}
_FACTORS = {"efficiency", "mse × ms", "mse × evaluations"}
_BARE = {"evaluations"}


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that the column is sorted by (none: its text)."""

    text: str
    order: float | None = None


@dataclass(frozen=True)
class Table:
    """Heads and rows; the first `names` columns hold words."""

    heads: list[str] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    names: int = 2
    note: str = ""

    @property
    def texts(self) -> list[list[str]]:
        """The rows as text."""
        return [[cell.text for cell in row] for row in self.rows]


def training_rows(frame: pd.DataFrame) -> Table:
    """Return the training table, the best test value at equal time first in each library."""
    table = training_table(frame)
    if table.empty:
        return Table()
    shown = [q for q in TRAINING if (q, "mean") in table.columns]
    rows = [
        [*map(Cell, (name, backend)), *(cell(q, row) for q in shown), _number(row["learning_rate", ""])]
        for (backend, name), row in table.iterrows()  # type: ignore[misc]
    ]
    seeds = best_rates(frame)["seed"].nunique()
    times = ", ".join(f"{time:.3g} s ({backend})" for backend, time in budgets(curves(frame)).items())
    spread = f"means over {seeds} seeds with half the width of their 95% interval" if seeds > 1 else "one seed"
    note = f"{spread}; equal time: {times}, when the first estimator has taken all its steps"
    return Table(
        ["estimator", "library", *(_head(frame, q, TRAINING) for q in shown), "learning rate"], rows, note=note
    )


def gradient_rows(frame: pd.DataFrame, table: pd.DataFrame) -> list[tuple[int, Table]]:
    """Return each snapshot with its part of the table of gradients, the best efficiency first in each library."""
    heads = ["estimator", "library", *(_head(frame, q, GRADIENTS) for q in GRADIENTS)]
    return [(step, Table(heads, _gradient_rows(table.loc[[step]]))) for step in steps_of(table)]


def _gradient_rows(table: pd.DataFrame) -> list[list[Cell]]:
    return [
        [*map(Cell, (name, backend)), *(cell(q, row) for q in GRADIENTS)]
        for (_, backend, name), row in table.iterrows()  # type: ignore[misc]
    ]


def part_rows(frame: pd.DataFrame, kind: str) -> Table:
    """Return the table by site or by parameter, at the last snapshot, the least MSE first."""
    table = gradient_table(frame, kind)
    if table.empty:
        return Table()
    step = int(table.index.get_level_values("step").max())
    rows = [
        [*map(Cell, (estimator, backend, name)), *(cell(q, row) for q in PARTS)]
        for (_, backend, estimator, name), row in table.loc[[step]].iterrows()  # type: ignore[misc]
    ]
    rows.sort(key=lambda row: (row[1].text, row[2].text, math.inf if row[5].order is None else row[5].order))
    return Table(["estimator", "library", kind, *(_head(frame, q, PARTS) for q in PARTS)], rows, 3, f"{step:,}")


def cell(quantity: str, row: Any) -> Cell:
    """Return a mean with its interval as the tables show it.

    >>> cell("peak_bytes", {("peak_bytes", "mean"): 2_500_000.0, ("peak_bytes", "half"): 0.0}).text
    '2.5 MB'
    >>> cell("mse", {("mse", "mean"): 0.01234, ("mse", "half"): 0.0004})
    Cell(text='0.01234 ± 0.00040', order=0.01234)
    """
    mean, half = float(row[quantity, "mean"]), float(row[quantity, "half"])
    order = None if math.isnan(mean) else mean
    if quantity == "peak_bytes":
        return Cell("" if order is None else f"{mean / 1e6:.3g} MB", order)
    if quantity in _BARE:
        return Cell("" if order is None else f"{mean:g}", order)
    shown = with_factor(mean, half) if quantity in _FACTORS else with_half_width(mean, half)
    return Cell(shown, order)


def _number(value: float) -> Cell:
    return Cell("" if math.isnan(value) else f"{value:g}", None if math.isnan(value) else value)


def _head(frame: pd.DataFrame, quantity: str, titles: dict[str, str]) -> str:
    what, scale = judged(frame)
    title = titles[quantity].format(what)
    if quantity in ("efficiency", "mse × ms", "mse × evaluations", "evaluations", "peak_bytes"):
        return title
    unit = UNITS["test" if quantity == "at budget" else quantity].replace("nats", scale)
    return f"{title}, {unit}"
