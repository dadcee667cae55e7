"""What an operation of torch does to its arguments, and the tensors among these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from pplgrad.pyro._tracing.axes import rule_of, writes_undeclared


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _collect(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(item, found)


class Facts(NamedTuple):
    """What an operation does beside computing.

    It draws, reads elements into Python, has a shape that depends on them, makes a tensor of data, writes, swaps a storage, writes
    what its schema does not say, cuts the derivative, may fail for some values of its arguments, or may have a size that depends on them.
    """

    random: bool
    reads: bool
    dynamic: bool
    lifts: bool
    written: bool
    sets: bool
    undeclared: bool
    cuts: bool
    fails: bool
    sizes: bool


# By a part of the name between underscores: indices, probabilities and matrices are looked into, and whole numbers divided.
_CHECKING_VALUES = re.compile(
    r"(^|_)(cholesky|inv|inverse|pinv|solve|lu|eig\w*|svd\w*|qr|lstsq|index|gather|scatter|take|embedding|multinomial|bernoulli|"
    r"binomial|poisson|normal|exponential|geometric|cauchy|dirichlet|gamma|uniform|hot|remainder|fmod|divide|bincount|histc|histogram|"
    r"interleave|nll|bucketize|searchsorted|assert|unique|nonzero|floordiv|ilshift|irshift)(_|$)"
)


def _may_fail(func: Any, tags: Any, name: str) -> bool:
    """Return whether an operation may raise an error because of the elements of its arguments.

    Pointwise ones and those with a rule for their axes do not, but for those that look into numbers: indices, probabilities, matrices.
    """
    if (
        _CHECKING_VALUES.search(name)
        or "mode" in func._schema.overload_name
        or func is torch.ops.aten.pow.Tensor_Tensor
    ):
        return True
    return torch.Tag.pointwise not in tags and rule_of(func) is None and not is_view(func)


def is_view(func: Any) -> bool:
    """Return whether all that an operation returns are views of its arguments, into which it wrote nothing."""
    returns = func._schema.returns
    return bool(returns) and all(x.alias_info is not None and not x.alias_info.is_write for x in returns)


@cache
def facts_of(func: Any) -> Facts:
    tags, name = func.tags, func._schema.name
    return Facts(
        torch.Tag.nondeterministic_seeded in tags,
        torch.Tag.data_dependent_output in tags,
        torch.Tag.dynamic_output_shape in tags,
        name in ("aten::lift_fresh", "aten::lift_fresh_copy", "aten::lift"),
        bool(places_written(func)),
        name == "aten::set_",
        writes_undeclared(func),
        name in ("aten::detach", "aten::detach_", "aten::detach_copy"),
        _may_fail(func, tags, name.removeprefix("aten::")),
        torch.Tag.pointwise not in tags and rule_of(func) is None and not is_view(func),
    )


_known_sizes: dict[Any, bool] = {}


def is_size_known(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Return whether the sizes of what an operation returned follow from the sizes of its arguments alone.

    The operation runs once more on tensors without elements. One that cannot, or that returns a sparse tensor, has sizes that may not.
    """
    made = tensors_in(out)
    if any(x.layout is not torch.strided or x.is_nested for x in (*made, *tensors_in((args, kwargs)))):
        return False
    if all(x.dim() == 0 for x in made):
        return True  # One number, whatever it is.
    try:
        key = (func, tree_map(_form, args), tree_map(_form, kwargs)).__repr__()
    except RuntimeError:
        return False
    if key not in _known_sizes:
        if len(_known_sizes) > 4096:
            _known_sizes.clear()
        try:
            found = tensors_in(func(*tree_map(_without_elements, args), **tree_map(_without_elements, kwargs)))
            _known_sizes[key] = [x.shape for x in found] == [x.shape for x in made]
        except Exception:
            _known_sizes[key] = False
    return _known_sizes[key]


def _form(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x


def _without_elements(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else None if isinstance(x, torch.Generator) else x


def operands_of(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the tensors among an operation's arguments, those of a list one by one, with the argument's place."""
    for place, arg in enumerate(args):
        for tensor in tensors_in(arg):
            yield place, tensor
    if kwargs:
        names = [a.name for a in func._schema.arguments]
        for name, arg in kwargs.items():
            if name != "out":
                for tensor in tensors_in(arg):
                    yield names.index(name), tensor


@cache
def places_written(func: Any) -> list[tuple[int, str]]:
    every = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in every if a.alias_info is not None and a.alias_info.is_write]


def dynamic_shape(func: Any, args: Any) -> bool:
    """Return whether an operation's result has a shape that depends on values: an index of whole numbers has not."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
    return True
