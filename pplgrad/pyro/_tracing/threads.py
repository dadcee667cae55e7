"""Whether another thread or process of Python may have run during a program: what it computes is not tracked."""

from __future__ import annotations

import os
import sys
import threading
import time
from functools import cache
from typing import Any

_WITHOUT_PART = {("tqdm._monitor", "TMonitor")}
"""Threads of libraries that compute nothing for a program: this one looks every ten seconds whether a progress bar stands still."""


class OtherThreads:
    """Notes, while active, whether a thread was started, one that was there used its processor, or the process was forked.

    Watching is by thread: a value that another one is handed comes back as a tensor, or a number, of which nothing is known.
    """

    _active: OtherThreads | None = None

    def __init__(self) -> None:
        self.ran = False
        self._clocks: dict[int, int] = {}
        self._profile: Any = None

    def __enter__(self) -> OtherThreads:
        _watch_forks()
        OtherThreads._active = self
        self._clocks = _clocks()
        self._profile = threading.getprofile()
        threading.setprofile(self._started)
        return self

    def __exit__(self, *exc: Any) -> None:
        threading.setprofile(self._profile)
        OtherThreads._active = None
        now = _clocks()
        self.ran |= any(self._clocks.get(thread) != used for thread, used in now.items())
        # One that has ended since may have done anything before.
        self.ran |= not self._clocks.keys() <= now.keys()

    def _started(self, *call: Any) -> None:
        """Stand in for the profile function of a thread that was just started, and give it the one that it should have."""
        self.ran = True
        sys.setprofile(self._profile)


@cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_forked)


def _forked() -> None:
    if OtherThreads._active is not None:
        OtherThreads._active.ran = True


def _clocks() -> dict[int, int]:
    """Return the processor time that each other thread of Python has used; where that is not known, no two are equal."""
    own, found = threading.get_ident(), {}
    for thread in threading.enumerate():
        kind = type(thread)
        if thread.ident not in (None, own) and (kind.__module__, kind.__name__) not in _WITHOUT_PART:
            assert thread.ident is not None
            found[thread.ident] = _used(thread.ident)
    return found


def _used(thread: int) -> int:
    try:
        return time.clock_gettime_ns(time.pthread_getcpuclockid(thread))
    except (AttributeError, OSError):
        return time.perf_counter_ns()
