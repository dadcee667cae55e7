"""Several processes that each hold a part of the data, and whose gradients are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pplgrad.core.array_ops import Array
from pplgrad.core.plates import Plate


class DataParallel(Protocol):
    """All processes of a run, this one among them. Each estimates the whole objective from its part of the data."""

    @property
    def count(self) -> int:
        """Their number."""

    def total(self, x: Array) -> Array:
        """Return the sum of `x` over all processes, each of which calls this as often and with the same shapes."""


def share(peers: DataParallel | None, plates: Sequence[Plate]) -> int:
    """Return how many times larger a cost in these plates is here than in one process with all of the data.

    The elements of a subsampled plate are taken to be split over the processes, once, however many such plates there are.
    """
    split = any(plate.size < plate.full_size for plate in plates)
    return peers.count if peers is not None and split else 1
