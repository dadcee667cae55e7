"""What the suite found, in words: medians with quartiles, ratios of turns with intervals, and the aims beside the figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from benchmarks.of_estimators import role
from benchmarks.turns import IN

COMPILED, EAGER = "Pyro TraceGrad_ELBO compiled", "Pyro TraceGrad_ELBO"
JOINT = f"{COMPILED}, joint optimizer"


@dataclass(frozen=True)
class Ratio:
    """The median over turns of one contestant's time over another's, with a 95% interval (nan from a single number)."""

    middle: float
    low: float = np.nan
    high: float = np.nan

    def __str__(self) -> str:
        if np.isnan(self.low):
            return short(self.middle)
        return f"{short(self.middle)} ({short(self.low)} to {short(self.high)})"


@dataclass(frozen=True)
class Aim:
    """A ratio of two contestants that should be at most (or at least) a bound, on the works that it speaks of."""

    text: str
    above: str
    below: str
    bound: float
    kinds: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    at_least: bool = False
    quantity: str = "step_ms"

    def met(self, ratio: Ratio) -> bool:
        """Whether the median keeps the bound."""
        return ratio.middle >= self.bound if self.at_least else ratio.middle <= self.bound

    def speaks_of(self, row: pd.Series) -> bool:
        """Whether this is an aim for a work."""
        return row["kind"] in self.kinds and (not self.sizes or row["size"] in self.sizes)


def short(value: float) -> str:
    """Return a number with three digits, without an exponent where there need be none.

    >>> short(1234.5), short(0.01234)
    ('1,234', '0.0123')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


GRAPH, BY_HAND = "Pyro TraceGraph_ELBO", "PyTorch by hand"
AIMS = [
    Aim("Pyro, eager: / Trace_ELBO", EAGER, "Pyro Trace_ELBO", 1.25, ("chain", "sbn"), (10, 50, 200)),
    Aim("Pyro, compiled: / PyTorch by hand", COMPILED, BY_HAND, 1.0, ("sbn",)),
    Aim("Pyro, compiled: TraceGraph_ELBO /", GRAPH, COMPILED, 5.0, ("sbn",), at_least=True),
    Aim("Pyro, compiled: / JitTraceGraph_ELBO", COMPILED, "Pyro JitTraceGraph_ELBO", 1.0, ("sbn",)),
    Aim("Pyro, compiled: TraceGraph_ELBO /", GRAPH, COMPILED, 50.0, ("chain",), (50, 200), at_least=True),
    Aim("Pyro, compiled: / jitted NumPyro", COMPILED, "NumPyro TraceGrad_ELBO", 1.5, ("chain",), (50, 200)),
    Aim("Pyro, compiled: / jitted Trace_ELBO of NumPyro", COMPILED, "NumPyro Trace_ELBO", 1.5, ("chain",), (50, 200)),
    Aim("Pyro, compiled, joint: / jitted NumPyro", JOINT, "NumPyro TraceGrad_ELBO", 1.5, ("chain",), (50, 200)),
    Aim(
        "Pyro, compiled, joint: / jitted Trace_ELBO of NumPyro", JOINT, "NumPyro Trace_ELBO", 1.5, ("chain",), (50, 200)
    ),
    Aim("NumPyro: / JAX by hand", "NumPyro TraceGrad_ELBO", "JAX by hand", 1.05, ("sbn", "chain", "scan", "plate")),
    Aim(
        "NumPyro: / JAX by hand, the host's keys",
        "NumPyro TraceGrad_ELBO",
        "JAX by hand, the host's keys",
        1.05,
        ("chain", "scan"),
    ),
    Aim(
        "NumPyro, independent keys: / JAX by hand",
        "NumPyro TraceGrad_ELBO, independent keys",
        "JAX by hand",
        1.05,
        ("chain", "scan"),
    ),
    Aim(
        "NumPyro, independent keys: / JAX by hand, these keys",
        "NumPyro TraceGrad_ELBO, independent keys",
        "JAX by hand, independent keys",
        1.05,
        ("chain", "scan"),
    ),
    Aim(
        "NumPyro, gradient only: / JAX by hand",
        "NumPyro TraceGrad_ELBO gradient only",
        "JAX by hand gradient only",
        1.05,
        ("sbn", "chain", "scan", "plate"),
    ),
    Aim(
        "NumPyro, compiling: / Trace_ELBO",
        "NumPyro TraceGrad_ELBO",
        "NumPyro Trace_ELBO",
        1.1,
        ("chain",),
        quantity="compile_s",
    ),
]
"""The project's aims for speed."""

REFERENCES = {"Pyro": "Pyro Trace_ELBO", "NumPyro": "NumPyro Trace_ELBO"}


def ratio(frame: pd.DataFrame, work: str, above: str, below: str, quantity: str = "step_ms") -> Ratio | None:
    """Return the ratio of two contestants on a work, paired turn by turn; None where one of them has no number."""
    mine = frame[(frame["work"] == work) & (frame["quantity"] == quantity)]
    first, second = (mine[mine["contestant"] == name] for name in (above, below))
    if first.empty or second.empty:
        return None
    if quantity != "step_ms":
        return Ratio(first["value"].median() / second["value"].median())
    paired = first.merge(second, on=["cell", "turn"], suffixes=("_above", "_below"))
    return _interval(tuple(paired["value_above"] / paired["value_below"]))


def beside_another(frame: pd.DataFrame) -> str:
    """Return, as Markdown, each contestant's step over its step in another checkout, turn by turn, with a 95% interval."""
    lines = ["| work | contestant | step here / there | ms here | ms there |", "|---|---|---:|---:|---:|"]
    for work in frame["work"].unique():
        for there in (name for name in frame["contestant"].unique() if IN in name):
            here = there.partition(IN)[0]
            mine = frame[(frame["work"] == work) & (frame["quantity"] == "step_ms")]
            times = [mine[mine["contestant"] == name]["value"].median() for name in (here, there)]
            found = ratio(frame, work, here, there)
            if found is not None:
                lines.append(f"| {work} | {here} | {found} | {' | '.join(map(short, times))} |")
    return "\n".join(lines) + "\n"


@cache
def _interval(ratios: tuple[float, ...]) -> Ratio | None:
    if not ratios:
        return None
    if len(ratios) < 3:
        return Ratio(float(np.median(ratios)))
    found = bootstrap(
        (np.array(ratios),), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    )
    return Ratio(float(np.median(ratios)), *map(float, found.confidence_interval))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each work and contestant, with medians and quartiles."""
    rows = []
    for _, mine in frame.groupby(["work", "contestant"], sort=False):
        first = mine.iloc[0]
        row = {key: first[key] for key in ("work", "kind", "size", "layers", "contestant", "status", "reason", "note")}
        numbers = mine.dropna(subset=["value"]).groupby("quantity")["value"]
        row |= numbers.median().to_dict()
        if "step_ms" in numbers.groups:
            row["step_25"], row["step_75"] = numbers.get_group("step_ms").quantile([0.25, 0.75])
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """Return everything as one Markdown page: the aims, all steps, and a table for each work."""
    rows = summary(frame)
    plain = rows[~rows["contestant"].map(is_estimator)]
    parts = ["# How fast", _about(frame), "## Aims", aims_table(frame), "## A step, ms (median)", _overview(plain)]
    for work in dict.fromkeys(plain["work"]):
        parts += [f"## {work}", _work_table(frame, plain[plain["work"] == work])]
    if (estimators := rows[rows["contestant"].map(is_estimator)]).size:
        parts += ["## Every estimator", estimator_table(frame, estimators)]
    return "\n\n".join(parts) + "\n"


def is_estimator(name: str) -> bool:
    """Whether a contestant is one of an estimator's (`of_estimators.py`)."""
    return role(name) is not None


def _about(frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    versions: dict[str, str] = {}
    for text in frame["versions"].unique():
        versions |= json.loads(text)
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"One thread on one core of {first['processor']} ({first['system']}), seed {first['seed']}, "
        f"{first['date'][:10]}. {named}.\n\n"
        "Every contestant runs in its own process; all contestants of a work take turns in a new order each round. A step is "
        "`SVI.step` or a jitted `SVI.update`, with Adam. Where an estimator is chosen it is the score function without a "
        "baseline, for all; `TraceEnum_ELBO` is exact enumeration where a site can be enumerated, and NumPyro's "
        "`Trace_ELBO` has no gradient for discrete sites: it is here for its time. A ratio is the median over rounds, with the "
        "bootstrap's 95% interval. The times to the first step and to full speed (four steps: some compile on their second or "
        "third) are those of a fresh process with cold caches, imports included."
    )


def aims_table(frame: pd.DataFrame) -> str:
    """Return the aims beside the figures."""
    rows = []
    works = frame.drop_duplicates("work")
    for aim in AIMS:
        for _, work in works[works.apply(aim.speaks_of, axis=1)].iterrows():
            names = frame.loc[frame["work"] == work["work"], "contestant"]
            if not {aim.above, aim.below} <= set(names):
                continue
            found = ratio(frame, work["work"], aim.above, aim.below, aim.quantity)
            bound = f"{'≥' if aim.at_least else '≤'} {aim.bound:g}"
            if found is None:
                out = next(name for name in (aim.above, aim.below) if _reason(frame, work["work"], name))
                rows.append((aim.text, work["work"], f"{out}: {_reason(frame, work['work'], out)}", bound, "no figure"))
            else:
                rows.append((aim.text, work["work"], str(found), bound, "met" if aim.met(found) else "not met"))
    return table(("aim", "work", "figure", "bound", ""), rows)


def _reason(frame: pd.DataFrame, work: str, name: str) -> str:
    return frame.loc[(frame["work"] == work) & (frame["contestant"] == name), "reason"].iloc[0]


def _overview(rows: pd.DataFrame) -> str:
    works = list(dict.fromkeys(rows["work"]))
    lines = []
    for name in dict.fromkeys(rows["contestant"]):
        cells = []
        for work in works:
            mine = rows[(rows["work"] == work) & (rows["contestant"] == name)]
            cells.append(_step(mine.iloc[0]) if len(mine) else "")
        lines.append((name, *cells))
    return table(("contestant", *works), lines)


def _step(row: pd.Series) -> str:
    """Return a step's time, or why there is none."""
    if row["status"] == "measured":
        return short(row["step_ms"])
    return row["reason"].split(" (")[0] if row["status"] == "given up" else row["status"]


def _work_table(frame: pd.DataFrame, rows: pd.DataFrame) -> str:
    lines = []
    for _, row in rows.iterrows():
        name = row["contestant"]
        reference = REFERENCES.get(name.split()[0], "") + " gradient only" * name.endswith(" gradient only")
        if row["status"] != "measured":
            lines.append((name, "", "", *_starting(row), row["reason"]))
            continue
        relative = ratio(frame, row["work"], name, reference)
        spread = f"{short(row['step_ms'])} ({short(row['step_25'])} to {short(row['step_75'])})"
        lines.append((name, spread, "" if relative is None else str(relative), *_starting(row), row["note"]))
    columns = (
        "contestant",
        "step, ms (quartiles)",
        "/ library's Trace_ELBO",
        "import, s",
        "trace, s",
        "compile, s",
        "to first step, s",
        "to full speed, s",
        "peak, MiB",
        "note",
    )
    return table(columns, lines)


def _starting(row: pd.Series) -> tuple[str, ...]:
    names = ("import_s", "trace_s", "compile_s", "to_first_step_s", "to_full_speed_s")
    return (*(_number(row.get(name), ".2g") for name in names), _number(row.get("peak_mib"), ".0f"))


def _number(value: float | None, form: str) -> str:
    return "" if value is None or pd.isna(value) else format(value, form)


RATIOS = (
    ("Pyro / limit", "Pyro", "Pyro's limit", 1.5),
    ("the same, validation off", "Pyro, validation off", "Pyro's limit, validation off", 1.5),
    ("Pyro compiled / NumPyro", "Pyro compiled", "NumPyro", 1.5),
    ("the same, joint optimizer", "Pyro compiled, joint optimizer", "NumPyro", 1.5),
    ("NumPyro / JAX by hand", "NumPyro", "JAX by hand", 1.1),
    ("Pyro / PyTorch by hand", "Pyro", "PyTorch by hand", None),
)
"""An estimator's ratios: what is above and what below, and the aim."""
TIMES = ("Pyro", "Pyro, validation off", "Pyro compiled", "Pyro compiled, joint optimizer", "NumPyro")
NETWORKS = (("", "on"), (", validation off", "off"))
ABOUT_ESTIMATORS = (
    "The limit of a step in Pyro is that of `Trace_ELBO` with as many vectorized particles as the step has evaluations of the program. "
    "What is above its aim (Pyro 1.5, or 1.25 where there is one evaluation; compiled 1.5; by hand 1.1) stands in bold."
)


def estimator_table(frame: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Return a line for each estimator: its evaluations, its ratios with their aims, and its steps in milliseconds."""
    lines, reasons = [], []
    roles = rows["contestant"].map(role)
    for text in dict.fromkeys(found[0] for found in roles):
        mine = {what: row for (_, row), (name, what) in zip(rows.iterrows(), roles, strict=True) if name == text}
        notes = [row["note"].split()[1] for row in mine.values() if row["note"].startswith("evaluations")]
        count = notes[0] if notes else ""
        cells = [_against_aim(frame, mine, above, below, aim, count) for _, above, below, aim in RATIOS]
        lines.append((f"`{text}`", count, *cells, *(_step(mine[what]) if what in mine else "" for what in TIMES)))
        reasons += _beside_a_network(frame, mine)
        reasons += [f"- {row['contestant']}: {row['reason']}" for row in mine.values() if row["reason"]]
    columns = ("estimator", "evaluations", *(name for name, *_ in RATIOS), *(f"{what}, ms" for what in TIMES))
    return "\n\n".join([ABOUT_ESTIMATORS, table(columns, lines), *(["\n".join(reasons)] if reasons else [])])


def _beside_a_network(frame: pd.DataFrame, mine: dict[str, pd.Series]) -> list[str]:
    """Return what a step costs beside the host's step that trains the same network, in a line of text; none without it."""
    found = []
    for suffix, word in NETWORKS:
        above, below = mine.get(f"Pyro{suffix}"), mine.get(f"Pyro's limit with a network{suffix}")
        if above is not None and below is not None:
            beside = ratio(frame, above["work"], above["contestant"], below["contestant"])
            found.append(f"{beside} with validation {word}")
    return (
        [f"- Pyro `default` / `Trace_ELBO` that trains the same network beside it: {', '.join(found)}."]
        if found
        else []
    )


def _against_aim(
    frame: pd.DataFrame, mine: dict[str, pd.Series], above: str, below: str, aim: float | None, evaluations: str
) -> str:
    if not {above, below} <= set(mine):
        return ""
    found = ratio(frame, mine[above]["work"], mine[above]["contestant"], mine[below]["contestant"])
    if found is None:
        return "-"
    bound = 1.25 if aim == 1.5 and evaluations == "1" and above.startswith("Pyro,") else aim
    return f"**{found}**" if bound is not None and found.middle > bound else str(found)


TEXTS = ("aim", "work", "contestant", "library", "estimator", "note", "")


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table, its numbers to the right.

    >>> print(table(("work", "ms"), [("x", "1")]))
    | work | ms |
    |---|---:|
    | x | 1 |
    """
    marks = ["---" if column in TEXTS else "---:" for column in columns]
    head, *body = [f"| {' | '.join(line)} |" for line in (columns, *rows)]
    return "\n".join([head, f"|{'|'.join(marks)}|", *body])
