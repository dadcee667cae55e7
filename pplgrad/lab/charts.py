"""The charts of a study's page: they answer to the pointer, take the page's colours and fit its width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from pplgrad.lab.answer import LIBRARIES
from pplgrad.lab.intervals import mean_and_half_width
from pplgrad.lab.palette import COLOURS, colour, dash
from pplgrad.lab.results import judged
from pplgrad.lab.summaries import curves, shares, what_is_judged, window

_TEXT = "currentColor"
_ROW = 22


@dataclass(frozen=True)
class Figure:
    """Charts side by side under one caption; each is a Vega-Lite specification."""

    name: str
    caption: str
    charts: list[dict[str, Any]]


def training_figures(frame: pd.DataFrame) -> Iterator[Figure]:
    """Yield the figures of training: against time first."""
    points = curves(frame)
    if points.empty:
        return
    names = list(dict.fromkeys(frame["estimator"]))
    many = points["seed"].nunique() > 1
    spread = "Mean over seeds with its 95% interval" if many else "One seed"
    for across, words in (("time", "time in training steps"), ("step", "training steps")):
        yield Figure(
            f"training-{across}",
            f"Test {judged(frame)[0]} against {words}. {spread}. A click on a name in the legend leaves the others pale.",
            [
                _curves(own, names, across, str(backend), frame)
                for backend, own in points.groupby("backend", sort=False)
            ],
        )


def gradient_figures(frame: pd.DataFrame, table: pd.DataFrame) -> Iterator[Figure]:
    """Yield the figures of gradients at the snapshots, from the table of them."""
    if table.empty:
        return
    names = list(dict.fromkeys(frame["estimator"]))
    panels = list(table.groupby(level=["step", "backend"], sort=False))
    yield Figure(
        "gradients-time",
        "Mean squared error of the program's gradient against the time of one, at each snapshot; towards the lower left is better.",
        [_scatter(rows, names, step, backend, judged(frame)[1]) for (step, backend), rows in panels],
    )
    yield Figure(
        "gradients-bias",
        "Variance and squared bias of the program's gradient, as a share of its squared norm.",
        [_shares(rows, names, step, backend) for (step, backend), rows in panels],
    )


def _curves(points: pd.DataFrame, names: list[str], across: str, backend: str, frame: pd.DataFrame) -> dict[str, Any]:
    rows = []
    for (name, step), seeds in points.groupby(["estimator", "step"], sort=False):
        mean, half = mean_and_half_width(seeds["test"])
        low, high = (mean, mean) if np.isnan(half) else (mean - half, mean + half)
        time = float(seeds["time"].iloc[0])
        rows.append(dict(estimator=name, step=int(step), time=time, mean=mean, low=low, high=high))
    data = pd.DataFrame(rows)
    title = "training steps" if across == "step" else "time in training steps, s"
    picked = alt.selection_point(fields=["estimator"], bind="legend")
    chart = alt.Chart(data).encode(
        x=alt.X(f"{across}:Q", title=title),
        color=_colours(names),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.15)),
    )
    lowest, highest = window(points["test"]) or (0.0, 1.0)
    room = 0.05 * (highest - lowest)
    scale = alt.Scale(domain=[lowest - room, highest + room], nice=False, zero=False, clamp=False)
    value = alt.Y("mean:Q", title=f"test {what_is_judged(frame)}", scale=scale)
    tooltip = ["estimator", "step", alt.Tooltip("time:Q", format=".3g"), *_numbers("mean", "low", "high")]
    band = chart.mark_area(clip=True).encode(
        y=alt.Y("low:Q", scale=scale, title=""), y2="high:Q", opacity=alt.condition(picked, alt.value(0.15), alt.value(0.02))
    )  # fmt: skip
    line = chart.mark_line(clip=True, strokeWidth=1.8).encode(y=value, strokeDash=_dashes(names))
    dots = chart.mark_circle(clip=True, size=24).encode(y=value, tooltip=tooltip)
    return _finished((band + line + dots).add_params(picked), 300, LIBRARIES[backend])


def _scatter(rows: pd.DataFrame, names: list[str], step: int, backend: str, scale: str) -> dict[str, Any]:
    data = pd.DataFrame(
        {q: rows[q, "mean"].to_numpy(float) for q in ("mse", "milliseconds", "evaluations", "variance")}
    )
    data["estimator"] = rows.index.get_level_values("estimator")
    picked = alt.selection_point(fields=["estimator"], bind="legend")
    chart = (
        alt.Chart(data)
        .mark_point(filled=True, size=90)
        .encode(
            x=alt.X("milliseconds:Q", scale=alt.Scale(type="log", nice=False, padding=12), title="time of a gradient, ms"),
            y=alt.Y("mse:Q", scale=alt.Scale(type="log", nice=False, padding=12), title=f"mean squared error, ({scale} / datum)²"),
            color=_colours(names, "circle"),
            opacity=alt.condition(picked, alt.value(1.0), alt.value(0.15)),
            tooltip=["estimator", *_numbers("mse", "milliseconds", "variance", "evaluations")],
        )
        .add_params(picked)
    )  # fmt: skip
    return _finished(chart, 260, f"{LIBRARIES[backend]}, {step:,} steps")


def _shares(rows: pd.DataFrame, names: list[str], step: int, backend: str) -> dict[str, Any]:
    data = shares(rows).rename(columns={"bias2": "bias²"})
    least = float(data.pop("least").iloc[0])
    order = [name for name in names if name in set(data["estimator"])]
    scale = alt.Scale(type="log", nice=False, domainMin=least)
    # A long name goes on below, after a comma.
    lines = "split(replace(datum.label, regexp(', ', 'g'), ',\\n'), '\\n')"
    base = alt.Chart(data).encode(
        y=alt.Y("estimator:N", sort=order, title=None, axis=alt.Axis(labelLimit=180, labelExpr=lines))
    )
    tooltip = ["estimator", *_numbers("variance", "bias²", "low", "high")]

    def of(mark: Any, what: str, colour: str) -> Any:
        legend = alt.Color(field="what", type="nominal", title=None, scale=_two()).legend(orient="top")
        chart = mark.transform_calculate(what=f"'{colour}'")
        return chart.encode(x=alt.X(f"{what}:Q", scale=scale, title="share of the squared gradient"), color=legend, tooltip=tooltip)  # fmt: skip

    spread = of(base.mark_rule(strokeWidth=2), "low", "bias²").encode(x2="high:Q")
    bias = of(base.transform_filter("datum['bias²'] > 0").mark_point(shape="cross", size=60), "bias²", "bias²")
    variance = of(base.mark_circle(size=70), "variance", "variance")
    # A mark without any value would have no scale.
    layers = [spread, bias, variance] if data["bias²"].notna().any() else [spread, variance]
    return _finished(alt.layer(*layers), _ROW * len(order) + 10, f"{LIBRARIES[backend]}, {step:,} steps")


def _two() -> alt.Scale:
    return alt.Scale(domain=["variance", "bias²"], range=list(COLOURS[:2]))


def _colours(names: list[str], symbol: str = "stroke") -> alt.Color:
    # Black would not be seen on a dark page.
    found = [_TEXT if (shown := colour(names, name)) == "#000000" else shown for name in names]
    scale = alt.Scale(domain=names, range=found)
    return alt.Color("estimator:N", scale=scale, sort=names, title=None, legend=_legend(symbol, names))


def _dashes(names: list[str]) -> alt.StrokeDash:
    scale = alt.Scale(domain=names, range=[list(dash(names, name)) for name in names])
    return alt.StrokeDash("estimator:N", scale=scale, sort=names, title=None, legend=_legend("stroke", names))


def _legend(symbol: str, names: list[str]) -> alt.Legend:
    # On a narrow page two columns have room for this many letters each.
    columns = 2 if max(map(len, names), default=0) <= 24 else 1
    return alt.Legend(orient="bottom", columns=columns, title=None, symbolType=symbol, labelLimit=320, symbolOpacity=1)


def _numbers(*fields: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(field=field, type="quantitative", format=".4g") for field in fields]


def _finished(chart: Any, height: int, title: str) -> dict[str, Any]:
    """Return a chart's specification, in the page's own colours and as wide as its place."""
    shown = chart.properties(width="container", height=height, background="transparent").properties(
        title=alt.TitleParams(title, anchor="start", fontSize=13, color=_TEXT)
    )
    axis = dict(labelColor=_TEXT, titleColor=_TEXT, domainColor="#888", tickColor="#888", gridColor="#8884")
    return (
        shown.configure_axis(**axis)
        .configure_legend(labelColor=_TEXT, titleColor=_TEXT)
        .configure_view(stroke=None)
        .to_dict()
    )
