"""Who watches what this thread computes: `Provenance`, while it is active."""

from __future__ import annotations

import threading
from typing import Any


class _Active(threading.local):
    """The watchers of a thread, the outermost first: what another thread computes they do not see."""

    def __init__(self) -> None:
        self.watching: list[Any] = []


_active = _Active()


def watching() -> list[Any]:
    """Return who watches what this thread computes."""
    return list(_active.watching)


def begin(watcher: Any) -> None:
    """Note that one watches from here on."""
    _active.watching.append(watcher)


def end(watcher: Any) -> None:
    """Note that one watches no longer."""
    _active.watching.remove(watcher)
