"""What a training run of a study keeps at its points of evaluation, so that a killed run goes on from the last of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pplgrad.lab.data import Batches
from pplgrad.lab.tasks import write_atomically


class Checkpoint:
    """A file beside a task's result. Without a path nothing is kept.

    `progress` is what the run has found so far, as JSON holds it; `step` is the step at which the run goes on, or None.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.progress: dict[str, Any] = {}
        self.step: int | None = None
        self._training = b""
        self._batches: dict[str, Any] = {}
        if path is not None and path.exists():
            with np.load(path) as file:
                found = json.loads(str(file["found"]))
                self._training = file["training"].tobytes()
            self.step, self.progress, self._batches = found["step"], found["progress"], found["batches"]

    def go_on(self, batches: Batches, load: Callable[[bytes], None]) -> int:
        """Put a run where it was killed, and return the step; 0 where it begins."""
        if self.step is None:
            return 0
        load(self._training)
        batches.rng.bit_generator.state = self._batches
        return self.step

    def keep(self, step: int, batches: Batches, training: Callable[[], bytes]) -> None:
        """Keep a run as it is before a step."""
        if self._path is None or not step:
            return
        found = {"step": step, "progress": self.progress, "batches": batches.rng.bit_generator.state}
        file = io.BytesIO()
        np.savez(file, training=np.frombuffer(training(), np.uint8), found=np.array(json.dumps(found)))
        write_atomically(self._path, file.getvalue())
