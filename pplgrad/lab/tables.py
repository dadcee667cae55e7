"""A study's tables on the screen."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from pplgrad.lab.report import gradient_rows, training_rows
from pplgrad.lab.results import failures, gradient_table
from pplgrad.lab.sheet import Sheet, screen, show_lines

# By importance, where the terminal is too narrow for all; words that heads begin with.
_FIRST = (
    "estimator", "library", "efficiency", "ELBO test", "reward test", "MSE", "variance", "importance-weighted bound", "bias²",
    "step", "ELBO train", "reward train", "gradient variance", "evaluations", "mse × ms", "learning rate", "mse × evaluations",
)  # fmt: skip


def show(frame: pd.DataFrame, page: Path, reported: Collection[str] = ()) -> None:
    """Print what training reached, what gradients are like at each snapshot, and what failed but for what is `reported` elsewhere."""
    if data := training_rows(frame):
        _show(data, f"training, mean ± standard deviation over {data['seeds']} seeds")
    table = gradient_table(frame)
    for step in [] if table.empty else dict.fromkeys(table.index.get_level_values("step")):
        _show(gradient_rows(frame, step), f"gradients after {step} steps, means over seeds, best efficiency first")
    for row in failures(frame).to_dict("records"):
        if any(row["error"].endswith(text) for text in reported):
            continue
        show_lines([f"failed: {row['kind']} {row['backend']} {row['estimator']}: {row['error']}"])
    # To be copied: never broken.
    written = f"written: {page.parent / 'study.parquet'}, {page}, and pictures beside them"
    screen().print(written, soft_wrap=True, markup=False)


def _show(data: dict, title: str) -> None:
    def rank(head: str) -> int:
        return next((i for i, begin in enumerate(_FIRST) if head.startswith(begin)), len(_FIRST))

    heads = data["head"]
    Sheet(
        heads,
        data["rows"],
        numbers=heads[2:],
        first=sorted(heads, key=rank),
        title=title,
        more="report.html and --json have all",
    ).show()
    screen().print()
