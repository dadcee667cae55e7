"""What a run sees of a script's data, and numbers that travel in JSON."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from pplgrad.lab.rows import Data, count, taken
from pplgrad.lab.script import Script, ScriptError
from pplgrad.lab.tasks import Task


class Batches:
    """The batches of a run: the same for every estimator and backend with the same seed."""

    def __init__(self, task: Task, script: Script) -> None:
        self.task = task
        self.script = script
        self.train, self.test = script.load(task.options, task.seed)
        self.validation: Data = None
        if task.settings.get("patience"):
            self._hold_back(task.settings["validation"])
        self.rng = np.random.default_rng([task.seed, 1])
        self.length = count(self.train)
        self.size = self.length if script.whole_data else min(task.batch_size, self.length)

    def _hold_back(self, share: float) -> None:
        """Take some rows out of the training data, the same ones under every estimator."""
        rows = count(self.train)
        held = max(1, round(share * rows))
        if self.script.whole_data or held >= rows:
            raise ScriptError(
                "training.patience needs rows of the training data that can be held back, and this script's program takes all rows at once "
                "(WHOLE_DATA), or has too few; leave patience out."
            )
        order = np.random.default_rng([self.task.seed, 3]).permutation(rows)
        self.validation = taken(self.train, np.sort(order[:held]))
        self.train = taken(self.train, np.sort(order[held:]))

    def next(self) -> Data:
        """Return the next step's batch."""
        chosen = slice(None) if self.script.whole_data else self.rng.choice(self.length, self.size, replace=False)
        return self.script.prepare(self.task.options, taken(self.train, chosen), self.rng)

    def fixed(self, which: str) -> Data:
        """Return the data on which the objective is evaluated, prepared once."""
        data = {"train": self.train, "test": self.test, "validation": self.validation}[which]
        return self.script.prepare(self.task.options, data, np.random.default_rng([self.task.seed, 2]))


def evaluation_steps(steps: int, points: int) -> list[int]:
    """Return the steps after which the objective is evaluated: the start, the end and between.

    >>> evaluation_steps(10, 5)
    [0, 2, 4, 6, 8, 10]
    """
    return sorted({round(i * steps / points) for i in range(points + 1)})


def total_variance(gradients: np.ndarray) -> float:
    """Return the trace of the covariance of gradient draws, of shape (draws, parameters)."""
    return float(gradients.var(axis=0, ddof=1).sum())


def packed(arrays: dict[str, np.ndarray]) -> str:
    """Return arrays as text that JSON can hold.

    >>> unpacked(packed({"a": np.arange(2)}))["a"].tolist()
    [0, 1]
    """
    file = io.BytesIO()
    # Names of parameters may hold what names in an archive may not.
    np.savez_compressed(file, *arrays.values(), names=np.array(list(arrays)))
    return base64.b64encode(file.getvalue()).decode()


def unpacked(text: str) -> dict[str, Any]:
    """Return the arrays that `packed` made text of."""
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
        return {str(name): file[f"arr_{i}"] for i, name in enumerate(file["names"])}
