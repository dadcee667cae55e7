"""Distributions with log odds, so that their densities have the right derivative everywhere, and a cheap one.

NumPyro 0.22 differentiates log p(1) of a Bernoulli or Binomial at log odds of zero to 1.0, where 0.5 is right. And it chooses between the
finite and the infinite case, and whether the value is possible, after value and log odds have met: in the derivative each of these
choices is an array of the value's size, one for each particle, where sums over particles would do.
"""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as host
from numpyro.distributions import BinomialLogits

from pplgrad.numpyro._array_ops import softplus


class BernoulliLogits(host.BernoulliLogits):
    """NumPyro's, with a density whose derivative is a product of the value and one of the log odds alone."""

    def log_prob(self, value: Any) -> jax.Array:
        x, value = self.logits, jnp.asarray(value)
        if self._validate_args and not isinstance(value, jax.core.Tracer):
            super().log_prob(value)  # Which warns of values that cannot be.
        sure = jnp.isinf(x)
        safe = jnp.where(sure, 0.0, x)
        log_prob = value * safe - jnp.where(sure, 0.0, softplus(safe))
        # Infinite log odds are sure of one value; the other, or one that is neither if that is checked, is impossible.
        likelier = (x > 0).astype(value.dtype)
        open_to = (value == 1 - likelier) & ~sure if self._validate_args else ~sure
        return log_prob + jnp.where((value == likelier) | open_to, 0.0, -jnp.inf)


def with_stable_logits(fn: Any) -> Any:
    """Return a distribution with NumPyro's Bernoulli and Binomial of log odds, wherever they are inside, corrected.

    Values are the same to rounding. What is derived from them by a user's subclass is left as it is but for log odds of exactly zero.
    """
    try:
        inside = any(map(_has_log_odds, jax.tree.leaves(fn, is_leaf=_has_log_odds)))
    except NotImplementedError:  # A transform of the user's own declares nothing.
        return fn
    return jax.tree.map(_with_own_derivative, fn, is_leaf=_has_log_odds) if inside else fn


def _has_log_odds(part: Any) -> bool:
    return isinstance(part, (host.BernoulliLogits, BinomialLogits))


def _with_own_derivative(part: Any) -> Any:
    if not _has_log_odds(part) or not isinstance(part.logits, jax.Array):
        return part
    if not jnp.issubdtype(part.logits.dtype, jnp.floating):
        return part  # Whole numbers have no gradient.
    part = copy.copy(part)
    if type(part) is host.BernoulliLogits:
        part.__class__ = BernoulliLogits
    elif not isinstance(part, BernoulliLogits):
        part.logits = _off_zero(part.logits)
    return part


def _off_zero(x: jax.Array) -> jax.Array:
    """Return log odds with those that are exactly zero moved to the smallest positive number."""
    tiny = jnp.finfo(x.dtype).tiny
    return x + jax.lax.stop_gradient(jnp.where(x == 0, tiny, 0.0)).astype(x.dtype)
