"""What a study leaves: one tidy dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    "load": "1",
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
MACHINE = ("system", "processor", "cores", "python", "threads")
FILE = "study.parquet"


def tidy(results: list[Result]) -> pd.DataFrame:
    """Return one row for each number that was measured; a run that failed has one row with its reason.

    Behind the columns `KEYS` each row says on which machine (`machine_...`) and with which packages (`version_...`) it was measured.
    """
    rows: list[dict[str, Any]] = []
    of_rewards = False
    for result in results:
        task = result["task"]
        of_rewards |= "objective" in task and judged_by(task["objective"]) != ELBO()
        key = {name: task[name] for name in ("kind", "backend", "estimator", "seed")} | _origin(result)
        key |= {"learning_rate": task["settings"].get("learning_rate"), "step": None}
        if "error" in result:
            rows.append({**key, "error": result["error"]})
        elif task["kind"] == "training":
            rows += _training(key, task, result)
        elif task["kind"] == "gradients":
            for step, measured in result["snapshots"].items():
                measured = {**measured, "evaluations": result["evaluations"]}
                rows += _gradients({**key, "step": int(step)}, measured)
    origin = sorted({name for row in rows for name in row if name.startswith(("machine_", "version_"))})
    frame = pd.DataFrame(rows, columns=[*KEYS, *origin])
    units = {q: unit.replace("nats", "reward") for q, unit in UNITS.items()} if of_rewards else UNITS
    frame["unit"] = frame["quantity"].map(units)
    return frame.astype({"step": "Int64", "value": float, "learning_rate": float, **dict.fromkeys(origin, "category")})


def _origin(result: Result) -> dict[str, Any]:
    """Return the machine and the versions of a result."""
    machine, versions = result.get("machine", {}), result["task"].get("versions", {})
    found = {f"machine_{name}": machine[name] for name in MACHINE if name in machine}
    return found | {f"version_{name}": text for name, text in versions.items()}


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
    for quantity in ("milliseconds", "gradient_variance", "weighted_bound", "load"):
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
    write_atomically(out / FILE, sink.getvalue().to_pybytes())
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
