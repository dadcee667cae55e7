"""The pictures of a study, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from pplgrad.lab.results import best_rates, gradient_table, judged

matplotlib.use("Agg", force=False)

# Okabe and Ito's palette.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":"]
MARKERS = "osD^vPX*<>hd"


def pictures(frame: pd.DataFrame) -> Iterator[tuple[str, str, Any]]:
    """Yield a name, a caption and a figure for each picture that the data can give."""
    names = list(dict.fromkeys(frame["estimator"]))
    training, gradients = best_rates(frame), gradient_table(frame)
    if not training.empty:
        yield (
            "training-steps",
            f"{judged(frame)[0]} of the test data against training steps; the band is the range over seeds.",
            _curves(training, names, "step"),
        )
        yield (
            "training-time",
            f"{judged(frame)[0]} of the test data against the time spent in training steps.",
            _curves(training, names, "seconds"),
        )
    if not gradients.empty:
        yield (
            "gradients-time",
            "Mean squared error of the gradient against the time of one, at each snapshot; towards the lower left is better.",
            _scatter(gradients, names, judged(frame)[1]),
        )
        yield (
            "gradients-bias",
            "Squared bias and variance of the gradient, as a share of its squared norm.",
            _bars(gradients, names),
        )


def _style(names: list[str], name: str) -> dict[str, Any]:
    i = names.index(name)
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": STYLES[(i // len(PALETTE)) % len(STYLES)]}


def _curves(training: pd.DataFrame, names: list[str], across: str) -> Any:
    import matplotlib.pyplot as plt

    backends = list(dict.fromkeys(training["backend"]))
    figure, axes = plt.subplots(1, len(backends), figsize=(5.4 * len(backends), 4.2), sharey=True, squeeze=False)
    points = training[training["part"] == "curve"].pivot_table(
        index=["backend", "estimator", "seed", "step"], columns="quantity", values="value", sort=False
    )
    for axis, backend in zip(axes[0], backends, strict=True):
        for name in names:
            mine = points.loc[(backend, name)] if (backend, name) in points.index else None
            if mine is None:
                continue
            by_step = mine.groupby("step")
            x = by_step["seconds"].mean() if across == "seconds" else np.array(by_step["test"].mean().index, float)
            axis.plot(x, by_step["test"].mean(), label=name, **_style(names, name))
            axis.fill_between(
                x,
                by_step["test"].min(),
                by_step["test"].max(),
                color=_style(names, name)["color"],
                alpha=0.15,
                linewidth=0,
            )
        axis.set(title=backend, xlabel="training steps" if across == "step" else "time in training steps, s")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test {}, {} / datum".format(*judged(training)))
    _zoom(axes[0], points["test"])
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside right upper", fontsize="small")
    return figure


def _zoom(axes: Any, values: pd.Series) -> None:
    """Leave out of view the first steps' values, which would flatten all that follows."""
    low, high = np.nanquantile(values, [0.1, 1.0])
    if np.isfinite([low, high]).all() and high > low:
        axes[0].set_ylim(low, high + 0.05 * (high - low))


def _scatter(table: pd.DataFrame, names: list[str], scale: str) -> Any:
    import matplotlib.pyplot as plt

    steps, backends = (list(dict.fromkeys(table.index.get_level_values(level))) for level in ("step", "backend"))
    shape = dict(nrows=len(backends), ncols=len(steps), squeeze=False, sharex="row", sharey=True)
    figure, axes = plt.subplots(figsize=(4.2 * len(steps) + 1.6, 3.6 * len(backends)), **shape)  # type: ignore[call-overload]
    for (step, backend, name), row in table.iterrows():  # type: ignore[misc]
        axis = axes[backends.index(backend)][steps.index(step)]
        i = names.index(name)
        axis.plot(
            row["milliseconds"],
            row["mse"],
            MARKERS[i % len(MARKERS)],
            color=PALETTE[i % len(PALETTE)],
            label=name,
            linestyle="",
        )
    for i, backend in enumerate(backends):
        for j, step in enumerate(steps):
            axes[i][j].set(xscale="log", yscale="log", title=f"{backend}, {step:,} steps")
            axes[i][j].grid(alpha=0.3)
            _plain_numbers(axes[i][j].xaxis)
            _plain_numbers(axes[i][j].yaxis)
        axes[i][0].set_ylabel(f"mean squared error, ({scale} / datum)²")
    for axis in axes[-1]:
        axis.set_xlabel("time of a gradient, ms")
    _legend(figure, axes, names)
    return figure


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade, where few decades would leave powers that run into one another."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _bars(table: pd.DataFrame, names: list[str]) -> Any:
    import matplotlib.pyplot as plt

    steps, backends = (list(dict.fromkeys(table.index.get_level_values(level))) for level in ("step", "backend"))
    height = 0.28 * len(names) + 1.2
    shape = dict(nrows=len(backends), ncols=len(steps), squeeze=False, sharex=True, sharey=True)
    figure, axes = plt.subplots(figsize=(4.2 * len(steps) + 1.2, height * len(backends)), **shape)  # type: ignore[call-overload]
    for i, backend in enumerate(backends):
        for j, step in enumerate(steps):
            axis = axes[i][j]
            rows = table.loc[(step, backend)].reindex(names)
            # The squared norm is estimated without its noise, and may come out negative where the gradient is near zero.
            norm = max(float(rows["gradient2"].median()), 1e-3 * float(rows["variance"].min()), 1e-30)
            places = np.arange(len(names))
            axis.plot(rows["variance"] / norm, places, "o", color=PALETTE[0], label="variance")
            low, high = (((rows["bias2"] + sign * rows["bias2_se"]) / norm).clip(lower=1e-12) for sign in (-1, 1))
            axis.hlines(places, low, high, color=PALETTE[1])
            axis.plot((rows["bias2"] / norm).where(rows["bias2"] > 0), places, "x", color=PALETTE[1], label="bias²")
            axis.set(xscale="log", yticks=places, yticklabels=names, title=f"{backend}, {step:,} steps")
            axis.set_xlim(left=max(1e-8, float(rows["variance"].min() / norm) / 100))
            axis.grid(alpha=0.3)
            axis.invert_yaxis()
    for axis in axes[-1]:
        axis.set_xlabel("share of the squared gradient")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=2)
    return figure


def _legend(figure: Any, axes: Any, names: list[str]) -> None:
    found: dict[str, Any] = {}
    for axis in axes.ravel():
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    ordered = [name for name in names if name in found]
    figure.legend([found[n] for n in ordered], ordered, frameon=False, loc="outside right upper", fontsize="small")


def save(frame: pd.DataFrame, out: Path) -> list[tuple[str, str]]:
    """Write every picture as PNG and SVG; return their names and captions."""
    import matplotlib.pyplot as plt

    done = []
    with plt.rc_context({"figure.constrained_layout.use": True, "svg.hashsalt": "pplgrad"}):
        for name, caption, figure in pictures(frame):
            figure.savefig(out / f"{name}.png", dpi=150)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
            done.append((name, caption))
    return done
