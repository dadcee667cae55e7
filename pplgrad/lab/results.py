"""What a study leaves: one tidy dataset, and the tables made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pplgrad.core.objectives import ELBO
from pplgrad.diagnostics.certificate import EVERYTHING
from pplgrad.lab.script import ScriptError
from pplgrad.lab.specs import judged_by
from pplgrad.lab.study import Study
from pplgrad.lab.tasks import Result, write_atomically

UNITS = {
    "train": "nats / datum",
    "test": "nats / datum",
    "weighted_bound": "nats / datum",
    "seconds": "s",
    "milliseconds": "ms",
    "gradient_variance": "(nats / datum)²",
    "gradient2": "(nats / datum)²",
    "bias2": "(nats / datum)²",
    "bias2_se": "(nats / datum)²",
    "variance": "(nats / datum)²",
    "mse": "(nats / datum)²",
    "evaluations": "programs",
    "peak_bytes": "bytes",
}
KEYS = [
    "kind",
    "backend",
    "estimator",
    "seed",
    "learning_rate",
    "step",
    "part",
    "name",
    "quantity",
    "value",
    "unit",
    "error",
]
FILE = "study.parquet"


def tidy(results: list[Result]) -> pd.DataFrame:
    """Return one row for each number that was measured; a run that failed has one row with its reason."""
    rows: list[dict[str, Any]] = []
    of_rewards = False
    for result in results:
        task = result["task"]
        of_rewards |= "objective" in task and judged_by(task["objective"]) != ELBO()
        key = {name: task[name] for name in ("kind", "backend", "estimator", "seed")}
        key |= {"learning_rate": task["settings"].get("learning_rate"), "step": None}
        if "error" in result:
            rows.append({**key, "error": result["error"]})
        elif task["kind"] == "training":
            rows += _training(key, task, result)
        elif task["kind"] == "gradients":
            for step, measured in result["snapshots"].items():
                rows += _gradients({**key, "step": int(step)}, {**measured, "evaluations": result["evaluations"]})
    frame = pd.DataFrame(rows, columns=KEYS)
    units = {q: unit.replace("nats", "reward") for q, unit in UNITS.items()} if of_rewards else UNITS
    frame["unit"] = frame["quantity"].map(units)
    return frame.astype({"step": "Int64", "value": float, "learning_rate": float})


def judged(frame: pd.DataFrame) -> tuple[str, str]:
    """Return what the curves of a dataset show, and its unit: the evidence lower bound, or a reward."""
    units = frame["unit"].dropna()
    return ("reward", "reward") if units.str.contains("reward").any() else ("ELBO", "nats")


def _training(key: dict[str, Any], task: dict[str, Any], result: Result) -> list[dict[str, Any]]:
    rows = [
        {**key, "step": point["step"], "part": "curve", "quantity": quantity, "value": point[quantity]}
        for point in result["curve"]
        for quantity in ("seconds", "train", "test")
    ]
    last = {**key, "step": task["settings"]["steps"], "part": "end"}
    for quantity in ("milliseconds", "gradient_variance", "weighted_bound"):
        if quantity in result:
            rows.append({**last, "quantity": quantity, "value": result[quantity]})
    return rows


def _gradients(key: dict[str, Any], result: Result) -> list[dict[str, Any]]:
    rows = []
    for row in result["rows"]:
        where = {**key, "part": row["kind"], "name": row["name"]}
        rows += [{**where, "quantity": q, "value": v} for q, v in row.items() if q not in ("kind", "name")]
    whole = {**key, "part": "program", "name": EVERYTHING}
    return rows + [{**whole, "quantity": q, "value": result[q]} for q in ("milliseconds", "evaluations", "peak_bytes")]


def write(results: list[Result], study: Study, about: dict[str, Any], out: Path) -> pd.DataFrame:
    """Write the dataset, with what it is in its metadata; return it."""
    frame = tidy(results)
    described = {"study": study.to_dict(), **about}
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"pplgrad": json.dumps(described).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    try:
        write_atomically(out / FILE, sink.getvalue().to_pybytes())
    except OSError as error:
        raise ScriptError(f"The results cannot be written to {out} ({error.strerror}).") from None
    return frame


def read(out: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a study's dataset and what it says of itself."""
    path = out / FILE
    if not path.is_file():
        raise ScriptError(f"There is no {FILE} in {out}; `pplgrad compare` leaves one.")
    try:
        table = pq.read_table(path)
        described = json.loads(table.schema.metadata[b"pplgrad"])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise ScriptError(f"{path} is not the dataset of a study ({type(error).__name__}).") from None
    return table.to_pandas(), described


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what failed, and why, one row for each estimator and reason."""
    bad = frame[frame["error"].notna()]
    return bad.groupby(["kind", "backend", "estimator", "error"], sort=False).size().rename("runs").reset_index()


def best_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the training rows of the learning rate that each estimator went on with: the best on the first seed."""
    training = frame[(frame["kind"] == "training") & frame["error"].isna()]
    if training.empty:
        return training
    first = training[(training["seed"] == 0) & (training["part"] == "curve") & (training["quantity"] == "train")]
    last = first[first["step"] == first.groupby(["backend", "estimator", "learning_rate"])["step"].transform("max")]
    chosen = last.loc[last.groupby(["backend", "estimator"], sort=False)["value"].idxmax()]
    return training.merge(chosen[["backend", "estimator", "learning_rate"]])


def training_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard deviation over seeds of what training reached, in the order of the study."""
    training = best_rates(frame)
    if training.empty:
        return pd.DataFrame()
    end = training[(training["part"] == "end") | (training["step"] == training["step"].max())]
    end = end[end["quantity"] != "seconds"]
    groups = end.groupby(["backend", "estimator", "learning_rate", "quantity"], sort=False)["value"]
    return pd.concat({"mean": groups.mean(), "sd": groups.std(ddof=1)}, axis=1).unstack("quantity")


def gradient_table(frame: pd.DataFrame, part: str = "program") -> pd.DataFrame:
    """Return what was measured of each estimator's gradient at each snapshot, means over seeds.

    `mse × evaluations` and `mse × ms` are what is left at equal evaluations and at equal time; `efficiency` is the
    inverse of the latter.
    """
    rows = frame[(frame["kind"] == "gradients") & frame["error"].isna()]
    if rows.empty:
        return pd.DataFrame()
    cost = rows[rows["quantity"].isin(["milliseconds", "evaluations", "peak_bytes"])]
    shown = rows[(rows["part"] == part) & ~rows["quantity"].isin(["milliseconds", "evaluations", "peak_bytes"])]
    if shown.empty:
        # No site's density may read a parameter: weights of logged decisions are the reward's.
        return pd.DataFrame()
    where = ["step", "backend", "estimator"]
    named = where if part == "program" else [*where, "name"]
    table = shown.pivot_table(index=named, columns="quantity", values="value", aggfunc="mean", sort=False)
    costs = cost.pivot_table(index=where, columns="quantity", values="value", aggfunc="mean", sort=False)
    table = table.join(costs, on=where) if part != "program" else table.join(costs)
    table["mse × evaluations"] = table["mse"] * table["evaluations"]
    table["mse × ms"] = table["mse"] * table["milliseconds"]
    table["efficiency"] = 1 / table["mse × ms"].replace(0, np.nan)
    return table


def spread(mean: float, deviation: float) -> str:
    """Return a mean and its standard deviation with four significant digits of the mean.

    >>> spread(-31.4159, 0.2718), spread(0.000123, float("nan"))
    ('-31.42 ± 0.2718', '0.000123')
    """
    return f"{mean:.4g}" if pd.isna(deviation) else f"{mean:.4g} ± {deviation:.4g}"
