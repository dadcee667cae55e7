"""Operations that read a tensor's elements into Python, written so that they need not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def without_numbers(args: Sequence[Any]) -> Sequence[Any]:
    """Return the arguments of `tensor[index]` where a whole number in a tensor is an array of one: it need not be read.

    `table[z]` with a single draw z, as models of states and mixtures have it, then picks a row like `index_select`.
    """
    source, index = args
    items = index if isinstance(index, tuple) else (index,)
    if not any(_is_number(item) for item in items):
        return args
    source_dims = sum(_dims_taken(item) for item in items)
    rest = source.dim() - source_dims
    axis, picked = 0, []
    for item in items:
        if _is_number(item) and axis < source.dim():
            place = torch.where(item < 0, item + source.shape[axis], item)
            source, item = source.index_select(axis, place.reshape(1)), 0
        axis += rest if item is Ellipsis else _dims_taken(item)
        picked.append(item)
    return source, tuple(picked)


def _is_number(item: Any) -> bool:
    whole = (torch.int64, torch.int32, torch.int16, torch.int8)
    return isinstance(item, torch.Tensor) and item.dim() == 0 and item.dtype in whole


def _dims_taken(item: Any) -> int:
    """Return how many axes of a tensor an item of an index stands for."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 1


def one_hot(tensor: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return what torch's function does, without reading values to check that they are in bounds."""
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


def classes(args: Sequence[Any], kwargs: Any) -> int:
    return args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
