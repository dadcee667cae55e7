"""Operations and functions of JAX that are known to be continuous, with a derivative that is their own: a closed world.

What is not listed here may jump in an operand, or have a derivative that is not its own, and counts as a cut. A slope along a relaxed
value needs `f(b) - f(a)` to be the integral of the derivative between `a` and `b`; corners are harmless, and so are poles, where the
cost has no value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

_ARITHMETIC = set(
    "abs acos acosh add add_any asin asinh atan atanh bessel_i0e bessel_i1e cbrt clamp complex conj cos cosh digamma div erf erf_inv "
    "erfc exp exp2 expm1 igamma igamma_grad_a igammac imag integer_pow lgamma log log1p logistic max min mul neg polygamma pow "
    "random_gamma random_gamma_grad real regularized_incomplete_beta rsqrt sin sinh sqrt square sub tan tanh zeta".split()
)
_BRANCHED = set("acos acosh asin asinh atan atanh cbrt log log1p pow rsqrt sqrt".split())
"""Those that jump across a line in the complex plane."""
_REDUCTIONS = set(
    "reduce_sum reduce_max reduce_min reduce_prod cumsum cumprod cummax cummin cumlogsumexp reduce_window_sum reduce_window_max "
    "reduce_window_min dot_general ragged_dot ragged_dot_general conv_general_dilated cholesky triangular_solve tridiagonal_solve "
    "custom_linear_solve fft psum psum_invariant all_gather all_gather_invariant reduce_scatter psum_scatter all_to_all ppermute "
    "ragged_all_to_all pbroadcast pvary".split()
)
_SHAPES = set(
    "broadcast_in_dim reshape transpose slice concatenate pad squeeze expand_dims rev stack unstack split tile copy copy_p name "
    "dynamic_slice dynamic_update_slice gather scatter scatter-add scatter_add scatter-sub scatter_sub scatter-mul scatter_mul "
    "scatter-min scatter_min scatter-max scatter_max select_n optimization_barrier device_put sharding_constraint "
    "mesh_cast reshard get swap addupdate new_ref ref freeze empty_ref".split()
)
"""Where their operands go is told by whole numbers and truth values, which are cut where they are made of a value with a fraction."""
_SHAPE_ALONE = {"zeros_like", "ones_like", "empty", "empty2", "eq_to"}
BODIES = set("jit pjit closed_call core_call call checkpoint remat remat2 scan while cond shard_map run_state".split())
"""Operations that are what their bodies are, which are walked."""
_VALUES = {"sort": 1, "top_k": 1, "approx_top_k": 1, "eigh": None, "svd": None}
"""Operations whose first outputs, so many, are continuous, and the others are not: places, signs and orders jump."""

SMOOTH = set(
    # Their derivatives are continuous as well.
    "logaddexp logaddexp2 logsumexp _logsumexp logmeanexp log_softmax softmax _softmax _softmax_deprecated softplus silu mish log_sigmoid "
    "gelu sigmoid squareplus soft_sign standardize expit logit erf erfc erfinv erf_inv erfcx log_ndtr ndtr ndtri gammaln betaln betainc "
    "gammainc gammaincc digamma polygamma zeta multigammaln i0 i0e i1 i1e sinc _sinc_maclaurin expi exp1 spence "
    "hyp1f1 dawsn det _det _det_2x2 _det_3x3 inv solve _solve _cho_solve cho_solve lu_solve _lu_solve cholesky expm "
    "log1mexp xlogy xlog1py entr rel_entr kl_div power float_power square mean std var cov "
    # Draws of a law with these parameters, by its inverse or by a derivative that is known.
    "normal truncated_normal gamma loggamma _gamma dirichlet beta t chisquare "
    # A branch that is computed where another one is taken: its derivative is not used.
    "_cond_batching_rule".split()
)
CONTINUOUS = SMOOTH | set(
    "relu relu6 leaky_relu elu selu celu hard_tanh hard_sigmoid hard_silu hard_swish sparse_plus sparse_sigmoid clip clip_by_value max min "
    "maximum minimum fmax fmin amax amin nanmax nanmin nansum nanmean ptp hypot absolute abs fabs nan_to_num median nanmedian "
    "glu dot_product_attention uniform cauchy laplace gumbel logistic exponential weibull_min pareto slogdet _slogdet_lu _slogdet_small eigvalsh trapezoid".split()
)
"""JAX's functions that are continuous although they compare, round or stop gradients inside."""
_QUANTILES = {"quantile", "nanquantile", "percentile", "nanpercentile"}
"""They are continuous in the numbers, and may jump in the order that is asked for."""
_SIGNS = {"slogdet": (0,), "_slogdet_lu": (0,), "_slogdet_small": (0,)}
"""Outputs of these functions that jump all the same."""


def jumping_outputs(equation: Any, kind: str) -> list[bool]:
    """Return for each output of an operation whether it may jump, or have no derivative, where an operand goes from one number to the next."""
    count = len(equation.outvars)
    if kind in _SHAPE_ALONE or kind in BODIES:
        return [False] * count
    if kind in _VALUES:
        return _of_several(equation, kind)
    if kind == "convert_element_type":
        return [_is_coarse(equation.outvars[0].aval.dtype)]
    if kind == "reduce_precision":
        return [equation.params["mantissa_bits"] < 7]
    if kind in _BRANCHED and any(_is_complex(atom) for atom in equation.invars):
        return [True] * count
    return [kind not in _ARITHMETIC and kind not in _REDUCTIONS and kind not in _SHAPES] * count


def is_continuous_call(name: str | None, arguments: Sequence[str], carries: Sequence[bool], derives: bool) -> bool:
    """Return whether JAX's function of this name is continuous, with these arguments, in those that carry a relaxed value.

    Within a derivative that the program takes (`derives`), the function's own derivatives are to be continuous.
    """
    if derives:
        return name in SMOOTH
    if name in _QUANTILES:
        return arguments[0] == "a" and not any(carries[1:])
    if name == "_interp":  # With another value than the first outside, it jumps at the ends.
        return {"x", "xp", "fp"}.issuperset(arguments)
    return name in CONTINUOUS


def jumping_outputs_of_function(name: str, count: int) -> list[bool]:
    """Return for each output of a function among `CONTINUOUS` whether it jumps all the same."""
    return [place in _SIGNS.get(name, ()) for place in range(count)]


def _of_several(equation: Any, kind: str) -> list[bool]:
    """A payload goes where its key goes, and changes places with a jump; the vectors of a decomposition may change their sign."""
    count = len(equation.outvars)
    if kind == "sort":
        return [count > 1 and (place > 0 or equation.params["num_keys"] > 1) for place in range(count)]
    if kind in ("eigh", "svd"):
        return [len(var.aval.shape) == len(equation.invars[0].aval.shape) for var in equation.outvars]
    return [place > 0 for place in range(count)]


def _is_coarse(dtype: Any) -> bool:
    """Return whether numbers are whole, or so few that rounding to them is a step: 7 bits are those of bfloat16."""
    return not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).nmant < 7


def _is_complex(atom: Any) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", jnp.float32), jnp.complexfloating)
