"""A study's tables on the screen."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from pplgrad.lab.report import gradient_rows, training_rows
from pplgrad.lab.results import failures, gradient_table


def show(frame: pd.DataFrame, page: Path, reported: Collection[str] = ()) -> None:
    """Print what training reached, what gradients are like at each snapshot, and what failed but for what is `reported` elsewhere."""
    console = Console()
    wide = console if console.is_terminal else Console(width=200)
    if data := training_rows(frame):
        wide.print(_table(data, f"training, mean ± standard deviation over {data['seeds']} seeds"))
    table = gradient_table(frame)
    for step in [] if table.empty else dict.fromkeys(table.index.get_level_values("step")):
        wide.print(
            _table(gradient_rows(frame, step), f"gradients after {step} steps, means over seeds, best efficiency first")
        )
    for row in failures(frame).to_dict("records"):
        if any(row["error"].endswith(text) for text in reported):
            continue
        wide.print(
            f"failed: {row['kind']} {row['backend']} {row['estimator']}: {row['error']}", highlight=False, markup=False
        )
    wide.print(
        f"written: {page.parent / 'study.parquet'}, {page}, and pictures beside them", soft_wrap=True, highlight=False
    )


def _table(data: dict, title: str) -> Table:
    result = Table(title=title)
    for place, name in enumerate(data["head"]):
        result.add_column(name, justify="left" if place < 2 else "right")
    for row in data["rows"]:
        result.add_row(*row)
    return result
