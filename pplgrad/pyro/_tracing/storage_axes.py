"""Which plates' elements lie along which axes of a storage, and of the tensors that see it.

A storage says it by stride, size and offset, so that views, transpositions and reshapes are seen through. What lies along an axis in two
ways, or may lie along two axes, is mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_

import torch

from pplgrad.pyro._tracing.axes import NONE, Follows

Axes = dict[tuple[int, int, int], int]
"""From a stride, a size and an offset in a storage to the bits of the plates whose elements lie along it."""
Along = dict[tuple[int, int], int]
"""What lies along one axis of a tensor: from q and n to the bits of the plates of which place i has element i // q % n.

For a plate that has the axis to itself q is 1 and n the axis' size; an axis that a view made of two has both.
"""


class Known:
    """What is known of a storage: the bits that it reads, and the axes along which its elements read elements of their own.

    `relaxed` names the relaxed site whose value it is, or a copy of.
    """

    __slots__ = ("bits", "axes", "itemsize", "relaxed")

    def __init__(self, bits: int, axes: Axes, itemsize: int, relaxed: str | None = None) -> None:
        self.bits, self.axes, self.itemsize, self.relaxed = bits, axes, itemsize, relaxed


def places_along(tensor: torch.Tensor, known: Known) -> list[Along]:
    """Return the plates whose elements lie along each axis of a tensor."""
    found: list[Along] = [{} for _ in range(tensor.dim())]
    if known.axes and known.itemsize == tensor.element_size():
        sizes, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        for (stride, size, start), bits in known.axes.items():
            for axis, step in enumerate(strides):
                if step and stride % step == 0 and sizes[axis] % (stride // step * size) == 0:
                    if is_separated(sizes, strides, axis, stride * size, offset - start):
                        key = (stride // step, size)
                        found[axis][key] = found[axis].get(key, 0) | bits
    return found


def separated_axes(read: Iterable[tuple[torch.Tensor, Known, Follows]], out: torch.Tensor, of_plates: int) -> Axes:
    """Return along which axes of a result the plates' elements lie, from how its axes follow those of what it reads.

    `of_plates` has the bits that stand for plates.
    """
    mixed = [0] * out.dim()
    along: list[Along] = [{} for _ in range(out.dim())]
    for operand, known, mapping in read:
        own = known.bits & of_plates
        given = places_along(operand, known)
        for axis, follow in enumerate(mapping):
            lying = given[follow] if follow != NONE else {}
            mixed[axis] |= own & ~reduce(or_, lying.values(), 0)
            for key, kept in lying.items():
                # What lies there in two ways is mixed.
                mixed[axis] |= kept & reduce(or_, (x for k, x in along[axis].items() if k != key), 0)
                along[axis][key] = along[axis].get(key, 0) | kept
    found: Axes = {}
    for axis, lying in enumerate(along):
        for (q, n), lies in lying.items():
            kept = lies & ~mixed[axis]
            if kept and n > 1:
                found[out.stride(axis) * q, n, out.storage_offset()] = kept
    return found


def is_separated(sizes: Sequence[int], strides: Sequence[int], axis: int, block: int, offset: int) -> bool:
    """Return whether going along the other axes never leaves an element of this one, as the storage counts them.

    `block` is how far apart two places of a storage with the same element are at least.
    """
    within = 0
    for other, (count, step) in enumerate(zip(sizes, strides, strict=True)):
        if other == axis or count == 1 or step == 0:
            continue
        if step < strides[axis]:
            within += step * (count - 1)
        elif step % block:
            return False
    return offset >= 0 and offset % block + within < strides[axis]


def lined_up(shape: Sequence[int], out: Sequence[int]) -> Follows:
    """Line up a shape with a result's at the right; an axis of size one is read by all elements."""
    lead = len(out) - len(shape)
    return [axis - lead if axis >= lead and shape[axis - lead] == size else NONE for axis, size in enumerate(out)]


def key_of(tensor: torch.Tensor) -> int:
    """Return the number of a tensor's storage, 0 for one without."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def is_own(tensor: torch.Tensor) -> bool:
    """Return whether the memory of a tensor is torch's own."""
    try:
        return tensor.untyped_storage().resizable()
    except (NotImplementedError, RuntimeError):
        return False


def version_of(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written to; None for a tensor made in inference mode, which has no such count."""
    return None if tensor.is_inference() else tensor._version
