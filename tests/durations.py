"""What each test function takes, which decides how many of its cases `make test` runs (tests/covering.py)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("durations.json")

LEAST = 0.1
"""Seconds: of functions whose cases take less, all cases are run, and nothing is recorded."""


def recorded(path: Path = PATH) -> dict[str, float]:
    """Return the seconds that a case of each test function took where they were last recorded, on average."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


class Recorder:
    """A plug-in of pytest that writes what tests with several cases took, setting up included; what is known of others stays."""

    def __init__(self, path: Path = PATH) -> None:
        self.path = path
        self.seconds: dict[str, float] = defaultdict(float)
        self.cases: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name, bracket, _ = report.nodeid.partition("[")
        if bracket:
            self.seconds[name] += report.duration
            self.cases[name].add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        known = recorded(self.path) | {
            name: float(f"{total / len(self.cases[name]):.2g}") for name, total in self.seconds.items()
        }
        kept = {name: seconds for name, seconds in sorted(known.items()) if seconds >= LEAST}
        self.path.write_text(json.dumps(kept, indent=0) + "\n")
