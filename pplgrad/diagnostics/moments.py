"""Means, variances and projections of many gradient draws, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from pplgrad.errors import ProgramError

Chunks = Iterator[np.ndarray]
"""Draws of a gradient, (draws, parameters), in pieces of any length."""
Draws = Callable[[int, int], Chunks]
"""From a number of draws and a seed to the draws."""

BATCHES = 20


class Moments:
    """What is kept of draws: the mean and the variance of each coordinate, the means of 20 batches, projections.

    `directions` (parameters, n), if given, are projected on: `projections` has a row a draw. Draws that are not finite
    are counted in `broken`, and left out.
    """

    def __init__(self, chunks: Chunks, count: int, directions: np.ndarray | None = None) -> None:
        self.count = 0
        self.broken = 0
        shift: np.ndarray | None = None
        totals: np.ndarray | None = None
        sizes = np.zeros(BATCHES)
        squares: np.ndarray | float = 0.0
        projected = []
        place = 0
        for chunk in chunks:
            rows = np.asarray(chunk, np.float64)
            numbers = np.minimum((np.arange(place, place + len(rows)) * BATCHES) // count, BATCHES - 1)
            place += len(rows)
            finite = np.isfinite(rows).all(1)
            self.broken += int((~finite).sum())
            rows, numbers = rows[finite], numbers[finite]
            if not len(rows):
                continue
            if shift is None or totals is None:
                # Sums of squares around a typical draw lose fewer digits than around zero.
                shift = rows.mean(0)
                totals = np.zeros((BATCHES, rows.shape[1]))
            np.add.at(totals, numbers, rows - shift)
            np.add.at(sizes, numbers, 1)
            squares = squares + ((rows - shift) ** 2).sum(0)
            self.count += len(rows)
            if directions is not None:
                projected.append(rows @ directions)
        if shift is None or totals is None or self.count < 2:
            raise ProgramError(
                "No draw of the gradient is finite; look for a square root, a logarithm or a division whose derivative is not, in "
                "the model and the guide."
            )
        total = totals.sum(0)
        self.mean: np.ndarray = shift + total / self.count
        self.variance: np.ndarray = np.maximum(squares - total**2 / self.count, 0) / (self.count - 1)
        self.batches: np.ndarray = shift + (totals / np.maximum(sizes, 1)[:, None])[sizes > 0]
        self.projections: np.ndarray | None = np.concatenate(projected) if projected else None

    @property
    def squared_error(self) -> np.ndarray:
        """The squared standard error of the mean, by coordinate."""
        return self.variance / self.count


def squared_norm(batches: np.ndarray) -> tuple[float, float]:
    """Return an unbiased estimate of the squared norm of the mean of independent rows, and its standard error.

    The mean of the products of different rows, in which no row's noise meets itself.

    >>> squared_norm(np.ones((4, 9)))
    (9.0, 0.0)
    """
    n = len(batches)
    products = batches @ batches.T
    if n < 2:
        return float(products.sum()), float("inf")
    off = products.sum() - np.trace(products)
    estimate = off / (n * (n - 1))
    # Leave-one-out copies for the part that is linear in the noise, the products' own spread for the rest.
    without = (off - 2 * (products.sum(1) - np.diag(products))) / ((n - 1) * (n - 2)) if n > 2 else np.array([estimate])
    jackknife = (n - 1) / n * ((without - without.mean()) ** 2).sum()
    spread = ((products - estimate) ** 2).sum() - ((np.diag(products) - estimate) ** 2).sum()
    degenerate = 2 * spread / (n * (n - 1)) ** 2
    return float(estimate), float(np.sqrt(max(jackknife, degenerate)))
