"""Branches that change one element of a site's value each: what they share with the draw, and where they differ.

In the branch of element e an array that follows the value element by element is the array at the draw, but for its entries of element e. All
branches then need the array at the draw, and the array where every element takes another value, of which each reads its own entries (`Changed`).
A sum over the elements is the sum of all others and the changed entry. A product that contracts the elements is that at the draw and the
difference of one entry times one row. Only from there on do branches differ everywhere (`Rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import and_

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.shapes import Axis


@dataclass(frozen=True)
class Changed:
    """An array that in each branch is the one at the draw, but for the entries of one element.

    Attributes:
        drawn: the array at the draw.
        others: (alternatives of an element, *shape); a branch reads there the entries of its element.
        axes: the axes along which the elements lie.
        is_finite: whether it is finite wherever the draw and the program's constants are.
    """

    drawn: Array
    others: Array
    axes: tuple[Axis, ...]
    is_finite: bool


@dataclass(frozen=True)
class Rows:
    """An array that differs from branch to branch: (branches, *shape)."""

    array: Array


class ChangedElements:
    """The branches of some numbers: number e · m + j gives element e its alternative j. Without `numbers` all, in order."""

    def __init__(self, ops: Ops, sizes: Sequence[int], alternatives: int, numbers: Array | None, like: Array) -> None:
        self.ops, self.sizes, self.each = ops, tuple(sizes), alternatives
        self._chosen = numbers
        self.count = prod(self.sizes) * alternatives if numbers is None else int(numbers.shape[0])
        self._numbers = ops.arange(self.count, like) if numbers is None else numbers

    def value(self, drawn: Array, others: Array, axes: Sequence[int]) -> Changed:
        """Return the site's value, whose elements lie along these axes."""
        return Changed(drawn, others, tuple(Axis(at, 1, drawn.shape[at]) for at in axes), True)

    def rows(self, x: Changed | Rows) -> Array:
        """Return an array of its own for each branch, (branches, *shape)."""
        if isinstance(x, Rows):
            return x.array
        xp, shape = self.ops.xp, tuple(x.drawn.shape)
        element, here = self._numbers // self.each, []
        for i, axis in enumerate(x.axes):
            place = element // prod(self.sizes[i + 1 :]) % self.sizes[i]
            lies = self.ops.arange(shape[axis.at], self._numbers) // axis.inner % axis.size
            line = [1] * len(shape)
            line[axis.at] = -1
            here.append(xp.reshape(place, (-1, *(1,) * len(shape))) == xp.reshape(lies, (1, *line)))
        others = x.others if self.each == 1 else xp.take(x.others, self._numbers % self.each, axis=0)
        return xp.where(reduce(and_, here), others, x.drawn)

    def sum_over(self, x: Changed, gone: set[int], kept: bool = False) -> Rows | None:
        """Return a sum over dimensions among which those of the elements are; None if they are not, or hold more than elements.

        What a branch leaves as it was is added up from both sides: a subtraction would leave nothing of infinite entries.
        """
        xp, shape = self.ops.xp, tuple(x.drawn.shape)
        mine = {axis.at for axis in x.axes}
        order = elements_last(self.ops, x.axes, shape) if mine <= gone else None
        if order is None:
            return None
        within = tuple(at - sum(other < at for other in mine) for at in sorted(gone - mine))
        drawn, others = order(x.drawn, 0), order(x.others, 1)
        if within:
            drawn, others = xp.sum(drawn, axis=within), xp.sum(others, axis=tuple(at + 1 for at in within))
        found = self.of_elements(_sum_of_others(self.ops, drawn)[None] + others)
        if kept:
            found = xp.reshape(found, (found.shape[0], *(1 if at in gone else size for at, size in enumerate(shape))))
        return Rows(found)

    def of_elements(self, x: Array) -> Array:
        """Return what an array of all elements, (alternatives, *shape, elements), holds for each branch: (branches, *shape)."""
        xp = self.ops.xp
        each = xp.moveaxis(x, -1, 0)
        flat = xp.reshape(each, (-1, *each.shape[2:]))
        return flat if self._chosen is None else xp.take(flat, self._chosen, axis=0)

    def of_each(self, x: Array) -> Array:
        """Return what an array (*shape, elements), the same for all alternatives, holds for each branch: (branches, *shape)."""
        xp = self.ops.xp
        each = xp.moveaxis(x, -1, 0)
        return each if self._chosen is None and self.each == 1 else xp.take(each, self._numbers // self.each, axis=0)


def elements_last(ops: Ops, axes: Sequence[Axis], shape: tuple[int, ...]) -> Callable[[Array, int], Array] | None:
    """Return a function that brings the elements, in their order, into one last dimension; None if a dimension has more than elements.

    It takes an array and the number of its dimensions in front of those of `shape`.
    """
    xp = ops.xp
    split: list[list[int]] = [[size] for size in shape]
    places: dict[Axis, tuple[int, int]] = {}
    for at in {axis.at for axis in axes}:
        mine = sorted((axis for axis in axes if axis.at == at), key=lambda axis: -axis.inner)
        split[at] = [axis.size for axis in mine]
        inner = [prod(split[at][i + 1 :]) for i in range(len(mine))]
        if prod(split[at]) != shape[at] or inner != [axis.inner for axis in mine]:
            return None
        places.update({axis: (at, i) for i, axis in enumerate(mine)})
    first = [sum(len(parts) for parts in split[:at]) for at in range(len(shape))]
    last = [first[places[axis][0]] + places[axis][1] for axis in axes]
    rest = [first[at] for at in range(len(shape)) if at not in {axis.at for axis in axes}]
    sizes = [size for parts in split for size in parts]

    def bring(x: Array, front: int) -> Array:
        apart = xp.reshape(x, (*x.shape[:front], *sizes))
        ordered = xp.permute_dims(apart, (*range(front), *(front + at for at in (*rest, *last))))
        return xp.reshape(ordered, (*ordered.shape[: front + len(rest)], -1))

    return bring


def _sum_of_others(ops: Ops, x: Array) -> Array:
    """Return for each entry along the last axis the sum of all others."""
    xp = ops.xp
    nothing = xp.zeros_like(x[..., :1])
    before = xp.concat([nothing, xp.cumulative_sum(x[..., :-1], axis=-1)], axis=-1)
    after = xp.flip(xp.cumulative_sum(xp.flip(x[..., 1:], axis=-1), axis=-1), axis=-1)
    return xp.astype(before + xp.concat([after, nothing], axis=-1), x.dtype)
