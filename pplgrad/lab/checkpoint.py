"""What a training run of a study keeps at its points of evaluation, so that a killed run goes on from the last of them."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pplgrad.lab.data import Batches
from pplgrad.lab.tasks import LOG, write_atomically


def _digest(training: bytes, found: str) -> str:
    return hashlib.sha256(training + found.encode()).hexdigest()


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
            self._read(path)

    def _read(self, path: Path) -> None:
        """Take what the file holds; a file that is not whole holds nothing, and the run begins anew."""
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                text, training, digest = str(file["found"]), file["training"].tobytes(), str(file["digest"])
            if digest != _digest(training, text):
                raise ValueError("its parts do not belong together")
            found = json.loads(text)
            self.step, self.progress, self._batches = found["step"], found["progress"], found["batches"]
            self._training = training
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            LOG.warning("%s cannot be read (%s); its run begins anew", path.name, error)

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
        found = json.dumps({"step": step, "progress": self.progress, "batches": batches.rng.bit_generator.state})
        file, state = io.BytesIO(), training()
        digest = np.array(_digest(state, found))
        np.savez(file, training=np.frombuffer(state, np.uint8), found=np.array(found), digest=digest)
        write_atomically(self._path, file.getvalue())
