"""What of a program's arguments can steer it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pplgrad.pyro._reuse.probes import SIMPLE, digest, kind_of


@dataclass(frozen=True, repr=False)
class Identity:
    """An object that is known by identity; in words it is the same in every process."""

    of: int

    def __repr__(self) -> str:
        return "an object"


def arguments_kind(value: Any, objects: list[Any]) -> Any:
    """Return what of an argument can steer a program: kinds of tensors, numbers of arrays, all else by value or identity.

    Objects that are known by identity alone are added to `objects`, to be guarded like the program itself.
    """
    kind = type(value)
    if kind in (torch.Tensor, torch.nn.Parameter) and not value.__dict__:
        return kind_of(value)
    if kind in (float, complex):
        return (kind, repr(value))
    if kind in SIMPLE:
        return (kind, value)
    if kind is slice:
        return (kind, *(arguments_kind(x, objects) for x in (value.start, value.stop, value.step)))
    if kind in (list, tuple):
        return (kind, *(arguments_kind(item, objects) for item in value))
    if kind is dict:
        return (kind, *((arguments_kind(k, objects), arguments_kind(item, objects)) for k, item in value.items()))
    if kind is np.ndarray and not value.dtype.hasobject:
        return (value.shape, value.strides, str(value.dtype), digest(value))
    objects.append(value)
    return (kind, Identity(id(value)))
