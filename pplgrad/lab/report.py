"""A study as one page that needs nothing beside it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from pplgrad.lab.pictures import save
from pplgrad.lab.results import UNITS, best_rates, failures, gradient_table, judged, read, spread, training_table
from pplgrad.lab.tasks import write_atomically

TITLES = {
    "train": "{} train",
    "test": "{} test",
    "weighted_bound": "importance-weighted bound, test",
    "gradient_variance": "gradient variance",
    "milliseconds": "step",
    "gradient2": "|gradient|²",
    "bias2": "bias²",
    "variance": "variance",
    "mse": "MSE",
    "evaluations": "evaluations",
    "peak_bytes": "peak memory",
}
SHOWN = [
    "bias2",
    "variance",
    "mse",
    "evaluations",
    "milliseconds",
    "peak_bytes",
    "mse × evaluations",
    "mse × ms",
    "efficiency",
]


def write_report(out: Path) -> Path:
    """Write report.html, and the pictures as PNG and SVG, from a study's dataset; return the page's path."""
    frame, about = read(out)
    figures = [(caption, _inline(out / f"{name}.svg"), name) for name, caption in save(frame, out)]
    environment = Environment(loader=PackageLoader("pplgrad.lab"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(
        title=f"Gradient estimators on {Path(about['study']['script']).name}",
        about=about,
        command=about["command"],
        figures=figures,
        training=training_rows(frame),
        gradients=[(step, gradient_rows(frame, step)) for step in _steps(frame)],
        parts=[(kind, part_rows(frame, kind)) for kind in ("site", "parameter")],
        failures=failures(frame).to_dict("records"),
        settings=_flat(about["study"]),
    )
    path = out / "report.html"
    write_atomically(path, page)
    return path


def training_rows(frame: pd.DataFrame) -> dict[str, Any]:
    """Return heads and cells of the training table."""
    table = training_table(frame)
    if table.empty:
        return {}
    quantities = [q for q in TITLES if ("mean", q) in table.columns]
    rows = []
    for (backend, estimator, rate), row in table.iterrows():  # type: ignore[misc]
        rows.append([backend, estimator, f"{rate:g}", *(spread(row["mean", q], row["sd", q]) for q in quantities)])
    seeds = best_rates(frame)["seed"].nunique()
    return {
        "head": ["library", "estimator", "learning rate", *(_title(frame, q) for q in quantities)],
        "rows": rows,
        "seeds": seeds,
    }


def gradient_rows(frame: pd.DataFrame, step: int) -> dict[str, Any]:
    """Return heads and cells of the table of gradients at a snapshot, best efficiency first in each library."""
    table = gradient_table(frame).loc[[step]].reset_index()
    table = table.sort_values(["backend", "efficiency"], ascending=[True, False])
    rows = [[row["backend"], row["estimator"], *(cell(q, row[q]) for q in SHOWN)] for _, row in table.iterrows()]
    return {"head": ["library", "estimator", *(_title(frame, q) for q in SHOWN)], "rows": rows}


def part_rows(frame: pd.DataFrame, kind: str) -> dict[str, Any]:
    """Return heads and cells of the table by site or by parameter, at the last snapshot."""
    table = gradient_table(frame, kind)
    if table.empty:
        return {}
    table = table.reset_index()
    table = table[table["step"] == table["step"].max()]
    shown = ["gradient2", "bias2", "variance", "mse"]
    rows = [
        [row["backend"], row["name"], row["estimator"], *(cell(q, row[q]) for q in shown)]
        for _, row in table.iterrows()
    ]
    rows.sort(key=lambda row: row[:2])
    return {
        "head": ["library", kind, "estimator", *(_title(frame, q) for q in shown)],
        "rows": rows,
        "step": int(table["step"].max()),
    }


def cell(quantity: str, value: float) -> str:
    """Return a number as the tables show it.

    >>> cell("peak_bytes", 2_500_000.0), cell("mse", 0.012345)
    ('2.5 MB', '0.0123')
    """
    if pd.isna(value):
        return ""
    if quantity == "peak_bytes":
        return f"{value / 1e6:.3g} MB"
    return f"{value:.3g}"


def _title(frame: pd.DataFrame, quantity: str) -> str:
    what, scale = judged(frame)
    unit = UNITS.get(quantity, "").replace("programs", "").replace("bytes", "").replace("nats", scale)
    return TITLES.get(quantity, quantity).format(what) + (f", {unit}" if unit else "")


def _steps(frame: pd.DataFrame) -> list[int]:
    table = gradient_table(frame)
    return [] if table.empty else list(dict.fromkeys(table.index.get_level_values("step")))


def _inline(path: Path) -> str:
    """Return a picture's SVG element, without what stands before it in a file of its own."""
    text = path.read_text()
    start = text.index("<svg")
    # Fixed sizes would neither shrink with a window nor fit a printed page.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text[start:], count=1),
        count=1,
    )


def _flat(study: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in study.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            rows.append((prefix + name, shown))
    return rows


def command_line(arguments: list[str]) -> str:
    """Return a command as it can be pasted into a shell."""
    return "pplgrad " + " ".join(shlex.quote(argument) for argument in arguments)
