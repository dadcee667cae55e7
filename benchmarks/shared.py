"""What the benchmarks share: one thread, the belief network of models/sbn.py, and steps that take turns.

Import it before any numerical library, so that these open one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import sys
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]


@cache
def sbn() -> Any:
    """Return the module models/sbn.py."""
    sys.path.append(str(ROOT / "models"))
    return import_module("sbn")


OPTIONS = dict(sbn().OPTIONS)


def in_turns(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, np.ndarray]:
    """Return the times of steps taken in turn, in milliseconds, for about as long as asked."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(values) for name, values in times.items()}
