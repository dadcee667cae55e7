"""The cheapest way to add up, for each of several sites, the costs that depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pplgrad.core.array_ops import Array, Ops


@dataclass(frozen=True)
class Sums:
    """Which of n arrays each site's sum holds (`included`, sites x n), and how the sums are made.

    Where every site's arrays hold those of the next, as rewards-to-go do, the arrays in `order` are added up one after
    the other, and a site's sum is the one at its `ends`: O(n) for all sites together. One array a site is picked, the same
    arrays for all sites are added once, and anything else (`order` is None) is a product with the matrix.

    >>> Sums.of(np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1]])).order
    array([2, 1, 0])
    """

    included: np.ndarray
    order: np.ndarray | None
    ends: np.ndarray | None

    @classmethod
    def of(cls, included: np.ndarray) -> Sums:
        """Choose the way from which site's sum holds what."""
        included = np.asarray(included, dtype=bool)
        sizes = included.sum(axis=1)
        if (sizes == 1).all() and len(included) > 1 and not (included == included[:1]).all():
            return cls(included, included.argmax(axis=1), None)
        counts = included.sum(axis=0)
        order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
        places = np.arange(len(order))
        if sizes.all() and (included[:, order] == (places < sizes[:, None])).all():
            return cls(included, order, sizes)
        return cls(included, None, None)

    def __call__(self, ops: Ops, values: Array) -> Array:
        """Return the sums of values (n, ...), of shape (sites, ...), or (1, ...) where all sites share one."""
        if self.order is None:
            return ops.contract(ops.constant(self.included, values), values)
        values = chosen(ops, values, self.order)
        if self.ends is None:
            return values
        if (self.ends == self.ends[0]).all():
            return ops.xp.sum(values, axis=0, keepdims=True)
        return chosen(ops, ops.xp.cumulative_sum(values, axis=0), self.ends - 1)


def chosen(ops: Ops, x: Array, index: np.ndarray) -> Array:
    """Return `x[index]`, without an operation where that is `x` and without a gather where it is `x` reversed."""
    every = np.arange(x.shape[0])
    if np.array_equal(index, every):
        return x
    if np.array_equal(index, every[::-1]):
        return ops.xp.flip(x, axis=0)
    return ops.rows(x, index)
