"""Operations of torch that are known to be continuous, with a derivative that is their own: a closed world.

What is not listed here may jump in an operand, or have a derivative that is not its own, and counts as a cut. Whole numbers and truth
values have a rule of their own: they are cut wherever they are made.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from pplgrad.pyro._tracing.operations import is_view

_POINTWISE = set(
    "abs acos acosh add addcdiv addcmul asin asinh atan atanh celu clamp clamp_max clamp_min clip cos cosh deg2rad digamma div elu erf erfc "
    "erfinv exp exp2 expm1 float_power fmax fmin gelu hardsigmoid hardswish hardtanh hypot i0 igamma igammac ldexp leaky_relu lerp lgamma "
    "log log10 log1p log2 logaddexp logaddexp2 logit maximum minimum mish mul multiply mvlgamma nan_to_num neg polygamma positive pow "
    "rad2deg reciprocal relu relu6 rrelu rsqrt rsub selu sigmoid silu sin sinc sinh softplus softshrink special_airy_ai special_bessel_j0 "
    "special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr special_erfcx special_i0e special_i1 special_i1e "
    "special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1 "
    "special_ndtri special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py "
    "special_zeta sqrt square sub tan tanh true_divide xlogy log_sigmoid_forward _prelu_kernel _add_relu complex polar conj_physical "
    "special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_hermite_polynomial_h special_hermite_polynomial_he "
    "special_laguerre_polynomial_l special_legendre_polynomial_p".split()
)
_REDUCTIONS = set(
    "sum mean amax amin max min prod logsumexp var std nansum median nanmedian kthvalue linalg_vector_norm norm aminmax _aminmax "
    "var_mean std_mean dot vdot trace dist linalg__powsum cumsum cumprod logcumsumexp _logcumsumexp cummax cummin _softmax _log_softmax "
    "_safe_softmax sort topk glu linalg_cross _fft_c2c _fft_r2c _fft_c2r renorm _weight_norm_interface binary_cross_entropy_with_logits "
    "binary_cross_entropy mse_loss smooth_l1_loss huber_loss soft_margin_loss nll_loss_forward nll_loss2d_forward "
    "multi_margin_loss multilabel_margin_loss_forward".split()
)
"""The values that these return; the places beside them are whole numbers."""
_PRODUCTS = set(
    "mm bmm addmm baddbmm _addmm_activation linear mv addmv addr addbmm _cdist_forward _euclidean_dist _pdist_forward _trilinear "
    "linalg_cholesky_ex cholesky cholesky_inverse linalg_inv_ex inverse linalg_matrix_exp linalg_solve_triangular "
    "cholesky_solve _cholesky_solve_helper triangular_solve _linalg_solve_ex linalg_pinv linalg_lstsq convolution embedding "
    "_embedding_bag _embedding_bag_forward_only max_pool2d_with_indices avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "reflection_pad2d replication_pad2d upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d reflection_pad1d "
    "replication_pad1d max_pool3d_with_indices avg_pool3d adaptive_max_pool3d _adaptive_avg_pool3d upsample_nearest3d "
    "upsample_trilinear3d _upsample_nearest_exact3d reflection_pad3d replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle affine_grid_generator im2col col2im native_layer_norm _fused_rms_norm native_group_norm native_batch_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update cudnn_batch_norm "
    "constant_pad_nd _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _native_multi_head_attention "
    "_transformer_encoder_layer_fwd mkldnn_rnn_layer mkldnn_linear _mkldnn_linear _thnn_fused_lstm_cell _thnn_fused_gru_cell".split()
)
_COPIES = set(
    "clone _to_copy copy alias lift_fresh lift lift_fresh_copy contiguous _conj _neg_view resolve_conj resolve_neg alias_copy expand_copy "
    "_conj_copy _neg_view_copy fill zero zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_empty_strided "
    "new_full rand_like randn_like tril triu masked_fill where native_dropout slice_copy narrow_copy split_copy split_with_sizes_copy "
    "unsafe_split unsafe_split_with_sizes flip roll rot90 cat stack unsqueeze_copy select_copy unbind_copy permute_copy transpose_copy "
    "t_copy diag_embed diagonal_copy view_copy _reshape_copy _unsafe_view _reshape_alias repeat repeat_interleave index_select gather "
    "scatter scatter_add scatter_reduce index _unsafe_index index_put _unsafe_index_put _index_put_impl index_add index_copy "
    "index_reduce slice_scatter select_scatter diagonal_scatter as_strided_scatter index_fill masked_scatter masked_select put take "
    "unfold_copy block_diag set resize resize_as _pin_memory _to_dense squeeze unsqueeze t transpose swapaxes swapdims".split()
)
"""Where their operands go is told by whole numbers and truth values."""
_DRAWS = set("_standard_gamma _sample_dirichlet _standard_gamma_grad _dirichlet_grad".split())
"""Draws of a law with these parameters whose derivative is known."""
_SLOPES = set(
    "tanh_backward sigmoid_backward logit_backward softplus_backward silu_backward gelu_backward mish_backward log_sigmoid_backward "
    "_softmax_backward_data _log_softmax_backward_data native_layer_norm_backward native_group_norm_backward native_batch_norm_backward "
    "convolution_backward embedding_dense_backward select_backward slice_backward diagonal_backward expand_backward mse_loss_backward "
    "linalg_cholesky_backward".split()
)
"""The slopes of smooth operations, where a program computes with a derivative; those of others jump."""
_CONTINUOUS = _POINTWISE | _REDUCTIONS | _PRODUCTS | _COPIES | _DRAWS | _SLOPES
_SIGNED = {
    "_linalg_slogdet": (0, 2),
    "_linalg_det": (1,),
    "_linalg_eigh": (1,),
    "linalg_eigh": (1,),
    "_linalg_svd": (0, 2),
}
"""Outputs that jump beside continuous ones: the sign of a determinant, and vectors, which may change theirs."""
_ON_LINES = set("acos acosh asin asinh atan atanh log log10 log1p log2 pow float_power rsqrt sqrt".split())
"""Those that jump across a line in the complex plane."""


def jumping(func: Any, made: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return those of an operation's results that may jump in an operand, or have a derivative that is not their own."""
    plain, continuous = _facts(func)
    if not continuous:
        return made
    if plain in _ON_LINES and any(x.is_complex() for x in made):
        return made
    signed = _SIGNED.get(plain, ())
    return [x for place, x in enumerate(made) if place in signed or not _is_fine(x)]


@cache
def _facts(func: Any) -> tuple[str, bool]:
    """Return an operation's name and whether it is known to be continuous; one of no known library is not."""
    space, _, name = func._schema.name.partition("::")
    plain = name if name.endswith("__") else name.removesuffix("_")
    overload = func._schema.overload_name
    if space != "aten" or (plain == "div" and "mode" in overload) or (plain == "view" and overload == "dtype"):
        return plain, False
    return plain, is_view(func) or plain in _CONTINUOUS or plain in _SIGNED


def _is_fine(tensor: torch.Tensor) -> bool:
    """Return whether numbers are fine enough that rounding to them is no step: those of bfloat16 still are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return tensor.is_complex() or torch.finfo(tensor.dtype).eps <= 2**-7
