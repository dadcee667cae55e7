"""Along which axes the results of products, linear algebra and the layers of networks follow their operands."""

from __future__ import annotations

import torch

from pplgrad.pyro._tracing.axis_rules import (
    NONE,
    Call,
    Follows,
    Rule,
    elementwise,
    if_not_reduced,
    keeping_all_but,
    nothing,
    only,
)


def at(*axes: int) -> Rule:
    """Follow these axes of the operand, which the call has no say in; axes of the result beyond them are mixed."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
        return [*axes[: out.dim()], *[NONE] * (out.dim() - len(axes))]

    return rule


def by_place(*rules: Rule, others: Rule = nothing) -> Rule:
    """Follow each operand by a rule of its own."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
        return (rules[place] if place < len(rules) else others)(call, x, place, out)

    return rule


def _if_of(ndim: int, rule: Rule) -> Rule:
    """Follow an operand of so many axes, among which is a batch."""
    return lambda call, x, place, out: rule(call, x, place, out) if x.dim() == ndim else None


# Products.


def _product(matrices: tuple[int, int], beside: int | None = None) -> Rule:
    """Products of matrices, batched or not: rows follow the first, columns the second; what is added lines up at the right."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
        if place == beside:
            return elementwise(call, x, place, out)
        row, column = (x.dim() - 2, NONE) if place == matrices[0] else (NONE, x.dim() - 1)
        return [*range(out.dim() - 2), row, column]

    return rule


def _linear(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """The weights may be one vector; then no axis of the result is theirs."""
    if place == 0:
        return [axis if axis < x.dim() - 1 else NONE for axis in range(out.dim())]
    found = [NONE] * out.dim()
    if call["weight"].dim() == 2:
        found[-1] = 0
    return found


def _pairwise(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Distances of all pairs: rows follow the first operand's vectors, columns the second's."""
    plain = elementwise(call, x, place, out)
    return [*plain[:-2], *((x.dim() - 2, NONE) if place == 0 else (NONE, x.dim() - 2))]


def _trilinear(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """The operands get new axes, are multiplied, and some of all axes are summed over."""
    axes: list[int] = list(range(x.dim()))
    for new in call[f"expand{place + 1}"]:
        axes.insert(new, NONE)
    return [follow for axis, follow in enumerate(axes) if axis not in call["sumdim"]]


# Linear algebra.


def _in_batch(*own: int) -> Rule:
    """Linear algebra on the last axes, of which each operand has so many: those before are a batch, lined up at the right."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
        batch = max(a.dim() - n for a, n in zip(call.args, own, strict=False) if isinstance(a, torch.Tensor))
        lead = batch - (x.dim() - own[place])
        return [axis - lead if lead <= axis < batch else NONE for axis in range(out.dim())]

    return rule


def _solved(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """`linalg.solve`, `linalg.lstsq`: the right-hand side may be a batch of vectors."""
    a, b = call.args[:2]
    is_vector = b.dim() == 1 or b.shape == a.shape[:-1]
    if place == 1 and not is_vector:
        return _columns(1)(call, x, place, out)
    return _in_batch(2, 1 if is_vector else 2)(call, x, place, out)


def _columns(right: int) -> Rule:
    """Triangular systems: a column of the solution reads the same column of the right-hand side, the argument of that place; with `left=False` a row."""
    plain = _in_batch(2, 2)

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
        found = list(plain(call, x, place, out) or [])
        if place == right and out.dim() >= 2:
            left = not call.has("left") or call["left"]
            axis = -1 if left else -2
            found[axis] = x.dim() + axis
        return found

    return rule


# Networks.


def _convolved(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """The batch follows the input; channels follow the weights."""
    if place == 0:
        return [0, *[NONE] * (out.dim() - 1)]
    return [0 if axis == 1 and not (call["transposed"] and place == 1) else NONE for axis in range(out.dim())]


def _normalized(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """`layer_norm`: what stands before the normalised axes stays apart."""
    mixed = len(call["normalized_shape"])
    if place:
        return elementwise(call, x, place, out)
    return [axis if axis < x.dim() - mixed else NONE for axis in range(out.dim())]


def _batch_normalized(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Channels stay apart, and with known moments everything does; the moments that come back have one axis, the channels."""
    if out.dim() == 1:
        return [1 if place == 0 else 0]
    if place:
        return [0 if axis == 1 else NONE for axis in range(out.dim())]
    training = call["training"] if call.has("training") else "with_update" in call.func._schema.name
    return [axis if axis == 1 or not training else NONE for axis in range(out.dim())]


def _shuffled(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    """Channels change places."""
    return [NONE if axis == 1 else axis for axis in range(out.dim())]


def _bagged(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """Sums of rows of a table; where the bags are is in the numbers."""
    return None if place else at(NONE, 1)(call, x, place, out)


def _padded(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
    pad = list(call["pad"])
    moved = {out.dim() - 1 - i // 2 for i, width in enumerate(pad) if width}
    return [NONE if axis in moved else axis for axis in range(out.dim())]


def _attended(mask: str) -> Rule:
    """Batch and heads stay apart, queries follow the query, and what is read out the values; a mask lines up with the weights."""

    def rule(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows:
        name = call.func._schema.arguments[place].name
        if name == mask:
            lead = 4 - x.dim()
            return [axis - lead if lead <= axis < 3 else NONE for axis in range(out.dim())]
        axes = {"query": (0, 1, 2, NONE), "key": (0, 1, NONE, NONE), "value": (0, 1, NONE, 3)}
        return axes.get(name, (NONE,) * 4)[: out.dim()]

    return rule


def _recurrent(call: Call, x: torch.Tensor, place: int, out: torch.Tensor) -> Follows | None:
    """A layer over time: the batch is the last axis but one of the input, the states and what comes back."""
    if out.dim() < 2:
        return None
    own = call.func._schema.arguments[place].name in ("input", "hx_", "cx_")
    return [x.dim() - 2 if own and axis == out.dim() - 2 else NONE for axis in range(out.dim())]


_ROWS = by_place(at(0), at(0))

LAYERS: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm"), _product((0, 1))),
    **dict.fromkeys(("addmm", "baddbmm", "_addmm_activation"), _product((1, 2), 0)),
    "linear": _linear,
    "mv": by_place(at(0)),
    "addmv": by_place(elementwise, at(0)),
    "addr": by_place(elementwise, at(0), at(NONE, 0)),
    "addbmm": by_place(elementwise, at(1), at(NONE, 2)),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), _pairwise),
    "_pdist_forward": nothing,
    "_trilinear": _trilinear,
    **dict.fromkeys(
        "linalg_cholesky_ex cholesky cholesky_inverse linalg_inv_ex "
        "inverse _linalg_det _linalg_slogdet linalg_eigh _linalg_eigh _linalg_svd linalg_qr linalg_lu linalg_lu_factor_ex "
        "linalg_eig _linalg_eigvals linalg_matrix_exp linalg_ldl_factor_ex geqrf".split(),
        _in_batch(2, 2),
    ),
    "linalg_solve_triangular": _columns(1),
    **dict.fromkeys(("cholesky_solve", "_cholesky_solve_helper", "triangular_solve"), _columns(0)),
    "linalg_pinv": _in_batch(2, 0, 0),
    **dict.fromkeys(("linalg_householder_product", "lu_unpack"), _in_batch(2, 1)),
    **dict.fromkeys(("linalg_lu_solve", "linalg_ldl_solve", "ormqr"), _in_batch(2, 1, 2)),
    **dict.fromkeys(("_linalg_solve_ex", "linalg_lstsq"), _solved),
    "convolution": _convolved,
    "embedding": lambda call, x, place, out: [*range(out.dim() - 1), NONE] if place else [*[NONE] * (out.dim() - 1), 1],
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), _bagged),
    "embedding_renorm": only(0, at(0)),
    **dict.fromkeys(
        "max_pool2d_with_indices avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d max_unpool2d upsample_nearest2d "
        "upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "reflection_pad2d replication_pad2d".split(),
        keeping_all_but(2),
    ),
    **dict.fromkeys(
        "upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d reflection_pad1d replication_pad1d".split(),
        keeping_all_but(1),
    ),
    **dict.fromkeys(
        "max_pool3d_with_indices avg_pool3d adaptive_max_pool3d _adaptive_avg_pool3d max_unpool3d upsample_nearest3d "
        "upsample_trilinear3d _upsample_nearest_exact3d reflection_pad3d replication_pad3d pixel_shuffle "
        "pixel_unshuffle".split(),
        keeping_all_but(3),
    ),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _shuffled),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), by_place(at(0, 1), at(0, NONE, 1, 2, 3))),
    "affine_grid_generator": at(0),
    "im2col": _if_of(4, at(0)),
    "col2im": _if_of(3, at(0)),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _normalized),
    "native_group_norm": only(0, at(0)),
    **dict.fromkeys(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
        "_batch_norm_no_update cudnn_batch_norm".split(),
        _batch_normalized,
    ),
    "constant_pad_nd": _padded,
    "nll_loss_forward": if_not_reduced(_ROWS),
    "nll_loss2d_forward": if_not_reduced(by_place(at(0, 2, 3), at(0, 1, 2))),
    "multi_margin_loss": if_not_reduced(_ROWS),
    "multilabel_margin_loss_forward": if_not_reduced(_if_of(2, at(0))),
    "_scaled_dot_product_flash_attention_for_cpu": _attended("attn_mask"),
    **dict.fromkeys(
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention".split(),
        _attended("attn_bias"),
    ),
    "_native_multi_head_attention": by_place(at(0), at(0), at(0)),
    "_transformer_encoder_layer_fwd": only(0, at(0)),
    "mkldnn_rnn_layer": _recurrent,
}
