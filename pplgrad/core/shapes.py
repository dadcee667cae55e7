"""Shapes: those that plates span, and arrays brought to them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.plates import Plate

Shape = tuple[int, ...]


class Axis(NamedTuple):
    """An axis along which the elements of a plate lie: element i at the indices a with (a // inner) % size == i.

    With `at` below zero it is no axis of an array: the value is a step's, in the scan that deep, and reads its own element.
    """

    at: int
    inner: int
    size: int


def reshaped(axis: Axis, before: Shape, after: Shape) -> Axis | None:
    """Return where an axis is after a reshape: its elements stand a fixed distance apart in the row of all numbers."""
    distance = axis.inner * prod(before[axis.at + 1 :])
    for at, size in enumerate(after):
        below = prod(after[at + 1 :])
        if size > 1 and below and distance % below == 0 and (below * size) % (distance * axis.size) == 0:
            return Axis(at, distance // below, axis.size)
    return None


def plate_shape(plates: Sequence[Plate]) -> Shape:
    """Return the batch shape that the plates alone span, with 1 where no plate stands.

    >>> plate_shape([Plate("data", -2, 5, 5)])
    (5, 1)
    """
    shape = [1] * max((-plate.dim for plate in plates), default=0)
    for plate in plates:
        shape[plate.dim] = plate.size
    return tuple(shape)


def to_shape(ops: Ops, x: Array, shape: Shape) -> Array:
    """Sum the batch dimensions of `x` that `shape` does not have, and align the rest at the right.

    A batch dimension that no plate declares is part of one joint site or cost: its elements are summed.
    """
    if tuple(x.shape[1:]) == shape:
        return x
    xp, batch = ops.xp, tuple(x.shape[1:])
    padded = (1,) * (len(batch) - len(shape)) + shape
    axes = tuple(i + 1 for i in range(len(batch)) if padded[i - len(batch)] == 1 and batch[i] != 1)
    if axes:
        x = xp.sum(x, axis=axes, keepdims=True)
    return aligned(ops, x, 1, len(shape))


def aligned(ops: Ops, x: Array, lead: int, ndim: int) -> Array:
    """Drop or add singleton dimensions after the first `lead` ones until `ndim` remain."""
    have = len(x.shape) - lead
    if have == ndim:
        return x
    head, tail = tuple(x.shape[:lead]), tuple(x.shape[lead:])
    tail = tail[have - ndim :] if have > ndim else (1,) * (ndim - have) + tail
    return ops.xp.reshape(x, head + tail)
