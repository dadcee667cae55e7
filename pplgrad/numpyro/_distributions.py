"""What pplgrad needs to know of NumPyro's distributions beyond their `log_prob`."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions
from jax.scipy.special import logsumexp
from numpyro.distributions import (
    BernoulliLogits,
    BernoulliProbs,
    BinomialLogits,
    BinomialProbs,
    CategoricalLogits,
    CategoricalProbs,
    Distribution,
    ExpandedDistribution,
    GammaPoisson,
    GeometricLogits,
    GeometricProbs,
    Independent,
    MultinomialLogits,
    MultinomialProbs,
    NegativeBinomial2,
    NegativeBinomialLogits,
    NegativeBinomialProbs,
)

from pplgrad.core.array_ops import FEW_CATEGORIES, chosen
from pplgrad.core.structures import LAWS
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._compat_jax import TRACING_ERRORS, reused
from pplgrad.numpyro._logits import BernoulliLogits as StableBernoulli
from pplgrad.numpyro._structures import PermutationMatrix, PlackettLuce, Structured, Subset, log_probs_of_all

_UNLISTED: tuple[type[Exception], ...] = (NotImplementedError, *TRACING_ERRORS)


class FiniteDraw(NamedTuple):
    """A draw whose elements have finitely many values.

    `log_probs` has shape (*batch, *elements, categories), −inf where a category is impossible, and `index` (*batch, *elements);
    `support` has the values of one element, (categories), or their numbers where they are one-hot vectors; vectors that are one joint
    value are rows, (categories, n). `odds` are the log odds of 1 of a Bernoulli, and `uniform` the numbers that it was drawn by, of the
    shape of `index`.
    """

    log_probs: jax.Array
    index: jax.Array
    support: jax.Array
    odds: jax.Array | None = None
    uniform: jax.Array | None = None


def finite_parts(fn: Any) -> tuple[Any, jax.Array] | None:
    """Return the distribution of one element and its values, (categories, *event), or None if they are not finite.

    The values of a one-hot vector are as many numbers as categories squared: see `counted_parts`.
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if not getattr(fn, "has_enumerate_support", False):
        return None
    try:
        # NumPyro's expanded distributions drop the event dimensions of what they enumerate.
        support = innermost(fn).enumerate_support(expand=False)
    except _UNLISTED:
        return None  # NumPyro lists them only where their number is known while a program is traced.
    return fn, support.reshape(support.shape[0], *fn.event_shape)


def counted_parts(fn: Any) -> tuple[Any, jax.Array] | None:
    """Return the distribution of one element and its values, as numbers also where they are one-hot vectors, or None.

    Of vectors that are one joint value, such as subsets, the values are rows.
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if is_one_hot(fn):
        return fn, jnp.arange(fn.event_shape[0])
    parts = finite_parts(fn)
    return None if parts is None or (parts[0].event_shape and not is_structured(fn)) else parts


def is_reparameterized(fn: Any) -> bool:
    """Return whether draws are a differentiable function of the parameters, as the distribution declares.

    NumPyro takes a distribution of the user's that declares no parameters for one, because all of none are reparameterized; and it asks
    nobody whether a draw of whole numbers can be.
    """
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    declares = bool(base.arg_constraints) or type(base).has_rsample is not Distribution.has_rsample
    is_discrete = bool(getattr(base.support, "is_discrete", False))
    return bool(fn.has_rsample) and declares and not is_discrete


def is_one_hot(fn: Any) -> bool:
    """Return whether the values of one element are one-hot vectors."""
    return family(fn) == "OneHotCategorical"


def is_structured(fn: Any) -> bool:
    """Return whether the values of one element are vectors that are one joint value, and not independent numbers."""
    return isinstance(innermost(fn), Structured)


def is_subset(fn: Any) -> bool:
    """Return whether a distribution is over subsets of k items."""
    return isinstance(innermost(unmasked(fn)), Subset)


def values_of(support: jax.Array, index: jax.Array, like: jax.Array, is_vector: bool) -> jax.Array:
    """Return the values with these numbers; `is_vector` says whether the value of one element is a vector."""
    if is_vector and support.ndim == 1:
        return jax.nn.one_hot(index, support.shape[-1], dtype=like.dtype)
    if support.ndim > 1 or len(support) > FEW_CATEGORIES:
        return support[index]
    return chosen(jnp, list(support), index)  # Several times faster than numbers taken from a table.


def _number_of(base: Any, support: jax.Array, value: jax.Array) -> jax.Array:
    """Return the numbers of the values of a distribution's elements."""
    if is_one_hot(base):
        return jnp.argmax(value, -1)
    if is_structured(base):
        rows = support.reshape(len(support), *(1,) * (value.ndim - 1), -1)
        return jnp.argmax((rows == value).all(-1), 0)
    if type(innermost(base)).enumerate_support in _FROM_ZERO:
        return value.astype(int)
    if len(support) == 2:
        return (value == support[1]).astype(int)
    return jnp.argmax(support.reshape(-1, *(1,) * value.ndim) == value, 0)


_FROM_ZERO = {law.enumerate_support for law in (BernoulliLogits, BernoulliProbs, CategoricalLogits, CategoricalProbs)}
"""What lists the values 0, 1, 2 and so on."""


def throws(fn: Any, value: jax.Array) -> jax.Array | None:
    """Return log p of the categories of a Multinomial, of the value's shape, or None for other laws."""
    base = innermost(fn)
    if not isinstance(base, (MultinomialLogits, MultinomialProbs)):
        return None
    if isinstance(base, MultinomialLogits):
        found = jax.nn.log_softmax(base.logits, -1)
    else:
        possible = base.probs > 0
        found = jnp.where(possible, jnp.log(jnp.where(possible, base.probs, 1.0)), -jnp.inf)
    return jnp.broadcast_to(found, value.shape)


def categories(fn: Any) -> int | None:
    """Return the number of values of one element, or None if there are not finitely many."""
    parts = counted_parts(unmasked(fn))
    return None if parts is None else len(parts[1])


def every_log_prob(base: Any, support: jax.Array) -> jax.Array:
    """Return the log probabilities of an element's values, (*batch, categories), −inf where the sampler never draws one."""
    while isinstance(base, ExpandedDistribution):
        inner = every_log_prob(base.base_dist, support)
        return jnp.broadcast_to(inner, (*base.batch_shape, len(support)))
    if is_one_hot(base):
        return jax.nn.log_softmax(base.logits, -1)
    if isinstance(base, Structured):
        return log_probs_of_all(base)
    law = type(base).log_prob
    if len(support) > FEW_CATEGORIES:
        # Normalised once, where `log_prob` would do so for every value.
        if law is CategoricalLogits.log_prob:
            return base.logits - logsumexp(base.logits, axis=-1, keepdims=True)
        if law is CategoricalProbs.log_prob:
            return base.logits
        listed = support.reshape(-1, *(1,) * len(base.batch_shape))
        found = jnp.moveaxis(jnp.broadcast_to(base.log_prob(listed), (len(support), *base.batch_shape)), 0, -1)
    else:
        # One by one: the derivative of what all have in common would be a reduction over few.
        found = jnp.stack([jnp.broadcast_to(base.log_prob(value), base.batch_shape) for value in support], -1)
    return _never_drawn(base, support, found)


def _never_drawn(base: Any, support: jax.Array, log_probs: jax.Array) -> jax.Array:
    """Return log probabilities with −inf where NumPyro gives an impossible value a very small probability."""
    if not isinstance(base, (BernoulliProbs, BinomialProbs)):
        return log_probs
    count = base.total_count if isinstance(base, BinomialProbs) else 1
    probs, count = jnp.asarray(base.probs)[..., None], jnp.asarray(count)[..., None]
    never = ((probs == 0) & (support > 0)) | ((probs == 1) & (support < count))
    return jnp.where(never, -jnp.inf, log_probs)


def is_bernoulli(base: Any) -> bool:
    """Return whether an element's law is the host's Bernoulli."""
    return type(innermost(base)) in (BernoulliLogits, BernoulliProbs, StableBernoulli)


def log_odds(base: Any) -> jax.Array:
    """Return the log odds of 1 of a Bernoulli, of its batch shape, infinite where the sampler always draws the same."""
    if isinstance(base, ExpandedDistribution):
        return jnp.broadcast_to(log_odds(base.base_dist), base.batch_shape)
    if isinstance(base, BernoulliLogits):
        return jnp.broadcast_to(base.logits, base.batch_shape)
    probs = jnp.asarray(base.probs)
    odds = jnp.where(probs == 0, -jnp.inf, jnp.where(probs == 1, jnp.inf, base.logits))
    return jnp.broadcast_to(odds, base.batch_shape)


def _uniforms(base: Any, shape: tuple[int, ...], key: jax.Array) -> jax.Array | None:
    """Return the uniform numbers u by which the host has drawn from a Bernoulli with a key, 1 where u < p; None for other laws.

    The compiler finds that these are the numbers of the draw, and computes them once.
    """
    if not is_bernoulli(base) or isinstance(base, ExpandedDistribution) or base.batch_shape != shape:
        return None
    return jax.random.uniform(reused(key), shape, jnp.result_type(float, base.probs)) if _draws_by_uniforms() else None


@lru_cache
def _draws_by_uniforms() -> bool:
    """Return whether the host draws a Bernoulli value by one uniform number, which is below p for 1: tried once."""
    try:
        with jax.ensure_compile_time_eval():
            key, x = jax.random.key(7), jnp.linspace(0.1, 0.9, 64, dtype=jnp.float32)
            below = jax.random.uniform(key, x.shape, x.dtype) < x
            by_probs, logits = BernoulliProbs(x).sample(key), jnp.log(x) - jnp.log1p(-x)
            by_logits = StableBernoulli(logits).sample(key)
            agree = jax.random.uniform(key, x.shape, x.dtype) < jax.nn.sigmoid(logits)
            return bool((below == by_probs).all() & (agree == by_logits).all())
    except Exception:  # What cannot be tried here is not known.
        return False


def finite_draw(fn: Any, value: jax.Array, key: jax.Array | None = None) -> FiniteDraw | None:
    """Return the log probabilities of all categories and the numbers drawn, or None; `key` is what the host drew with, if it did."""
    parts = counted_parts(fn)
    if parts is None:
        return None
    base, support = parts
    index = _number_of(base, support, value)
    log_probs = every_log_prob(base, support)
    odds = jnp.broadcast_to(log_odds(base), index.shape) if is_bernoulli(base) else None
    uniform = None if key is None else _uniforms(base, index.shape, key)
    return FiniteDraw(jnp.broadcast_to(log_probs, (*index.shape, len(support))), index, support, odds, uniform)


_PARAMETERS = {"Normal": ("loc", "scale"), "Poisson": ("rate",), "Gamma": ("concentration", "rate")}


def innermost(fn: Any) -> Any:
    """Return the distribution of one element, before `to_event` and `expand`."""
    while isinstance(fn, (Independent, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def family(fn: Any) -> str:
    """Return the name of a distribution's family, as `numpyro.distributions` calls it.

    A class of the user's own that has the name of one of these is another family: its name is given with its module's.
    """
    kind = type(innermost(unmasked(fn)))
    name = kind.__name__.removesuffix("Logits").removesuffix("Probs")
    ours = kind.__module__.partition(".")[0] in ("numpyro", "pplgrad")
    known = hasattr(numpyro.distributions, name) or name in ("OneHotCategorical", *LAWS)
    return name if ours or not known else f"{kind.__module__}.{kind.__qualname__}"


def event_elements(fn: Any) -> int:
    """Return the number of independent elements in an event."""
    return math.prod(fn.event_shape[: len(fn.event_shape) - len(innermost(unmasked(fn)).event_shape)])


def values_of_element(fn: Any) -> int:
    """Return how many weights say what an element is: of its categories, of ranked items, of a matrix; 2 where it is not known."""
    ranking = ranking_logits(fn)
    return (categories(fn) or 2) if ranking is None else int(ranking.shape[-1]) ** innermost(unmasked(fn)).event_axes


def elements(fn: Any, plates: Collection[int]) -> int:
    """Return the number of independent elements in an event and in the batch dimensions without a plate."""
    batch = fn.batch_shape
    loose = [size for i, size in enumerate(batch) if i - len(batch) not in plates]
    return math.prod(loose) * event_elements(fn)


def is_relaxable(fn: Any) -> bool:
    """Return whether a distribution is extended to weights of its categories."""
    return family(fn) in ("Bernoulli", "OneHotCategorical")


def parameters(fn: Any) -> dict[str, jax.Array] | None:
    """Return the parameters of a family of independent numbers, as `HostDraw.parameters` has them; None for others."""
    base, name = innermost(fn), family(fn)
    found: dict[str, Any] | None = _count_parameters(base)
    if name in _PARAMETERS:
        found = {key: getattr(base, key) for key in _PARAMETERS[name]}
    return None if found is None else {key: jnp.broadcast_to(x, fn.shape()) for key, x in found.items()}


def ranking_logits(fn: Any) -> jax.Array | None:
    """Return the logits (*batch, *event) of a distribution over rankings, None for others."""
    base = innermost(unmasked(fn))
    if not isinstance(base, PlackettLuce):
        return None
    shape = fn.shape()
    return jnp.broadcast_to(base.logits, shape[: len(shape) - base.event_axes] + base.logits.shape[-1:])


def is_matrix(fn: Any) -> bool:
    """Return whether a distribution is over permutation matrices, whose rows may be weights too."""
    return isinstance(innermost(unmasked(fn)), PermutationMatrix)


def _count_parameters(base: Any) -> dict[str, Any] | None:
    """Return the parameters of a law of counts whose distribution function has a known derivative along all that carry gradient."""
    kind = type(base)
    if kind is GeometricProbs:
        return {"failures": 1.0, "probs": 1 - jnp.asarray(base.probs)}
    if kind is GeometricLogits:
        return {"failures": 1.0, "logits": -jnp.asarray(base.logits)}
    if kind in (BinomialProbs, BinomialLogits):
        given = "probs" if kind is BinomialProbs else "logits"
        found = {"trials": base.total_count, given: getattr(base, given)}
    elif kind is NegativeBinomialProbs:
        found = {"failures": base.total_count, "probs": base.probs}
    elif kind is NegativeBinomialLogits:
        found = {"failures": base.total_count, "logits": base.logits}
    elif kind in (GammaPoisson, NegativeBinomial2):
        found = {"failures": base.concentration, "logits": -jnp.log(base.rate)}
    else:
        return None
    return found if _is_constant(next(iter(found.values()))) else None


def _is_constant(x: Any) -> bool:
    """Return whether it is sure that no gradient reaches a number: inside of a transform of JAX's it may come from anywhere."""
    return not isinstance(x, jax.core.Tracer) or not jnp.issubdtype(x.dtype, jnp.inexact)


def _count_support(fn: Any) -> tuple[Any, Any] | None:
    """Return the law of one element and its support, if its values are whole numbers from one that is known on, 0 or more."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if fn.event_shape or isinstance(innermost(fn), (CategoricalLogits, CategoricalProbs)):
        return None
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    least = getattr(support, "lower_bound", None)
    known = isinstance(least, (int, float)) and least >= 0
    return (fn, support) if known and getattr(support, "is_discrete", False) else None


def is_count(fn: Any) -> bool:
    """Return whether each element is a whole number, 0 or more, of a law that is not a choice among categories."""
    return _count_support(unmasked(fn)) is not None


def counts(fn: Any, value: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return consecutive counts around the mean, as `HostDraw.counts` has them, for one particle."""
    found = _count_support(fn)
    assert found is not None
    base, support = found
    try:
        mean = jax.lax.stop_gradient(jnp.asarray(base.mean))
    except (NotImplementedError, AttributeError):
        mean = jnp.zeros(())
    first = jnp.where(jnp.isfinite(mean), jnp.floor(mean - count // 2), 0.0)
    if hasattr(support, "upper_bound"):
        first = jnp.minimum(first, jnp.asarray(support.upper_bound) + 1 - count)
    first = jnp.broadcast_to(jnp.maximum(first, support.lower_bound).astype(value.dtype), value.shape)
    listed = first + jnp.arange(count, dtype=value.dtype).reshape(-1, *(1,) * value.ndim)
    inside = support(listed)
    # Mapped, so that no rule of a derivative, which JAX applies later, meets values of more dimensions than the parameters have.
    log_probs = jax.vmap(base.log_prob)(jnp.where(inside, listed, value))
    log_probs = jnp.moveaxis(jnp.where(inside, log_probs, -jnp.inf), 0, -1)
    return first, log_probs, base.log_prob(value)


def drawn_again(fn: Any, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return more draws from a distribution, and their log densities."""
    values = jax.lax.stop_gradient(fn.sample(key, (count,)))
    return values, fn.log_prob(values)
