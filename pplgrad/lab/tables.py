"""A study's answer and its tables on the screen."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from pplgrad.lab.answer import answers
from pplgrad.lab.page_tables import Table, gradient_rows, training_rows
from pplgrad.lab.results import failures
from pplgrad.lab.sheet import Sheet, screen, show_lines
from pplgrad.lab.summaries import crowded, gradient_table

# By importance, where the terminal is too narrow for all; words that heads begin with.
_FIRST = (
    "estimator", "library", "efficiency", "test", "MSE", "variance of the program", "importance-weighted bound", "bias²",
    "training step", "time", "train", "variance", "evaluations", "MSE × ms", "learning rate", "MSE × evaluations",
)  # fmt: skip


def show(frame: pd.DataFrame, page: Path, reported: Collection[str] = ()) -> None:
    """Print what training reached, what gradients are like at each snapshot, what failed but for what is `reported` elsewhere, and the answer."""
    data = training_rows(frame)
    if data.rows:
        _show(data, f"training: {data.note}")
    for step, rows in gradient_rows(frame, gradient_table(frame)):
        _show(rows, f"gradients after {step} steps, means over seeds, best efficiency first")
    for row in failures(frame).to_dict("records"):
        if any(row["error"].endswith(text) for text in reported):
            continue
        show_lines([f"failed: {row['kind']} {row['backend']} {row['estimator']}: {row['error']}"])
    # To be copied: never broken.
    written = f"written: {page.parent / 'study.parquet'}, {page}, and pictures beside them"
    screen().print(written, soft_wrap=True, markup=False)
    if load := crowded(frame):
        show_lines(["", f"The machine was busy: {load:.2g} processes for each core. Times are too long."])
    for answer in answers(frame):
        show_lines(["", *answer.lines])


def _show(data: Table, title: str) -> None:
    def rank(head: str) -> int:
        return next((i for i, begin in enumerate(_FIRST) if head.startswith(begin)), len(_FIRST))

    heads = data.heads
    Sheet(
        heads,
        data.texts,
        numbers=heads[data.names :],
        first=sorted(heads, key=rank),
        title=title,
        more="report.html and --json have all",
    ).show()
    screen().print()
