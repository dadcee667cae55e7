"""The pictures of a study, as matplotlib axes and as files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd

from pplgrad.errors import ConfigurationError
from pplgrad.lab.dataset import StudyData
from pplgrad.lab.intervals import mean_and_half_width
from pplgrad.lab.palette import COLOURS, colour, dash, marker
from pplgrad.lab.results import judged
from pplgrad.lab.summaries import curves, gradient_table, shares, steps_of, what_is_judged, window
from pplgrad.lab.tasks import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

matplotlib.use("Agg", force=False)

_PANEL = (5.4, 4.2)
"""The size of one library's panel, in inches, the same in every study."""


def plot_training(
    study: StudyData | pd.DataFrame, backend: str | None = None, across: str = "time", ax: Axes | None = None
) -> Axes:
    """Plot the test value against time or steps, with its 95% interval over seeds.

    Args:
        study: what `load_study` returned, or its frame.
        backend: the library; may be left out where there is one.
        across: "time" (seconds in training steps, without warm-up) or "step".
        ax: matplotlib axes to draw on. Default: axes of a new figure.

    Returns:
        The axes.

    Raises:
        ConfigurationError: if the study has no training, or several libraries of which none is chosen.
    """
    frame = _frame(study)
    if across not in ("time", "step"):
        raise ConfigurationError(f"plot_training(across={across!r}): give 'time' or 'step'.")
    points = curves(frame)
    own = points[points["backend"] == _backend(points, backend, "training")]
    names, ax = list(dict.fromkeys(frame["estimator"])), _axes(ax)
    for name, runs in own.groupby("estimator", sort=False):
        steps = runs.groupby("step")
        x = steps["time"].first().to_numpy() if across == "time" else np.array(list(steps.groups), float)
        mean, half = np.array([mean_and_half_width(values) for _, values in steps["test"]]).T
        style: dict[str, Any] = {"color": colour(names, str(name)), "linestyle": (0, dash(names, str(name)))}
        ax.plot(x, mean, label=_label(name), **style)
        ax.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel="time in training steps, s" if across == "time" else "training steps")
    ax.set_ylabel(f"test {what_is_judged(frame)}")
    ax.grid(alpha=0.3)
    if (shown := window(own["test"])) is not None:
        low, high = shown
        ax.set_ylim(low, high + 0.05 * (high - low))
    return ax


def plot_variance(
    study: StudyData | pd.DataFrame, step: int | None = None, backend: str | None = None, ax: Axes | None = None
) -> Axes:
    """Plot the mean squared error of the program's gradient against the time of one, at one snapshot, on logarithmic axes.

    Args:
        study: what `load_study` returned, or its frame.
        step: the snapshot. Default: the last one.
        backend: the library; may be left out where there is one.
        ax: matplotlib axes to draw on. Default: axes of a new figure.

    Returns:
        The axes.

    Raises:
        ConfigurationError: if there are no gradients at that snapshot, or several libraries of which none is chosen.
    """
    frame = _frame(study)
    return _draw_variance(frame, _snapshot(gradient_table(frame), step, backend), _axes(ax))


def plot_bias(
    study: StudyData | pd.DataFrame, step: int | None = None, backend: str | None = None, ax: Axes | None = None
) -> Axes:
    """Plot variance and squared bias of the program's gradient at one snapshot, as a share of its squared norm.

    Args:
        study: what `load_study` returned, or its frame.
        step: the snapshot. Default: the last one.
        backend: the library; may be left out where there is one.
        ax: matplotlib axes to draw on. Default: axes of a new figure.

    Returns:
        The axes.

    Raises:
        ConfigurationError: if there are no gradients at that snapshot, or several libraries of which none is chosen.
    """
    frame = _frame(study)
    return _draw_bias(frame, _snapshot(gradient_table(frame), step, backend), _axes(ax))


def _draw_variance(frame: pd.DataFrame, rows: pd.DataFrame, ax: Axes) -> Axes:
    names = list(dict.fromkeys(frame["estimator"]))
    for name, row in rows.iterrows():
        style: dict[str, Any] = {"marker": marker(names, str(name)), "color": colour(names, str(name)), "linestyle": ""}
        ax.plot(row["milliseconds", "mean"], row["mse", "mean"], label=_label(name), **style)
    ax.set(xscale="log", yscale="log", xlabel="time of a gradient, ms")
    ax.set_ylabel(f"mean squared error, ({judged(frame)[1]} / datum)²")
    ax.grid(alpha=0.3)
    for axis in (ax.xaxis, ax.yaxis):
        _plain_numbers(axis)
    return ax


def _draw_bias(frame: pd.DataFrame, rows: pd.DataFrame, ax: Axes) -> Axes:
    names = [name for name in dict.fromkeys(frame["estimator"]) if name in rows.index]
    shown, places = shares(rows.loc[names]), np.arange(len(names))
    ax.plot(shown["variance"], places, "o", color=COLOURS[0], label="variance")
    ax.hlines(places, shown["low"], shown["high"], color=COLOURS[1])
    ax.plot(shown["bias2"], places, "x", color=COLOURS[1], label="bias²")
    ax.set(xscale="log", yticks=places, yticklabels=list(map(_label, names)), xlabel="share of the squared gradient")
    ax.set_xlim(left=float(shown["least"].iloc[0]))
    ax.grid(alpha=0.3)
    ax.invert_yaxis()
    return ax


def pictures(frame: pd.DataFrame, table: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """Yield a name and a figure for each picture that the data can give, a panel for each library; `table` is that of the gradients."""
    backends = list(dict.fromkeys(curves(frame)["backend"]))
    for across in ("time", "step") if backends else ():
        figure, axes = _panels(1, len(backends), sharey=True)
        for axis, backend in zip(axes[0], backends, strict=True):
            plot_training(frame, backend, across, axis)
        yield f"training-{across}", _labelled(figure, axes, [backends])
    if table.empty:
        return
    steps, backends = steps_of(table), list(dict.fromkeys(table.index.get_level_values("backend")))
    titles = [[f"{backend}, {step:,} steps" for step in steps] for backend in backends]
    for name, draw in (("gradients-time", _draw_variance), ("gradients-bias", _draw_bias)):
        figure, axes = _panels(len(backends), len(steps), sharey=True, sharex="row")
        for i, backend in enumerate(backends):
            for j, step in enumerate(steps):
                draw(frame, _snapshot(table, step, backend), axes[i][j])
        if name == "gradients-bias":
            # Shared axes are turned once for each panel.
            axes[0][0].set_ylim(len(axes[0][0].get_yticks()) - 0.5, -0.5)
        yield name, _labelled(figure, axes, titles)


def save(frame: pd.DataFrame, table: pd.DataFrame, out: Path) -> list[str]:
    """Write every picture as PNG and SVG; return their names."""
    import matplotlib

    done = []
    with matplotlib.rc_context({"figure.constrained_layout.use": True, "svg.hashsalt": "pplgrad"}):
        for name, figure in pictures(frame, table):
            for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                picture = io.BytesIO()
                figure.savefig(picture, format=kind, **options)
                write_atomically(out / f"{name}.{kind}", picture.getvalue())
            done.append(name)
    return done


def _panels(rows: int, columns: int, **shared: Any) -> tuple[Any, Any]:
    # Not by pyplot, which would show the user a figure that is only written, and count it with theirs.
    from matplotlib.figure import Figure

    width, height = _PANEL
    figure = Figure(figsize=(width * columns + 1.6, height * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _labelled(figure: Any, axes: Any, titles: Sequence[Sequence[str]]) -> Any:
    """Give a figure one legend, each panel its title, and labels to the outer panels alone."""
    found: dict[str, Any] = {}
    for row, names in zip(axes, titles, strict=True):
        for axis, name in zip(row, names, strict=True):
            axis.set_title(name)
            axis.label_outer()
            handles, labels = axis.get_legend_handles_labels()
            found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found, frameon=False, loc="outside right upper", fontsize="small")
    return figure


def _label(name: Any) -> str:
    """Return a name as matplotlib shows it letter by letter: dollars are formulas to it, and what begins with a line is left out."""
    text = str(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _frame(study: StudyData | pd.DataFrame) -> pd.DataFrame:
    return study if isinstance(study, pd.DataFrame) else study.frame


def _axes(ax: Axes | None) -> Axes:
    import matplotlib.pyplot as plt

    return ax if ax is not None else plt.subplots(figsize=_PANEL)[1]


def _backend(table: pd.DataFrame, backend: str | None, what: str) -> str:
    known = list(dict.fromkeys(table["backend"]))
    if not known:
        raise ConfigurationError(f"The study has no {what}.")
    if backend is None and len(known) > 1:
        raise ConfigurationError(f"The study has several libraries; give backend={' or '.join(map(repr, known))}.")
    if backend is not None and backend not in known:
        raise ConfigurationError(f"The study has no {what} in '{backend}'; it has: {', '.join(known)}.")
    return backend or known[0]


def _snapshot(table: pd.DataFrame, step: int | None, backend: str | None) -> pd.DataFrame:
    """Return what a table of gradients has of one snapshot and library, by estimator."""
    backend = _backend(pd.DataFrame(columns=["backend"]) if table.empty else table.reset_index(), backend, "gradients")
    table = table.xs(backend, level="backend")
    steps = steps_of(table)
    step = max(steps) if step is None else step
    if step not in steps:
        raise ConfigurationError(
            f"The study has no gradients after {step} steps; it has them after: {', '.join(map(str, steps))}."
        )
    return table.xs(step, level="step")


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade, where few decades would leave powers that run into one another."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axis.set_minor_formatter(NullFormatter())
