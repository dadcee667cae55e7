"""A TensorBoard event file, through tensorboardX's record writer alone.

Its `SummaryWriter` hands numbers to a thread, which loses the last of them when a run is killed or just ends.
"""

from __future__ import annotations

import time
import weakref
from os import PathLike, fspath
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar


class EventFile:
    """A new event file in a folder."""

    def __init__(self, folder: str | PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(Path(fspath(folder)) / "events"))
        weakref.finalize(self, self._writer.close)

    def add(self, name: str, value: float, step: int) -> None:
        """Write a number."""
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Put what was written on the disk."""
        self._writer.flush()
