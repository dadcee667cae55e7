"""Where the axes of an operation's operands are in its outputs: the rules of single operations, from a list of those known.

An axis of an operand is at an axis of the output if every output element reads, of that operand, only elements with its own
index along it. What has no rule here, or a rule that does not fit the equation, keeps no axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pplgrad.core.shapes import Axis, Shape, reshaped
from pplgrad.engine.black_box import BlackBox
from pplgrad.numpyro._compat_jax import called_back

Places = tuple[int | None, ...]
"""For each axis of an operand its place in the output, or None."""
Rule = Callable[[Any, list[Shape], Shape], Sequence[Places]]
"""From an equation's parameters, the operands' shapes and the (first) output's shape to the places of each operand's axes."""


def moved(equation: Any, operand: int, axis: Axis) -> Axis | None:
    """Return where an axis of an operand is in the output of an equation, if it is there in all of them."""
    if axis.at < 0:
        return axis
    if equation.primitive.name == "reshape":
        return _reshaped(equation, axis)
    places = _places(equation)
    place = None if places is None else places[operand][axis.at]
    if place is None:
        return None
    size = equation.invars[operand].aval.shape[axis.at]
    kept = all(place < len(v.aval.shape) and v.aval.shape[place] == size for v in equation.outvars)
    return axis._replace(at=place) if kept else None


def one_by_one(equation: Any) -> bool:
    """Return whether each output of an equation is the operand in the same place."""
    return equation.primitive.name in _PASSING and len(equation.invars) == len(equation.outvars)


def _places(equation: Any) -> Sequence[Places] | None:
    rule = _RULES.get(equation.primitive.name)
    if rule is None or not equation.outvars:
        return None
    shapes = [tuple(atom.aval.shape) for atom in equation.invars]
    try:
        return rule(equation.params, shapes, tuple(equation.outvars[0].aval.shape))
    except (KeyError, AttributeError, IndexError, TypeError, ValueError):
        # A version of the host that writes this operation otherwise: nothing is known of it.
        return None


def _reshaped(equation: Any, axis: Axis) -> Axis | None:
    if equation.params.get("dimensions") is not None:
        return None
    return reshaped(axis, equation.invars[0].aval.shape, equation.outvars[0].aval.shape)


def _same(shape: Shape, out: Shape) -> Places:
    """Return the places of an operand that lines up with the output, a scalar or a size of 1 being repeated."""
    return tuple(range(len(shape))) if len(shape) == len(out) else (None,) * len(shape)


def _elementwise(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    return [_same(shape, out) for shape in shapes]


def _without(dropped: Sequence[int], ndim: int) -> Places:
    """Return the places if some axes are taken out."""
    gone = {int(axis) for axis in dropped}
    return tuple(None if axis in gone else axis - sum(g < axis for g in gone) for axis in range(ndim))


def _but(mixed: Sequence[int], ndim: int) -> Places:
    """Return the places if some axes are mixed and all stay where they are."""
    gone = {int(axis) for axis in mixed}
    return tuple(None if axis in gone else axis for axis in range(ndim))


def _reduction(key: str) -> Rule:
    def rule(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
        return [_without(params[key], len(shape)) if shape else () for shape in shapes]

    return rule


def _along(key: str) -> Rule:
    """Return the rule of operations that mix one axis and leave all where they are."""

    def rule(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
        return [_but([params[key]], len(shape)) for shape in shapes]

    return rule


def _reversed(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    return [_but(params["dimensions"], len(shapes[0]))]


def _transposed(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    order = [int(axis) for axis in params["permutation"]]
    return [tuple(order.index(axis) for axis in range(len(order)))]


def _broadcast(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    return [tuple(int(axis) for axis in params["broadcast_dimensions"]), *[(None,) * len(s) for s in shapes[1:]]]


def _squeezed(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    return [_without(params["dimensions"], len(shapes[0]))]


def _sliced(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """A slice keeps the axes that it takes whole and in order: any other moves elements, or leaves some out."""
    strides = params["strides"] or (1,) * len(shapes[0])
    rows = zip(params["start_indices"], params["limit_indices"], strides, shapes[0], strict=True)
    cut = [axis for axis, (start, end, step, size) in enumerate(rows) if (start, end, step) != (0, size, 1)]
    return [_but(cut, len(shapes[0]))]


def _padded(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    moved_ = [axis for axis, widths in enumerate(params["padding_config"]) if any(widths)]
    return [_but(moved_, len(shapes[0])), ()]


def _stacked(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    new = params["axis"]
    return [tuple(axis + (axis >= new) for axis in range(len(shape))) for shape in shapes]


def _unstacked(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    return [_without([params["axis"]], len(shapes[0]))]


def _tiled(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    return [_but([axis for axis, count in enumerate(params["reps"]) if count != 1], len(shapes[0]))]


def _dynamic_slice(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """An axis that is taken whole starts at 0 wherever it is asked to start."""
    return [tuple(range(len(shapes[0]))), *[()] * (len(shapes) - 1)]


def _dynamic_update(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    return [tuple(range(len(shapes[0]))), tuple(range(len(shapes[1]))), *[()] * (len(shapes) - 2)]


def _dotted(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    (contracted, batch) = params["dimension_numbers"]
    found, free_before = [], 0
    for side in (0, 1):
        together, ndim = [int(a) for a in batch[side]], len(shapes[side])
        gone = {int(a) for a in contracted[side]}
        free = [axis for axis in range(ndim) if axis not in gone and axis not in together]
        found.append(
            tuple(
                together.index(axis)
                if axis in together
                else len(together) + free_before + free.index(axis)
                if axis in free
                else None
                for axis in range(ndim)
            )
        )
        free_before += len(free)
    return found


def _convolved(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """Examples stay apart; every other axis, and all of the kernel, is mixed."""
    numbers = params["dimension_numbers"]
    batch = numbers.lhs_spec[0] if params["batch_group_count"] == 1 else None
    kept = tuple(numbers.out_spec[0] if axis == batch else None for axis in range(len(shapes[0])))
    return [kept, (None,) * len(shapes[1])]


def _windowed(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """A window of size 1, which moves one by one and has no border, leaves an axis as it is."""
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    still = [all(params[name][axis] == 1 for name in names) for axis in range(len(out))]
    still = [yes and not any(params["padding"][axis]) for axis, yes in enumerate(still)]
    return [tuple(a if still[a] else None for a in range(len(shape))) if shape else () for shape in shapes]


def _gathered(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """A lookup: the indices' own axes come out, and of what is looked up those that are taken whole or stand beside the indices."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    operand, indices = shapes
    offsets = [int(axis) for axis in numbers.offset_dims]
    # Where each axis of the indices, but the last, is in the output.
    batch = [axis for axis in range(len(out)) if axis not in offsets]
    beside = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = dict(zip((a for a in range(len(operand)) if a not in gone), offsets, strict=True))
    places: list[int | None] = []
    for axis, size in enumerate(operand):
        if axis in beside:
            places.append(batch[beside[axis]])
        else:
            places.append(window[axis] if axis in window and sizes[axis] == size else None)
    return [tuple(places), (*batch[: len(indices) - 1], None)]


def _scattered(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """An update in places: what is not in them stays, and of the updates stay the axes that no index moves."""
    numbers = params["dimension_numbers"]
    operand, indices, updates = shapes
    beside = dict(zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = dict(zip(numbers.update_window_dims, (a for a in range(len(operand)) if a not in gone), strict=True))
    scattered = iter(range(len(indices) - 1))
    places: list[int | None] = []
    for axis in range(len(updates)):
        if axis in window:
            target = window[axis]
            places.append(None if target in numbers.scatter_dims_to_operand_dims else target)
        else:
            places.append(beside.get(next(scattered)))
    return [tuple(range(len(operand))), tuple(beside.get(a) for a in range(len(indices))), tuple(places)]


def _batched(core: int) -> Rule:
    """Return the rule of linear algebra on the last axes: those before them stay."""

    def rule(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
        return [tuple(a if a < len(shape) - core else None for a in range(len(shape))) for shape in shapes]

    return rule


def _triangular(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """Beside the axes in front, the right-hand sides are solved for one by one."""
    matrix, right = _batched(2)(params, shapes, out)
    column = len(right) - 1 if params["left_side"] else len(right) - 2
    return [matrix, tuple(column if axis == column else place for axis, place in enumerate(right))]


def _transformed(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    return _batched(len(params["fft_lengths"]))(params, shapes, out)  # type: ignore[return-value]


def _recast(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """The same bits as numbers of another kind: parts of one number, if they are, lie along a last axis."""
    return [tuple(axis if axis < len(out) else None for axis in range(len(shape))) for shape in shapes]


def _called_back(params: Any, shapes: list[Shape], out: Shape) -> list[Places]:
    """Of a callback nothing is known, unless it is one of ours: these are called element by element, and say of which axes."""
    function = called_back(params)
    if not isinstance(function, BlackBox):
        raise KeyError("callback")
    return function.places(shapes, out)


_PASSING = {"optimization_barrier", "device_put", "copy", "copy_p"}
_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
convert_element_type copy copy_p cos cosh device_put digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
igamma_grad_a igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or
polygamma population_count pow random_gamma_grad real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
xor zeros_like zeta
""".split()
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys((f"reduce_{name}" for name in "and max min or prod sum xor".split()), _reduction("axes")),
    **dict.fromkeys(("argmax", "argmin"), _reduction("axes")),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "split", "top_k"), _along("axis")),
    **dict.fromkeys(("sort", "concatenate"), _along("dimension")),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window"), _windowed),
    **dict.fromkeys(("scatter", *(f"scatter-{kind}" for kind in "add max min mul sub".split())), _scattered),
    **dict.fromkeys(("cholesky", "eigh", "lu", "qr", "svd"), _batched(2)),
    "reduce": _reduction("dimensions"),
    "rev": _reversed,
    "transpose": _transposed,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeezed,
    "slice": _sliced,
    "pad": _padded,
    "stack": _stacked,
    "unstack": _unstacked,
    "tile": _tiled,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "dot_general": _dotted,
    "conv_general_dilated": _convolved,
    "gather": _gathered,
    "triangular_solve": _triangular,
    "fft": _transformed,
    "bitcast_convert_type": _recast,
    "pure_callback": _called_back,
}
