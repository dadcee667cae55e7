"""Estimators at the same parameters: bias, variance, time and memory of a gradient, as a whole and by parameter and site."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pplgrad.diagnostics.certificate import EVERYTHING
from pplgrad.diagnostics.moments import Chunks, Draws, Moments, squared_norm

CHUNK = 10
"""Draws between two looks at the clock, where a library makes several in one call."""


class Measured(Protocol):
    """What a plug-in offers of a program."""

    @property
    def blocks(self) -> Mapping[str, np.ndarray]:
        """The numbers of each parameter's coordinates."""

    def draws(self, elbo: Any, chunk: int = CHUNK) -> Draws:
        """Return draws of an ELBO's gradient."""

    def peak_bytes(self, elbo: Any, chunk: int = CHUNK) -> int:
        """Return the memory that a gradient takes at its peak, beyond parameters and data."""


@dataclass
class Clock:
    """The time that each draw took, but for those of the first call, which compiles or finds the structure."""

    seconds: list[float]

    def watch(self, chunks: Chunks) -> Iterator[np.ndarray]:
        """Hand the draws on, and time them."""
        begin = time.perf_counter()
        for number, chunk in enumerate(chunks):
            if number >= 3 or (number and len(chunk) > 1):
                self.seconds.append((time.perf_counter() - begin) / len(chunk))
            yield chunk
            begin = time.perf_counter()


def reference(host: Measured, elbo: Any, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Return the mean gradient of an unbiased estimator, and its squared standard error."""
    moments = Moments(host.draws(elbo, CHUNK)(draws, seed), draws)
    return {"mean": moments.mean.astype(np.float32), "squared_error": moments.squared_error.astype(np.float32)}


def gradients(
    host: Measured,
    elbo: Any,
    sites: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    draws: int,
    per: float,
    seed: int,
) -> dict[str, Any]:
    """Return what was measured, a row for the whole gradient, each parameter and each site.

    Gradients are divided by `per`, the number of data in the batch. `bias2` is an unbiased estimate (it may be
    negative) with its standard error; `mse` is bias² + variance.
    """
    clock = Clock([])
    moments = Moments(clock.watch(host.draws(elbo, CHUNK)(draws, seed)), draws)
    mean, error = np.asarray(wanted["mean"], float), np.asarray(wanted["squared_error"], float)
    blocks = {("program", EVERYTHING): np.arange(len(mean))}
    blocks |= {("parameter", name): indices for name, indices in host.blocks.items()}
    blocks |= {("site", name): indices for name, indices in sites.items() if len(indices)}
    rows = []
    for (kind, name), indices in blocks.items():
        squared, spread = squared_norm(moments.batches[:, indices] - mean[indices])
        # The reference's own noise is the same in every batch, and known.
        bias2 = squared - error[indices].sum()
        variance = moments.variance[indices].sum()
        rows.append(
            {
                "kind": kind,
                "name": name,
                "gradient2": (float((mean[indices] ** 2).sum() - error[indices].sum())) / per**2,
                "bias2": float(bias2) / per**2,
                "bias2_se": float(np.hypot(spread, 2**0.5 * error[indices].sum())) / per**2,
                "variance": float(variance) / per**2,
                "mse": float(variance + max(bias2, 0.0)) / per**2,
            }
        )
    return {
        "rows": rows,
        "broken": moments.broken,
        "milliseconds": 1e3 * float(np.median(clock.seconds)) if clock.seconds else float("nan"),
        "peak_bytes": host.peak_bytes(elbo, CHUNK),
        "draws": draws,
    }


def curve_point(step: int, seconds: float, objective: Callable[[str], float]) -> dict[str, float]:
    """Return one point of a training curve."""
    return {"step": step, "seconds": seconds, "train": objective("train"), "test": objective("test")}


def evaluations(elbo: Any, described: Any) -> int:
    """Return the evaluations of the program that one step takes: particles, and the further ones of their sites."""
    return int(elbo.num_particles) * (1 + sum(row["evaluations"] for row in described.rows))
