"""How far a command has come: a bar in the terminal, and lines in a study's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOG = logging.getLogger("pplgrad.lab")


def bar(what: str, quiet: bool, passing: bool = False) -> Any:
    """Return a bar on standard error, which is shown in a terminal alone; one that is `passing` leaves no trace."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(what))
    clocks = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    return Progress(*columns, *clocks, console=console, transient=passing, disable=quiet or not console.is_terminal)


class CheckProgress:
    """Tells which estimator is being checked, and in which half of its draws."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.bar = bar("checks", quiet, passing=True)
        self.total, self.done, self.title = total, 0, ""

    def __enter__(self) -> CheckProgress:
        self.task = self.bar.add_task("training", total=self.total)
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def begin(self, title: str) -> None:
        """Tell of the next check."""
        self.title = title
        self.bar.update(self.task, description=title)

    def phase(self, words: str) -> None:
        """Tell of the phase that begins."""
        part = 0.5 if words != "first half" else 0.0
        self.bar.update(self.task, description=f"{self.title}: {words}", completed=self.done + part, refresh=True)

    def end(self) -> None:
        """Tell that a check is done."""
        self.done += 1
        self.bar.update(self.task, completed=self.done, refresh=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar off the screen while something is printed."""
        self.bar.stop()
        yield
        self.bar.start()


class _Log(logging.FileHandler):
    """A study's log; where a line cannot be written (a full disk), the study says so by itself, and the log says nothing."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Stop nothing."""

    def close(self) -> None:
        """Close the file, whose last line may not fit."""
        with suppress(OSError, ValueError):
            super().close()


class StudyProgress:
    """Tells of finished runs, and of the time left: a bar in the terminal, lines in the folder's log."""

    def __init__(self, plan: Any, out: Path, quiet: bool) -> None:
        self.bar = bar("runs", quiet)
        self.total, self.done, self.began = plan.total(out / "runs"), 0, time.time()
        self.runs, self.fresh = out / "runs", 0
        self.before = set(self.runs.glob("*.json"))
        self.handler = _Log(out / "log.txt")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def __enter__(self) -> StudyProgress:
        LOG.addHandler(self.handler)
        LOG.setLevel(logging.INFO)
        LOG.info("%d runs", self.total)
        self.bar.start()
        self.task = self.bar.add_task("comparing", total=self.total)
        return self

    def on_result(self, task: Any, result: dict[str, Any]) -> None:
        self.done += 1
        # What was there before takes no time, and says nothing of what is left.
        fresh = result.get("began", 0) >= self.began
        self.fresh += fresh
        spent = time.time() - self.began
        left = duration(spent / self.done * (self.total - self.done)) if fresh else "unknown"
        how = (
            f"failed: {result['error']}"
            if "error" in result
            else f"{result.get('seconds_taken', 0):.1f} s"
            if fresh
            else "was done"
        )
        LOG.info("%d/%d %s: %s; left: %s", self.done, self.total, task.title, how, left)
        self.bar.update(self.task, advance=1, description=task.title[:40])

    def finished(self) -> int:
        """Return how many runs are finished, those among them that a worker has kept and not yet told of."""
        kept = set(self.runs.glob("*.json")) - self.before
        return self.done + max(0, len(kept) - self.fresh)

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()
        LOG.removeHandler(self.handler)
        self.handler.close()


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(75), duration(4000)
    ('1 min 15 s', '1 h 6 min')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
