"""Along which axes the results of operations on arrays follow their operands: arithmetic, reductions, indices, copies.

A rule says `NONE` where elements are mixed, and is None as a whole where that is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

NONE = -1
Follows = Sequence[int]
"""For each axis of the result, from the left, the operand's axis, or `NONE`."""

Rule = Callable[["Call", torch.Tensor, int, torch.Tensor], "Follows | None"]
"""From the call, an operand, its place among the call's arguments (that of its list for a list), and a result.

Where the operand's axis has another size than the result's, it is not followed, whatever a rule says.
"""


def _in_no_order(tensor: torch.Tensor) -> int:
    return NONE


class Call:
    """An operation's arguments by name.

    `counting_axis` returns the axis of a tensor along which it is known to hold 0, 1, 2, ... at every step, or `NONE`.
    """

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        counting_axis: Callable[[torch.Tensor], int] = _in_no_order,
    ) -> None:
        self.func, self.args, self.kwargs, self.counting_axis = func, args, kwargs, counting_axis

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


def elementwise(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Line up shapes at the right; an axis of size one is read by all elements."""
    lead = out.dim() - x.dim()
    return [axis - lead if axis >= lead else NONE for axis in range(out.dim())]


def nothing(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Every element of the result may read every element."""
    return [NONE] * out.dim()


def only(place: int, rule: Rule) -> Rule:
    """Follow one operand by a rule; the others are mixed."""
    return lambda call, x, where, out: rule(call, x, where, out) if where == place else nothing(call, x, where, out)


def if_not_reduced(rule: Rule) -> Rule:
    """Losses with `reduction="none"`; what is summed up beside them has no axes."""

    def followed(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
        return rule(call, x, place, out) if call["reduction"] == 0 and out.dim() else [NONE] * out.dim()

    return followed


def keeping_all_but(count: int) -> Rule:
    """Mix the last axes; the others stay where they are."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
        if x.dim() != out.dim():
            return None
        return [axis if axis < out.dim() - count else NONE for axis in range(out.dim())]

    return rule


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
    """Operations that keep the shape, or the size of all axes but some, and mix elements along the axes of that argument."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
        mixed = _axes(call[name], out.dim())
        plain = elementwise(call, x, place, out)
        return [NONE if axis in mixed else follow for axis, follow in enumerate(plain)]

    return rule


def _across(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """The opposite: along `dim` elements stay apart, and are mixed along all other axes, as norms of rows do."""
    dim = call["dim"] % max(out.dim(), 1)
    return [axis if axis == dim and x.dim() == out.dim() else NONE for axis in range(out.dim())]


def _concatenated(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    if x.dim() != out.dim():  # An empty tensor of one axis, which torch lets pass.
        return [NONE] * out.dim()
    along = call["dim"] % out.dim()
    return [NONE if axis == along else axis for axis in range(out.dim())]


def _with_new_axis(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    along = call["dim"] % out.dim()
    return [NONE if axis == along else axis - (axis > along) for axis in range(out.dim())]


def _without_axis(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    along = call["dim"] % x.dim()
    return [axis for axis in range(x.dim()) if axis != along]


def _permuted(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    return [axis % x.dim() for axis in call["dims"]]


def _transposed(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    order = list(range(x.dim()))
    if x.dim() > 1:
        one, other = (call["dim0"], call["dim1"]) if call.has("dim0") else (0, 1)
        order[one], order[other] = order[other], order[one]
    return order


def _diagonals(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """`diag_embed`: both axes of a diagonal matrix follow the diagonal; zeros read nothing."""
    two = _axes([call["dim1"], call["dim2"]], out.dim())
    rest = iter(range(x.dim() - 1))
    found = [x.dim() - 1 if axis in two else next(rest) for axis in range(out.dim())]
    return [NONE if axis in two and call["offset"] else follow for axis, follow in enumerate(found)]


def _diagonal(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    two = _axes([call["dim1"], call["dim2"]], x.dim())
    return [*[axis for axis in range(x.dim()) if axis not in two], NONE]


def _repeated(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    plain = elementwise(call, x, place, out)
    return [NONE if times != 1 else follow for times, follow in zip(call["repeats"], plain, strict=True)]


def _index_select(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    along = call["dim"] % max(out.dim(), 1)
    if place == 2:
        return [0 if axis == along and x.dim() == 1 else NONE for axis in range(out.dim())]
    return [NONE if axis == along else axis for axis in range(out.dim())]


def _gathered(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """`gather`: element i of the result reads index i, and row i of what it picks from; the latter may be longer."""
    return elementwise(call, x, place, out) if place == 2 else _along("dim")(call, x, place, out)


def _scattered(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """Index and source lie along the result's axes but for `dim`; what they do not reach stays what it was."""
    return _along("dim")(call, x, place, out) if place else elementwise(call, x, place, out)


def _written_along(written: int, rule: Rule) -> Rule:
    """Operations that write an operand into a copy of the first one, at places along `dim` that another one may say."""

    def followed(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
        if place in (0, written):
            return rule(call, x, place, out) if place else elementwise(call, x, place, out)
        return [NONE] * out.dim()

    return followed


def _is_mask(index: torch.Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _start(indices: Sequence[torch.Tensor | None]) -> int:
    """Return where the common shape of arrays of whole numbers stands in `self[indices]`: where they stood, or in front."""
    arrays = [i for i, index in enumerate(indices) if index is not None]
    return arrays[0] if arrays and arrays[-1] - arrays[0] == len(arrays) - 1 else 0


def _indexed(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """`self[indices]` with arrays of whole numbers."""
    source, indices = call["self"], list(call["indices"])
    arrays = [index for index in indices if index is not None]
    if any(_is_mask(index) for index in arrays):
        return None
    common, start = max((index.dim() for index in arrays), default=0), _start(indices)
    if place:
        lead = start + common - x.dim()
        return [axis - lead if lead <= axis < start + common else NONE for axis in range(out.dim())]
    rest = [axis for axis in range(source.dim()) if axis >= len(indices) or indices[axis] is None]
    picked = [NONE] * common
    for axis, index in enumerate(indices):
        # An index that counts 0, 1, 2, ..., as Pyro's Vindex writes a slice, picks element i for element i.
        if index is not None and (counting := call.counting_axis(index)) != NONE:
            picked[counting + common - index.dim()] = axis
    return [*rest[:start], *picked, *rest[start:]]


def _put(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """`self[indices] = values`: a value lines up with what it is written to; a mask says which elements become a number."""
    if place == 0:
        return elementwise(call, x, place, out)
    indices = list(call["indices"])
    arrays = [index for index in indices if index is not None]
    if any(_is_mask(index) for index in arrays):
        if len(arrays) > 1 or call["values"].numel() > 1:
            return None
        start = _start(indices)
        return [axis - start if start <= axis < start + x.dim() else NONE for axis in range(out.dim())]
    if place == 1:
        return [NONE] * out.dim()
    rest = [axis for axis in range(out.dim()) if axis >= len(indices) or indices[axis] is None]
    common, start = max((index.dim() for index in arrays), default=0), _start(indices)
    lead = len(rest) + common - x.dim()
    found = [NONE] * out.dim()
    for number, axis in enumerate(rest):
        found[axis] = max(number + (common if number >= start else 0) - lead, NONE)
    return found


def _searched(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """`searchsorted`, `bucketize`: numbers one by one, among others that are sorted along their last axis."""
    if call.func._schema.arguments[place].name == "self":
        return elementwise(call, x, place, out)
    return [axis if axis < x.dim() - 1 else NONE for axis in range(out.dim())]


def _times_repeated(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """`repeat_interleave`, of a tensor along `dim`, or of the numbers of times alone."""
    return _along("dim")(call, x, place, out) if call.has("dim") and place == 0 else None


def _first_alone(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    return elementwise(call, x, place, out) if place == 0 else None


_ELEMENTWISE = (
    # Copies, and what overwrites its operand.
    "clone _to_copy copy alias detach lift_fresh lift lift_fresh_copy contiguous _conj _neg_view resolve_conj alias_copy "
    "detach_copy expand_copy _conj_copy _neg_view_copy fill zero tril triu masked_fill where "
    # Random numbers.
    "native_dropout bernoulli rand_like randn_like randint_like poisson normal normal_functional binomial _standard_gamma "
    "uniform exponential geometric cauchy log_normal random rrelu_with_noise rrelu_with_noise_functional "
    # Arithmetic that torch does not call pointwise.
    "floor_divide rsub complex polar hardswish log_sigmoid_forward _prelu_kernel _add_relu __ilshift__ __irshift__ "
    "_standard_gamma_grad _dirichlet_grad elu_backward leaky_relu_backward hardtanh_backward hardshrink_backward "
    "softshrink_backward softplus_backward hardsigmoid_backward hardswish_backward mish_backward log_sigmoid_backward "
    "_prelu_kernel_backward "
    # Views in place: the operand is the result.
    "unsqueeze_ squeeze_ t_ transpose_"
)

ARRAYS: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(
        "binary_cross_entropy_with_logits binary_cross_entropy mse_loss smooth_l1_loss huber_loss soft_margin_loss".split(),
        if_not_reduced(elementwise),
    ),
    **dict.fromkeys(
        "sum mean amax amin max min argmax argmin prod logsumexp all any var std nansum median nanmedian mode kthvalue "
        "linalg_vector_norm norm aminmax _aminmax var_mean std_mean count_nonzero dot vdot trace dist linalg__powsum "
        "_is_all_true _is_any_true".split(),
        _reduced,
    ),
    **dict.fromkeys(
        "cumsum cumprod logcumsumexp _logcumsumexp cummax cummin _softmax _log_softmax _safe_softmax _softmax_backward_data "
        "_log_softmax_backward_data sort argsort topk glu glu_backward linalg_cross _fft_c2c _fft_r2c _fft_c2r slice_copy "
        "narrow_copy slice_backward split_copy split_with_sizes_copy unsafe_split unsafe_split_with_sizes".split(),
        _along("dim"),
    ),
    **dict.fromkeys(("flip", "roll", "rot90"), _along("dims")),
    **dict.fromkeys(("renorm", "_weight_norm_interface"), _across),
    **dict.fromkeys(("multinomial", "_sample_dirichlet"), keeping_all_but(1)),
    "cat": _concatenated,
    **dict.fromkeys(("stack", "unsqueeze_copy", "select_backward"), _with_new_axis),
    **dict.fromkeys(("select_copy", "unbind_copy"), _without_axis),
    "permute_copy": _permuted,
    **dict.fromkeys(("transpose_copy", "t_copy"), _transposed),
    **dict.fromkeys(("diag_embed", "diagonal_backward"), _diagonals),
    "diagonal_copy": _diagonal,
    "repeat": _repeated,
    "repeat_interleave": _times_repeated,
    "index_select": _index_select,
    "gather": _gathered,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _scattered),
    **dict.fromkeys(("index", "_unsafe_index"), _indexed),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), _put),
    **dict.fromkeys(("index_add", "index_copy", "index_reduce"), _written_along(3, _along("dim"))),
    "slice_scatter": _written_along(1, _along("dim")),
    "select_scatter": _written_along(1, _with_new_axis),
    "index_fill": only(0, elementwise),
    "isin": only(0, elementwise),
    **dict.fromkeys(("masked_scatter", "put"), _first_alone),
    "take": lambda call, x, place, out: elementwise(call, x, place, out) if place else None,
    **dict.fromkeys(("searchsorted", "bucketize"), _searched),
}
