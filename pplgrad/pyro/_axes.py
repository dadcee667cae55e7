"""Which axis of an operation's result follows which axis of an operand, element by element.

A rule maps each axis of a result to the axis of an operand along which element i of the result reads elements i alone, or to
`NONE`: then it may read every element. The rules are a closed world: an operation without one mixes the elements of all axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

NONE = -1
Follows = Sequence[int]
"""For each axis of the result, from the left, the operand's axis, or `NONE`."""

Rule = Callable[[Any, torch.Tensor, int, torch.Tensor], "Follows | None"]
"""From the call, an operand, its place among the call's arguments (that of its list for a list), and a result."""


class Call:
    """An operation's arguments by name."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs

    def __getitem__(self, name: str) -> Any:
        place, default = _arguments(self.func)[name]
        if place < len(self.args):
            return self.args[place]
        return self.kwargs.get(name, default)

    def has(self, name: str) -> bool:
        """Return whether the operation has an argument of this name."""
        return name in _arguments(self.func)


@cache
def _arguments(func: Any) -> dict[str, tuple[int, Any]]:
    return {
        a.name: (i, a.default_value if a.has_default_value() else None) for i, a in enumerate(func._schema.arguments)
    }


def follows(call: Call, operand: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """Return which axes of the result follow which of the operand; None if nothing is known of the operation."""
    rule = rule_of(call.func)
    return None if rule is None else rule(call, operand, place, out)


@cache
def rule_of(func: Any) -> Rule | None:
    """Return the rule of an operation, or None."""
    name = func._schema.name.removeprefix("aten::")
    for key in (name, name.removesuffix("_")):
        if key in _RULES:
            return _RULES[key]
    return _elementwise if torch.Tag.pointwise in func.tags else None


@cache
def reads_no_element(func: Any) -> bool:
    """Return whether a result depends on an operand's shape alone."""
    return func._schema.name.removeprefix("aten::") in _SHAPE_ALONE


_SHAPE_ALONE = {"zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_empty_strided"}


def _elementwise(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Line up shapes at the right; an axis of size one is read by all elements."""
    lead = out.dim() - x.dim()
    sizes, wanted = x.shape, out.shape
    return [axis - lead if axis >= lead and sizes[axis - lead] == wanted[axis] else NONE for axis in range(out.dim())]


def _if_not_reduced(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """Losses that are elementwise with `reduction="none"`."""
    return _elementwise(call, x, place, out) if call["reduction"] == 0 else None


def _axes(given: Any, ndim: int) -> set[int]:
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return set(range(ndim))
    return {axis % max(ndim, 1) for axis in (given if isinstance(given, (list, tuple)) else [given])}


def _reduced(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Sums, maxima and the like over axes that the call names `dim`, or over all."""
    gone = _axes(call["dim"] if call.has("dim") else None, x.dim())
    kept = [axis for axis in range(x.dim()) if axis not in gone]
    if out.dim() == x.dim():
        return [axis if axis in kept else NONE for axis in range(x.dim())]
    return kept if len(kept) == out.dim() else [NONE] * out.dim()


def _along(name: str) -> Rule:
    """Operations that keep the shape, or the size of all axes but one, and mix elements along the axes of that argument."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
        mixed = _axes(call[name], out.dim())
        plain = _elementwise(call, x, place, out)
        return [NONE if axis in mixed else follow for axis, follow in enumerate(plain)]

    return rule


def _concatenated(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    if x.dim() != out.dim():  # An empty tensor of one axis, which torch lets pass.
        return [NONE] * out.dim()
    along = call["dim"] % out.dim()
    return [NONE if axis == along else axis for axis in range(out.dim())]


def _stacked(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    along = call["dim"] % out.dim()
    return [NONE if axis == along else axis - (axis > along) for axis in range(out.dim())]


def _index_select(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    along = call["dim"] % max(out.dim(), 1)
    if place == 2:
        return [0 if axis == along and x.dim() == 1 else NONE for axis in range(out.dim())]
    return [NONE if axis == along else axis for axis in range(out.dim())]


def _gathered(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """`gather`: element i of the result reads index i, and row i of what it picks from; the latter may be longer."""
    along = call["dim"] % max(out.dim(), 1)
    plain = _elementwise(call, x, place, out)
    return plain if place == 2 else [NONE if axis == along else follow for axis, follow in enumerate(plain)]


def _scattered(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    along = call["dim"] % max(out.dim(), 1)
    plain = _elementwise(call, x, place, out)
    return [NONE if axis == along and place else follow for axis, follow in enumerate(plain)]


def _indexed(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """`self[indices]` with arrays of whole numbers: their common shape stands where they stood, or in front."""
    source, indices = call["self"], list(call["indices"])
    arrays = [i for i, index in enumerate(indices) if index is not None]
    if any(indices[i].dtype in (torch.bool, torch.uint8) for i in arrays):
        return None
    common = max((indices[i].dim() for i in arrays), default=0)
    start = arrays[0] if arrays and arrays[-1] - arrays[0] == len(arrays) - 1 else 0
    if place:
        found = [NONE] * out.dim()
        for axis in range(common):
            own = axis - (common - x.dim())
            if own >= 0 and x.shape[own] == out.shape[start + axis]:
                found[start + axis] = own
        return found
    rest = [axis for axis in range(source.dim()) if axis not in arrays]
    return [*rest[:start], *[NONE] * common, *rest[start:]]


def _embedded(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    if place == 0:
        return [NONE] * (out.dim() - 1) + [1]
    return [*range(out.dim() - 1), NONE]


def _product(matrices: tuple[int, int], beside: int | None = None) -> Rule:
    """Products of matrices, batched or not: rows follow the first, columns the second; what is added lines up at the right."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
        if place == beside:
            return _elementwise(call, x, place, out)
        ndim = out.dim()
        first = place == matrices[0]
        found = [axis if axis < x.dim() - 2 else NONE for axis in range(ndim)]
        if x.dim() >= 2:
            if first:
                row = ndim - 2 if call.args[matrices[1]].dim() >= 2 else ndim - 1
                found[row] = x.dim() - 2
            else:
                found[ndim - 1] = x.dim() - 1
        return found

    return rule


def _vector_product(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """A matrix times a vector (`mv`, `addmv`): rows follow the matrix."""
    matrix = 0 if call.func._schema.name == "aten::mv" else 1
    if place < matrix:
        return _elementwise(call, x, place, out)
    return [0 if place == matrix else NONE]


def _in_batch(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Linear algebra on the last two axes: those before are a batch, lined up at the right before the matrices."""
    operands = [a for a in call.args if isinstance(a, torch.Tensor)]
    batch = max(a.dim() - 2 for a in operands)
    lead = batch - (x.dim() - 2)
    found = [NONE] * out.dim()
    for axis in range(min(batch, out.dim())):
        if axis >= lead and x.shape[axis - lead] == out.shape[axis]:
            found[axis] = axis - lead
    return found


def _convolved(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """The batch follows the input; channels follow the weights."""
    if place and call["transposed"]:
        return [NONE] * out.dim()
    return [0 if axis == (0 if place == 0 else 1) else NONE for axis in range(out.dim())]


def _pooled(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Batch and channels stay; places are mixed."""
    return [axis if axis < out.dim() - 2 and x.dim() == out.dim() else NONE for axis in range(out.dim())]


def _normalized(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """`layer_norm`: what stands before the normalised axes stays apart."""
    mixed = len(call["normalized_shape"])
    if place:
        return _elementwise(call, x, place, out)
    return [axis if axis < x.dim() - mixed else NONE for axis in range(out.dim())]


def _group_normalized(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    return [0 if axis == 0 and place == 0 else NONE for axis in range(out.dim())]


def _padded(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    pad = list(call["pad"])
    moved = {out.dim() - 1 - i // 2 for i, width in enumerate(pad) if width}
    return [NONE if axis in moved else axis for axis in range(out.dim())]


def _repeated(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    plain = _elementwise(call, x, place, out)
    return [NONE if times != 1 else follow for times, follow in zip(call["repeats"], plain, strict=True)]


def _likelihood(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """`nll_loss` with `reduction="none"`: one number for each row."""
    return [0] if call["reduction"] == 0 and out.dim() == 1 and x.dim() and place < 2 else None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "clone _to_copy copy alias detach lift_fresh lift contiguous tril triu native_dropout bernoulli where masked_fill "
        "fill zero log_sigmoid_forward rand_like randn_like poisson normal full_like _conj _neg_view resolve_conj".split(),
        _elementwise,
    ),
    **dict.fromkeys(
        "binary_cross_entropy_with_logits binary_cross_entropy mse_loss smooth_l1_loss huber_loss soft_margin_loss".split(),
        _if_not_reduced,
    ),
    **dict.fromkeys(
        "sum mean amax amin max min argmax argmin prod logsumexp all any var std nansum median nanmedian mode kthvalue "
        "linalg_vector_norm norm aminmax var_mean std_mean count_nonzero".split(),
        _reduced,
    ),
    **dict.fromkeys(
        "cumsum cumprod logcumsumexp cummax cummin _softmax _log_softmax _softmax_backward_data "
        "_log_softmax_backward_data sort argsort topk".split(),
        _along("dim"),
    ),
    **dict.fromkeys(("flip", "roll"), _along("dims")),
    "cat": _concatenated,
    "stack": _stacked,
    "index_select": _index_select,
    "gather": _gathered,
    **dict.fromkeys(("scatter", "scatter_add"), _scattered),
    "index": _indexed,
    "embedding": _embedded,
    **dict.fromkeys(("mm", "bmm"), _product((0, 1))),
    **dict.fromkeys(("addmm", "baddbmm"), _product((1, 2), 0)),
    "linear": lambda call, x, place, out: (
        [*range(out.dim() - 1), NONE] if place == 0 else [*[NONE] * (out.dim() - 1), 0]
    ),
    **dict.fromkeys(("mv", "addmv"), _vector_product),
    **dict.fromkeys(
        "linalg_cholesky_ex cholesky cholesky_solve cholesky_inverse linalg_solve_triangular triangular_solve linalg_inv_ex "
        "inverse _linalg_det _linalg_slogdet linalg_eigh _linalg_eigh".split(),
        _in_batch,
    ),
    "convolution": _convolved,
    **dict.fromkeys(
        "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d".split(),
        _pooled,
    ),
    "native_layer_norm": _normalized,
    "native_group_norm": _group_normalized,
    "constant_pad_nd": _padded,
    "repeat": _repeated,
    "nll_loss_forward": _likelihood,
}
