"""Operations of torch on rows of what they were called with: (rows, *shape) in the place of (*shape).

A closed list: what has no entry is not run on rows (`Unfollowed`). `torch.vmap` would know more, and cannot run below a dispatch mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from typing import Any

import torch

from pplgrad.pyro._tracing.axis_rules import Call


class Unfollowed(Exception):
    """Something that cannot be followed from the draw to the branches."""


_RESHAPES = set("view _unsafe_view reshape _reshape_alias squeeze unsqueeze unflatten".split())

_AS_FOR_ONE = set("sum mean prod amax amin all any logsumexp var std".split())
_ALONG = set(
    "cumsum cumprod logcumsumexp _softmax _log_softmax argmax argmin select slice unbind split split_with_sizes sort".split()
)


@cache
def name_of(func: Any) -> str:
    """Return the name of an operation."""
    return func._schema.name.removeprefix("aten::")


@cache
def is_reshape(func: Any) -> bool:
    """Return whether an operation leaves the elements in their order. A view as another type has others, and perhaps more of them."""
    return name_of(func) in _RESHAPES and func._schema.overload_name != "dtype"


def padded(rows: torch.Tensor, ndim: int) -> torch.Tensor:
    """Return rows of arrays with dimensions of size 1 in front, so that they have `ndim`."""
    return rows.reshape(len(rows), *(1,) * (ndim + 1 - rows.dim()), *rows.shape[1:])


def common_type(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the type in which an operation computes with tensors: a number by itself yields to arrays, and one in each row would not."""
    arrays, numbers = (
        reduce(torch.promote_types, kinds) if kinds else None
        for kinds in ([x.dtype for x in tensors if x.dim()], [x.dtype for x in tensors if not x.dim()])
    )
    if arrays is None or numbers is None:
        return arrays or numbers  # type: ignore[return-value]
    return numbers if _category(numbers) > _category(arrays) else arrays


def _category(kind: torch.dtype) -> int:
    return 3 if kind.is_complex else 2 if kind.is_floating_point else int(kind != torch.bool)


def as_type(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Return a tensor as a type; conditions, which are no numbers, yield to every type."""
    return x if x.dtype == torch.bool else x.to(kind)


def of_rows(func: Any, args: Any, rows: torch.Tensor, outs: list[torch.Tensor]) -> Any:
    """Return an operation of one array on each row, given how it was called on one and what it returned."""
    name, call, ndim = name_of(func), Call(func, args, {}), rows.dim() - 1
    if is_reshape(func):
        return rows.reshape(len(rows), *outs[0].shape)
    if name == "expand":
        return padded(rows, outs[0].dim()).expand(-1, *outs[0].shape)
    if name == "permute":
        return rows.permute(0, *(at % ndim + 1 for at in call["dims"]))
    if name == "transpose":
        return rows.transpose(call["dim0"] % ndim + 1, call["dim1"] % ndim + 1)
    if name == "t":
        return rows.transpose(-1, -2) if ndim == 2 else rows
    if name in ("_is_all_true", "_is_any_true"):
        flat = rows.reshape(len(rows), -1)
        return flat.all(1) if name == "_is_all_true" else flat.any(1)
    if name in _AS_FOR_ONE | _ALONG and ndim:
        return _along_other_dimensions(func, name, call, args, rows)
    raise Unfollowed


def _along_other_dimensions(func: Any, name: str, call: Call, args: Any, rows: torch.Tensor) -> Any:
    """Return an operation that names its dimensions, each counted from behind the rows."""
    ndim, given = rows.dim() - 1, call["dim"] if call.has("dim") else None
    if name in _AS_FOR_ONE and (given is None or given == []):
        if name not in ("sum", "mean", "all", "any") or len(args) > 1:
            raise Unfollowed
        flat = rows.reshape(len(rows), -1)
        return getattr(torch, name)(flat, 1)
    if given is None:
        raise Unfollowed
    place = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == "dim")
    moved = given % ndim + 1 if isinstance(given, int) else [at % ndim + 1 for at in given]
    if place > len(args):  # It is the default, and so is what stands before it.
        raise Unfollowed
    return func(rows, *args[1:place], moved, *args[place + 1 :])


def product_of_rows(func: Any, args: Any, kwargs: Any, has_rows: list[bool], out: torch.Tensor) -> torch.Tensor | None:
    """Return a product of matrices or vectors of which some have rows, (rows, *shape); None of another operation."""
    name = name_of(func)
    if name in ("mm", "bmm"):
        return torch.matmul(args[0], args[1])
    if name == "mv":
        return torch.matmul(args[0], args[1][..., None])[..., 0]
    if name in ("addmm", "baddbmm"):
        product = kwargs.get("alpha", 1) * torch.matmul(args[1], args[2])
        if (
            beta := kwargs.get("beta", 1)
        ) == 0:  # Of what is then added torch reads nothing, not even what is no number.
            return product
        return beta * (padded(args[0], out.dim()) if has_rows[0] else args[0]) + product
    return None
