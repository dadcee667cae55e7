"""A study's results as data: a tidy frame, and arrays with named dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from pplgrad.lab.results import UNITS, judged, read
from pplgrad.lab.summaries import curves

_WORDS = {
    "train": "objective on the train data",
    "test": "objective on the test data",
    "time": "steps times the median time of one",
    "weighted_bound": "importance-weighted bound on the test data",
    "seconds": "time spent in training steps, with warm-up",
    "milliseconds": "median time",
    "gradient_variance": "trace of the covariance of the guide's gradient at the end of training",
    "gradient2": "squared norm of the gradient, without its noise",
    "bias2": "squared bias, without its noise; may be negative",
    "bias2_se": "standard error of bias2",
    "variance": "trace of the covariance",
    "mse": "bias² + variance",
    "evaluations": "evaluations of the program in a step",
    "peak_bytes": "memory of a gradient at its peak, beyond parameters and data",
    "load": "processes that asked for each core",
}


@dataclass(frozen=True)
class StudyData:
    r"""A study's results.

    Attributes:
        frame: one row for each number. Columns: `kind` ("training", "gradients"), `backend`, `estimator`, `seed` (int),
            `learning_rate` (float), `step` (Int64), `part` ("curve", "end", "program", "site", "parameter"), `name` (of the site or
            parameter), `quantity`, `value` (float), `unit`, `error` (the reason, in the rows of runs that failed), and as
            categories `machine_...` and `version_...`: the machine and the packages that a number comes from.
        about: the study as it was asked for, the command, versions, machine and date.
    """

    frame: pd.DataFrame
    about: dict[str, Any]

    @cached_property
    def dataset(self) -> Any:
        """The numbers as an `xarray.Dataset`, NaN where something was not measured.

        Variables and dimensions: `curve_train`, `curve_test`, `curve_time` (backend, estimator, learning_rate, seed, step);
        `end_...` of what was measured after the last step (backend, estimator, learning_rate, seed); `gradient_...` of the whole
        program's gradient (backend, estimator, seed, snapshot), `site_...` and `parameter_...` of its parts (the same and site or
        parameter). Each has `units` and `long_name`.
        """
        import xarray as xr

        frame = self.frame[self.frame["error"].isna()]
        found: dict[str, Any] = {}
        training = frame[frame["kind"] == "training"]
        run = ["backend", "estimator", "learning_rate", "seed"]
        for part, dims in (("curve", [*run, "step"]), ("end", run)):
            rows = training[training["part"] == part]
            found |= self._arrays(rows, part, dims)
        if "curve_test" in found:
            points = curves(frame).set_index(["backend", "estimator", "seed", "step"])["time"]
            found["curve_time"] = self._described(points.to_xarray(), "time", "s")
        gradients = frame[frame["kind"] == "gradients"].rename(columns={"step": "snapshot"})
        where = ["backend", "estimator", "seed", "snapshot"]
        for part, more in (("program", []), ("site", ["site"]), ("parameter", ["parameter"])):
            rows = gradients[gradients["part"] == part].rename(columns={"name": part} if more else {})
            found |= self._arrays(rows, "gradient" if part == "program" else part, [*where, *more])
        return xr.Dataset(found, attrs={name: str(value) for name, value in self.about.items()})

    def _arrays(self, rows: pd.DataFrame, prefix: str, dims: list[str]) -> dict[str, Any]:
        found = {}
        for quantity, own in rows.groupby("quantity", sort=False):
            own = own.astype({dim: int for dim in dims if dim in ("step", "snapshot")})
            array = own.set_index(dims)["value"].to_xarray()
            unit = UNITS.get(str(quantity), "1").replace("nats", judged(self.frame)[1])
            found[f"{prefix}_{quantity}"] = self._described(array, str(quantity), unit)
        return found

    @staticmethod
    def _described(array: Any, quantity: str, unit: str) -> Any:
        return array.assign_attrs(units=unit, long_name=_WORDS.get(quantity, quantity))


def load_study(path: str | Path) -> StudyData:
    """Return the results of a study: the folder that `pplgrad compare` filled, or the dataset in it.

    Raises:
        ScriptError: if there is no dataset of a study.

    Example:
        >>> study = load_study("results")  # doctest: +SKIP
        >>> study.dataset["gradient_variance"].mean("seed")  # doctest: +SKIP
        >>> study.frame.query("quantity == 'weighted_bound'")  # doctest: +SKIP
    """
    path = Path(path)
    return StudyData(*read(path.parent if path.suffix == ".parquet" else path))
