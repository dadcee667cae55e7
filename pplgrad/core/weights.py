"""The importance weights that a bound of several particles combines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.objectives import MultiSample
from pplgrad.core.shapes import aligned


@dataclass(frozen=True)
class Weights:
    """The log weights that one bound combines, as the elements of a site's group see them.

    `logs` are constants of shape (bounds, K, *plates of the weights); `scale` is what a subsampled plate multiplies a bound by.
    """

    ops: Ops
    objective: MultiSample
    logs: Array
    scale: float
    rows: np.ndarray
    shape: tuple[int, ...]

    @property
    def xp(self):  # type: ignore[no-untyped-def]
        """The array namespace."""
        return self.ops.xp

    @property
    def samples(self) -> int:
        """K."""
        return self.logs.shape[1]

    @cached_property
    def _own(self) -> np.ndarray:
        own = np.eye(self.samples, dtype=bool)
        return own.reshape(1, *own.shape, *(1,) * (len(self.logs.shape) - 2))

    def replaced(self, own: Array) -> Array:
        """Return the log weights (bounds, K, K, *plates) where particle k's is replaced by `own`, in row k."""
        xp = self.xp
        mask = self.ops.constant(self._own, self.logs) > 0
        return xp.where(mask, own[:, :, None], self.logs[:, None])

    def bound_with(self, own: Array) -> Array:
        """Return, for each particle, the scaled bound with its own log weight replaced by `own`: (bounds, K, *plates)."""
        return self.scale * self.objective.bound(self.xp, self.replaced(own), 2)

    @cached_property
    def bound_without(self) -> Array:
        """Return, for each particle, the scaled bound of the K − 1 others: (bounds, K, *plates)."""
        power = self.objective.power
        least = self.xp.full_like(self.logs, -math.inf if power > 0 else math.inf)
        found = self.objective.bound(self.xp, self.replaced(least), 2)
        return self.scale * (found + math.log(self.samples / (self.samples - 1)) / power)

    @property
    def shares(self) -> Array:
        """Return the scaled derivative of the bound with respect to each log weight: (bounds, K, *plates)."""
        return self.scale * self.objective.shares(self.xp, self.logs, 1)

    def at_sites(self, x: Array) -> Array:
        """Bring (bounds, K, *plates) to the shape of the group's signal, (particles, 1, *plates of the sites)."""
        flat = self.xp.reshape(x, (-1, *x.shape[2:]))
        if len(self.rows) != flat.shape[0]:
            flat = self.xp.stack([flat[int(row)] for row in self.rows], axis=0)
        return aligned(self.ops, flat, 1, len(self.shape))[:, None]
