"""The few array operations that are not in the array API standard, as a protocol that each plug-in implements."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""An array of the host library: `torch.Tensor` or `jax.Array`."""


class Ops(Protocol):
    """What the engine asks of an array library.

    `xp` is a namespace that follows the Python array API standard (`jax.numpy`, `array_api_compat.torch`),
    so that estimators and baselines are written once.
    """

    xp: Any

    def stop_gradient(self, x: Array) -> Array:
        """Return `x` as a constant to differentiation."""

    def stack(self, arrays: Sequence[Array], axis: int) -> Array:
        """Return arrays of one shape, (particles, ...), as one array with a new axis, 0 or 1."""

    def contract(self, weights: Array, values: Array) -> Array:
        """Return `sum_c weights[s, c] * values[c, ...]`, of shape (s, ...), in the values' full precision."""

    def constant(self, values: Any, like: Array) -> Array:
        """Return `values` (a NumPy array or a number) as an array of the dtype and device of `like`."""

    def take(self, x: Array, index: Array) -> Array:
        """Return `x[index]` for a one-dimensional `x` and an integer array `index` of any shape."""

    def rows(self, x: Array, index: np.ndarray) -> Array:
        """Return `x[index]` along the first axis, for places (0 or more) that are known when a program is compiled."""

    def index_add(self, x: Array, index: Array, values: Array) -> Array:
        """Return a copy of the one-dimensional `x` with `values` added at `index`; repeated indices add up."""

    def value_and_grad(self, function: Callable[[list[Array]], list[Array]], points: list[Array]) -> tuple[list, list]:
        """Return what `function` makes of arrays, and the derivative of the sum of all of it with respect to each.

        Both go on carrying gradient to what the points were computed from, and to nothing else.
        """

    def transposed(self, function: Callable[[list[Array]], list[Array]], inputs: list[Array], outputs: list) -> list:
        """Return the transpose of a linear function of arrays like `inputs`, at `outputs`, whose gradient it carries."""

    def first_order_only(self, x: Array, message: str) -> Array:
        """Return `x`, of which a second derivative raises `EstimatorError` with the message."""

    def with_slope(self, x: Array, value: Array, slope: Callable[[Array, Array, Array], Array], kept: Array) -> Array:
        """Return `value`, of the shape of `x`, whose gradient g goes on to `x` as `slope(g, kept, value)`, and to nothing else."""

    def only(self, loss: Array, learned: list[Array]) -> Array:
        """Return `loss` with its gradient to the arrays in `learned`, and to nothing else."""

    def normal_cdf(self, x: Array) -> Array:
        """Return the standard normal distribution function, exact where it is small."""

    def arange(self, n: int, like: Array) -> Array:
        """Return the integers 0 to n - 1 on the device of `like`."""

    def softplus(self, x: Array) -> Array:
        """Return log(1 + exp x)."""

    def sigmoid(self, x: Array) -> Array:
        """Return 1 / (1 + exp −x)."""

    def bernoulli_log_prob(self, weights: Array, logits: Array) -> Array:
        """Return w log σ(x) + (1 − w) log σ(−x) at finite logits, by the host's own formula."""

    def known_finite(self, x: Array) -> bool:
        """Return whether all numbers are known to be finite; False where that cannot be known without waiting for a device, or at all."""


def bounded(xp: Any, log_probs: Array) -> Array:
    """Return log probabilities in which that of an impossible value is a constant: finite, and exp of it 0.

    A product of −inf and a weight of exactly 0 would be NaN, and so would the derivative of a difference of two of them.
    """
    return xp.where(is_possible(xp, log_probs), log_probs, xp.full_like(log_probs, _least(xp, log_probs)))


def is_possible(xp: Any, log_probs: Array) -> Array:
    """Return whether values with these log probabilities, bounded or not, can be drawn."""
    return log_probs > _least(xp, log_probs) / 2


def only_possible(xp: Any, log_probs: Array, x: Array) -> Array:
    """Return `x` where values with these log probabilities can be drawn, and elsewhere what `bounded` puts there."""
    return xp.where(is_possible(xp, log_probs), x, xp.full_like(log_probs, _least(xp, log_probs)))


def _least(xp: Any, like: Array) -> float:
    # A thousand of them may be added up without overflow.
    return float(xp.finfo(like.dtype).min) / 1024


# A reduction over so few categories costs XLA many times what as many operations on all elements do.
FEW_CATEGORIES = 4
# Along an axis that is not the last one XLA sums ten times as slowly on a CPU as it adds so few arrays.
FEW_DRAWS = 16


def sum_over_categories(xp: Any, x: Array) -> Array:
    """Return the sum over the categories, the last axis, which stays, of length 1."""
    few = few_categories(xp, x)
    return xp.sum(x, axis=-1, keepdims=True) if few is None else reduce(operator.add, few)[..., None]


def max_over_categories(xp: Any, x: Array) -> Array:
    """Return the largest over the categories, the last axis, which stays, of length 1."""
    few = few_categories(xp, x)
    return xp.max(x, axis=-1, keepdims=True) if few is None else reduce(xp.maximum, few)[..., None]


def sum_over_draws(xp: Any, x: Array) -> Array:
    """Return the sum over the draws, axis 1, which goes."""
    return reduce(operator.add, xp.unstack(x, axis=1)) if x.shape[1] <= FEW_DRAWS else xp.sum(x, axis=1)


def few_categories(xp: Any, x: Array) -> list[Array] | None:
    """Return the categories one by one, without the last axis; None if there are many.

    The axis does not stay with length 1, since XLA computes such arrays several times as slowly on a CPU, and sums them thirty times as slowly.
    """
    # The derivative of `unstack` puts those of the parts together; that of an index would fill up each of them with zeros, and add them.
    return list(xp.unstack(x, axis=-1)) if x.shape[-1] <= FEW_CATEGORIES else None


def linear_density(xp: Any, weights: Array, log_probs: Array, is_pair: bool) -> Array:
    """Return Σ_c w_c log q(c) over the categories, the last axis; `is_pair`: the weights are those of the second of two.

    An impossible category has no part in it unless it has some of the weight: with all of it, the density is −inf.
    """

    def parts(w: Array, x: Array) -> tuple[Array, Array]:
        """Return what categories add to the density, and their weight if they are impossible."""
        possible = x > -xp.inf
        return w * xp.where(possible, x, xp.zeros_like(x)), xp.where(possible, xp.zeros_like(w), w)

    few = few_categories(xp, log_probs)
    if few is None:
        total, lost = (xp.sum(x, axis=-1) for x in parts(weights, log_probs))
    else:
        each = [1 - weights, weights] if is_pair else few_categories(xp, weights) or []
        found = [parts(w, part) for w, part in zip(each, few, strict=True)]
        total, lost = (reduce(operator.add, x) for x in zip(*found, strict=True))
    return total + xp.log(xp.clip(1 - lost, min=0))


def pair_density(ops: Ops, weights: Array, odds: Array) -> Array:
    """Return the same of two categories, from the log odds of the second, infinite where one is impossible, and the weights of the second."""
    if ops.known_finite(odds):
        return ops.bernoulli_log_prob(weights, odds)
    xp, finite = ops.xp, ops.xp.isfinite(odds)
    # Of an impossible category the weight alone counts. What is not chosen here has a finite derivative.
    left = xp.where(odds > 0, weights, 1 - weights)
    left = xp.where(finite, xp.ones_like(left), xp.clip(left, min=0))
    plain = ops.bernoulli_log_prob(weights, xp.where(finite, odds, xp.zeros_like(odds)))
    return xp.where(finite, plain, xp.log(left))


def chosen(xp: Any, few: Sequence[Array], index: Array) -> Array:
    """Return, element by element, the array of that number, all of which broadcast with `index`.

    The derivative of a choice is a choice; that of an element taken by its number is added up one by one.
    """
    found = xp.broadcast_to(few[0], index.shape)
    for i, other in enumerate(few[1:], 1):
        found = xp.where(index == i, other, found)
    return found
