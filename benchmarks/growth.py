"""How a step's time and memory grow with the work: `make bench-growth`.

Latents, particles, categories, steps of a loop and data grow, one at a time, from small to large. A slope is that of the logarithm of the time (or
of the peak memory beyond what is held after the imports) over that of the size, between the two largest sizes that were measured: 1 where twice the
work takes twice the time. pplgrad has the estimator that a site gets by default; the hosts have their own ELBOs.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.shared import ROOT
from benchmarks.tables import short, table
from benchmarks.works import Work

NAMES = (
    *("Pyro Trace_ELBO", "Pyro TraceGraph_ELBO", "Pyro default", "Pyro default compiled"),
    *("NumPyro Trace_ELBO", "NumPyro TraceGraph_ELBO", "NumPyro default"),
)
AXES: dict[str, dict[int, Work]] = {
    "latents": {n: Work("sbn", n) for n in (50, 200, 1000, 5000)},
    "particles": {n: Work("sbn", 50, particles=n) for n in (1, 10, 100, 1000)},
    "categories": {n: Work("categorical", n) for n in (2, 10, 100, 1000, 10_000)},
    "steps of a loop": {n: Work("scan", n) for n in (10, 100, 500, 2000)},
    "data": {n: Work("plate", 10, batch=n) for n in (100, 1000, 10_000, 100_000)},
}
LIMITS = {"steps of a loop": 120.0}
MEASURES = {"step_ms": "ms", "peak_mib": "MiB beyond imports"}


def contestants(work: Work) -> tuple[str, ...]:
    """Return who takes part in a work: NumPyro's TraceGraph_ELBO is wrong inside of `scan`."""
    return tuple(name for name in NAMES if not (work.kind == "scan" and name == "NumPyro TraceGraph_ELBO"))


def found(frame: pd.DataFrame, work: str, name: str, measure: str) -> float:
    """Return the median of what was measured; nan if nothing was."""
    mine = frame[(frame["work"] == work) & (frame["contestant"] == name)].groupby("quantity")["value"].median()
    if measure == "step_ms" or measure not in mine:
        return float(mine.get(measure, math.nan))
    return float(mine[measure] - mine.get("imported_mib", 0.0))


def slope(sizes: list[int], values: list[float]) -> str:
    """Return the slope between the two largest sizes that have a positive number.

    >>> slope([10, 100, 1000], [1.0, 5.0, 50.0])
    '1.00'
    """
    known = [(n, x) for n, x in zip(sizes, values, strict=True) if x > 0]
    if len(known) < 2:
        return "-"
    (n, x), (m, y) = known[-2:]
    return f"{math.log(y / x) / math.log(m / n):.2f}"


def markdown(frame: pd.DataFrame) -> str:
    """Return a table for each of what grows and each measure."""
    parts = []
    for axis, works in AXES.items():
        present = {n: work for n, work in works.items() if work.name in set(frame["work"])}
        for measure, unit in MEASURES.items():
            rows = []
            for name in NAMES if present else ():
                values = [found(frame, work.name, name, measure) for work in present.values()]
                cells = (short(x) if x == x else "-" for x in values)
                if any(x == x for x in values):
                    rows.append((name, *cells, slope(list(present), values)))
            if rows:
                columns = ("contestant", *(f"{n:,}" for n in present), "slope")
                parts += [f"### {axis.capitalize()}, {unit}", table(columns, rows)]
    return "\n\n".join(parts) + "\n"


@click.command(help=__doc__)
@click.option("--axis", "axes", multiple=True, type=click.Choice(list(AXES)), help="Only these.")
@click.option("--largest", type=int, help="Leave out sizes above this one.")
@click.option("--contestant", "names", multiple=True, help="Only contestants that match, such as 'Pyro *'.")
@click.option("--turns", default=8, show_default=True)
@click.option("--seconds", default=0.8, show_default=True, help="Measuring time of each contestant on a work.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "results" / "bench-growth")
def main(
    axes: tuple[str, ...], largest: int | None, names: tuple[str, ...], turns: int, seconds: float, out: Path
) -> None:
    from benchmarks.suite import Cell, chosen, measured

    cells = [
        Cell(work, contestants(work), LIMITS.get(axis, 60.0))
        for axis, works in AXES.items()
        for n, work in works.items()
        if (not axes or axis in axes) and (largest is None or n <= largest)
    ]
    text = markdown(measured(chosen(cells, (), names), turns, seconds, 0, out))
    (out / "growth.md").write_text(text)
    Console().print(Markdown(text))


if __name__ == "__main__":
    main()
