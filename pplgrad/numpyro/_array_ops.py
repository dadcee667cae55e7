"""The engine's array operations on JAX arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pplgrad.core.noise import Noise
from pplgrad.errors import EstimatorError


class Views(Protocol):
    """What knows which arrays are rows of one array, so that stacking them again costs nothing."""

    def constant(self, x: jax.Array) -> jax.Array:
        """Return an array as a constant to differentiation."""

    def stack(self, arrays: Sequence[jax.Array], axis: int) -> jax.Array:
        """Return arrays with a new axis, 0 or 1."""


def ours(function: Callable) -> Callable:
    """Return a function of this library's own, whose arrays of several ranks and types meet as the array API says.

    What JAX is told to refuse (`jax_numpy_rank_promotion`, `jax_numpy_dtype_promotion`) is about the user's code, which has
    run as it is told when this begins.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


@jax.custom_jvp
def softplus(x: jax.Array) -> jax.Array:
    """Return log(1 + exp(x)); function and derivative share one exponential."""
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals: tuple, tangents: tuple) -> tuple:
    return softplus(*primals), _sigmoid(*primals) * tangents[0]


@jax.custom_jvp
def _sigmoid(x: jax.Array) -> jax.Array:
    """Return 1 / (1 + exp(-x)), with a derivative of its own value."""
    e = jnp.exp(-jnp.abs(x))
    return jnp.where(x > 0, 1.0, e) / (1.0 + e)


@_sigmoid.defjvp
def _sigmoid_jvp(primals: tuple, tangents: tuple) -> tuple:
    p = _sigmoid(*primals)
    return p, p * (1.0 - p) * tangents[0]


class JaxOps:
    """`pplgrad.core.array_ops.Ops` for JAX."""

    xp: Any = jnp

    def __init__(self, views: Views | None = None) -> None:
        self._views = views

    def stop_gradient(self, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x) if self._views is None else self._views.constant(x)

    def stack(self, arrays: Sequence[jax.Array], axis: int) -> jax.Array:
        return jnp.stack(arrays, axis=axis) if self._views is None else self._views.stack(arrays, axis)

    def contract(self, weights: jax.Array, values: jax.Array) -> jax.Array:
        if values.size == values.shape[0]:
            # XLA fuses the program into a product with a vector and computes it again for every row; with two
            # columns the product is an operation of its own.
            flat = jnp.stack([values.reshape(-1)] * 2, axis=1)
            product = jnp.matmul(weights, flat, precision=jax.lax.Precision.HIGHEST)[:, :1]
            return product.reshape(weights.shape[0], *values.shape[1:])
        # Not as a matrix: joining a dimension that is split over devices with others would gather it.
        return jnp.tensordot(weights, values, axes=1, precision=jax.lax.Precision.HIGHEST)

    def constant(self, values: Any, like: jax.Array) -> jax.Array:
        return jnp.asarray(values, dtype=like.dtype)

    def take(self, x: jax.Array, index: jax.Array) -> jax.Array:
        return x[index]

    def rows(self, x: jax.Array, index: np.ndarray) -> jax.Array:
        return x.at[index].get(mode="promise_in_bounds")

    def index_add(self, x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
        return x.at[index].add(values)

    def value_and_grad(self, function: Callable[[list], list], points: list) -> tuple[list, list]:
        outputs, back = jax.vjp(function, points)
        (slopes,) = back([jnp.ones_like(x) for x in outputs])
        return outputs, slopes

    def transposed(self, function: Callable[[list], list], inputs: list, outputs: list) -> list:
        return jax.linear_transpose(function, list(inputs))(list(outputs))[0]

    def first_order_only(self, x: jax.Array, message: str) -> jax.Array:
        # The rule of the first derivative multiplies by one(x), whose own derivative is asked for by a second one alone.
        @jax.custom_jvp
        def one(y: jax.Array) -> jax.Array:
            return jnp.ones_like(y)

        @one.defjvp
        def _(primals: tuple, tangents: tuple) -> tuple:
            raise EstimatorError(message)

        @jax.custom_jvp
        def guarded(y: jax.Array) -> jax.Array:
            return y

        @guarded.defjvp
        def _(primals: tuple, tangents: tuple) -> tuple:
            return primals[0], tangents[0] * one(primals[0])

        return guarded(x)

    def with_slope(self, x: jax.Array, value: jax.Array, slope: Callable, kept: jax.Array) -> jax.Array:
        @jax.custom_vjp
        def moved(x: jax.Array, value: jax.Array, kept: jax.Array) -> jax.Array:
            return value

        def back(arrays: tuple, gradient: jax.Array) -> tuple:
            value, kept = arrays
            return slope(gradient, kept, value), jnp.zeros_like(value), jnp.zeros_like(kept)

        moved.defvjp(lambda x, value, kept: (value, (value, kept)), back)
        return moved(x, value, kept)

    def only(self, loss: jax.Array, learned: list) -> jax.Array:
        # The program's own parameters are constants in branches already.
        return loss

    def normal_cdf(self, x: jax.Array) -> jax.Array:
        return jax.scipy.special.ndtr(x)

    def arange(self, n: int, like: jax.Array) -> jax.Array:
        return jnp.arange(n)

    def softplus(self, x: jax.Array) -> jax.Array:
        return softplus(x)

    def sigmoid(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(x)  # As the host does, so that the compiler finds what it has computed already.

    def bernoulli_log_prob(self, weights: jax.Array, logits: jax.Array) -> jax.Array:
        return weights * logits - softplus(logits)

    def known_finite(self, x: jax.Array) -> bool:
        return False


OPS = JaxOps()


class JaxNoise(Noise):
    """Noise from a key, a part of it for each call."""

    def __init__(self, key: jax.Array) -> None:
        super().__init__(OPS)
        self._key = key

    def uniform(self, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
        self._key, mine = jax.random.split(self._key)
        return jax.random.uniform(mine, shape, like.dtype, minval=jnp.finfo(like.dtype).tiny)


@jax.custom_jvp
def attach(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """Return `value` with the derivative of `surrogate`; no infinity is ever subtracted from itself.

    Where that derivative is asked for and the surrogate is not finite, the value is NaN, which optimizers look for.
    """
    return value


@attach.defjvp
def _attach_jvp(primals: tuple, tangents: tuple) -> tuple:
    value, surrogate = primals
    # Where single and double precision meet, the surrogate may have more of it than the value.
    return jnp.where(jnp.isfinite(surrogate), value, jnp.nan), tangents[1].astype(value.dtype)


def concrete(x: Any) -> float | None:
    """Return a scalar's value where it is known, and None while a function is being traced."""
    try:
        return float(jax.lax.stop_gradient(x))
    except jax.errors.ConcretizationTypeError:
        return None
