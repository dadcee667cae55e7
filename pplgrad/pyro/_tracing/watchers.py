"""Who watches what this thread computes: `Provenance`, while it is active."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Watcher(Protocol):
    """What watches operations, and knows which draws tensors were computed from."""

    def read(self, tensors: Sequence[torch.Tensor], keeps_slope: bool) -> int | None:
        """Return what the tensors of a call read, as bits; None where what it does to derivatives is to be watched."""

    def result(self, out: torch.Tensor, read: Sequence[torch.Tensor], bits: int) -> None:
        """Note what a call returned, element by element from what it read, or a view of it; nothing was `read` by a tensor of numbers."""

    def escape(self, bits: int) -> None:
        """Note that everything from here on may read these draws."""


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
