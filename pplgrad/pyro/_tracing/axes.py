"""Which axis of an operation's result follows which axis of an operand, element by element.

A rule maps each axis of a result to the axis of an operand along which element i of the result reads elements i alone, or to
`NONE`: then it may read every element. The rules are a closed world: an operation without one mixes the elements of all axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from pplgrad.pyro._tracing.axis_rules import ARRAYS, NONE, Call, Follows, Rule, elementwise
from pplgrad.pyro._tracing.axis_rules_of_layers import LAYERS

_RULES: dict[str, Rule] = {**ARRAYS, **LAYERS}

_SHAPE_ALONE = set(
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_empty_strided new_full".split()
)


def follows(call: Call, operand: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """Return which axes of the result follow which of the operand; None if nothing is known of the operation."""
    rule = rule_of(call.func)
    found = None if rule is None else rule(call, operand, place, out)
    if found is None:
        return None
    sizes = operand.shape
    return [
        a if NONE < a < len(sizes) and sizes[a] == size else NONE for a, size in zip(found, out.shape, strict=False)
    ]


@cache
def rule_of(func: Any) -> Rule | None:
    """Return the rule of an operation, or None."""
    name = func._schema.name.removeprefix("aten::")
    plain = name if name.endswith("__") else name.removesuffix("_")
    # What writes into its operand is not always tagged.
    same = getattr(getattr(torch.ops.aten, plain, None), func._schema.overload_name or "default", None)
    if torch.Tag.pointwise in func.tags or torch.Tag.pointwise in getattr(same, "tags", ()):
        return elementwise
    return _RULES.get(name) or _RULES.get(plain)


@cache
def reads_no_element(func: Any) -> bool:
    """Return whether a result depends on an operand's shape alone."""
    return func._schema.name.removeprefix("aten::") in _SHAPE_ALONE


def counts_up(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation makes the numbers 0, 1, 2, ..."""
    if not _is_arange(func):
        return False
    call = Call(func, args, kwargs)
    return not (call.has("start") and call["start"] != 0) and not (call.has("step") and call["step"] != 1)


@cache
def _is_arange(func: Any) -> bool:
    return func._schema.name == "aten::arange" and func._schema.overload_name in ("", "start", "start_step")


@cache
def writes_undeclared(func: Any) -> bool:
    """Return whether an operation may write into operands of which its schema does not say so."""
    return func._schema.name in ("aten::native_batch_norm", "aten::cudnn_batch_norm")


def undeclared_writes(call: Call) -> list[torch.Tensor]:
    """Return what such an operation writes: running moments, in training."""
    return [call[name] for name in ("running_mean", "running_var") if call["training"] and call[name] is not None]
