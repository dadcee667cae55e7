"""The suite's picture: the time of a step of every contestant, a panel for each work."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.tables import is_estimator, short, summary
from pplgrad.lab.palette import COLOURS

matplotlib.use("Agg", force=False)

# A colour and a marker for each library.
STYLES = {
    "Pyro": (COLOURS[0], "o"),
    "NumPyro": (COLOURS[1], "s"),
    "PyTorch": (COLOURS[5], "D"),
    "JAX": (COLOURS[4], "^"),
    "Storchastic": (COLOURS[2], "v"),
}
ACROSS = 3


def draw(frame: pd.DataFrame, out: Path) -> list[Path]:
    """Write the picture as PNG and SVG; return the files. Works without a measured step have no panel."""
    import matplotlib.pyplot as plt

    rows = summary(frame)
    rows = rows[(rows["status"] == "measured") & ~rows["contestant"].map(is_estimator)]
    works = list(dict.fromkeys(rows["work"]))
    if not works:
        return []
    across = min(ACROSS, len(works))
    down = -(-len(works) // across)
    tall = 0.24 * rows.groupby("work").size().max() + 1.0
    with plt.rc_context({"figure.constrained_layout.use": True, "svg.hashsalt": "pplgrad", "font.size": 8}):
        figure, axes = plt.subplots(down, across, figsize=(5.2 * across, tall * down), squeeze=False)
        for axis, work in zip(axes.ravel(), works, strict=False):
            _panel(axis, rows[rows["work"] == work], work)
        for axis in axes.ravel()[len(works) :]:
            axis.set_axis_off()
        files = [out / f"bench.{kind}" for kind in ("png", "svg")]
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
        plt.close(figure)
    return files


def _panel(axis: matplotlib.axes.Axes, rows: pd.DataFrame, work: str) -> None:
    for place, (_, row) in enumerate(rows.iterrows()):
        color, marker = STYLES[row["contestant"].split()[0]]
        ours = "TraceGrad_ELBO" in row["contestant"]
        axis.hlines(place, row["step_25"], row["step_75"], color=color, linewidth=2)
        axis.plot(row["step_ms"], place, marker, color=color, markersize=6, fillstyle="full" if ours else "none")
        axis.annotate(short(row["step_ms"]), (row["step_75"], place), (6, -3), textcoords="offset points", fontsize=7)
    axis.set(xscale="log", title=work, xlabel="a step, ms (median, quartiles); filled: pplgrad")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(range(len(rows)), rows["contestant"])
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
