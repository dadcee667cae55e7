"""What pplgrad needs to know of NumPyro's distributions beyond their `log_prob`."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions
from numpyro.distributions import ExpandedDistribution, Independent

from pplgrad.engine.ops import FEW_CATEGORIES
from pplgrad.numpyro._compat import unmasked


class FiniteDraw(NamedTuple):
    """A draw whose elements have finitely many values.

    `log_probs` has shape (*batch, *elements, categories) and `index` (*batch, *elements); `support` has the values of
    one element, (categories, *event).
    """

    log_probs: jax.Array
    index: jax.Array
    support: jax.Array


def finite_parts(fn: Any) -> tuple[Any, jax.Array] | None:
    """Return the distribution of one element and its values, (categories, *event), or None if they are not finite."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if not getattr(fn, "has_enumerate_support", False):
        return None
    try:
        # NumPyro's expanded distributions drop the event dimensions of what they enumerate.
        support = _family(fn).enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return fn, support.reshape(support.shape[0], *fn.event_shape)


def categories(fn: Any) -> int | None:
    """Return the number of values of one element, or None if there are not finitely many."""
    parts = finite_parts(unmasked(fn))
    return None if parts is None else len(parts[1])


def every_log_prob(base: Any, listed: jax.Array) -> jax.Array:
    """Return the log probabilities of listed values, along a last axis."""
    if len(listed) > FEW_CATEGORIES:
        return jnp.moveaxis(base.log_prob(listed), 0, -1)
    # One by one: the derivative of what all have in common would be a reduction over few.
    return jnp.stack([base.log_prob(value) for value in listed], -1)


def finite_draw(fn: Any, value: jax.Array) -> FiniteDraw | None:
    """Return the log probabilities of all categories and the numbers drawn, or None."""
    parts = finite_parts(fn)
    if parts is None:
        return None
    base, support = parts
    events = len(base.event_shape)
    listed = support.reshape(len(support), *(1,) * (value.ndim - events), *base.event_shape)
    same = listed == value
    index = jnp.argmax(same.all(range(same.ndim - events, same.ndim)) if events else same, 0)
    log_probs = every_log_prob(base, listed)
    return FiniteDraw(jnp.broadcast_to(log_probs, (*index.shape, len(support))), index, support)


_PARAMETERS = {"Normal": ("loc", "scale"), "Poisson": ("rate",), "Gamma": ("concentration", "rate")}


def _family(fn: Any) -> Any:
    while isinstance(fn, (Independent, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def family(fn: Any) -> str:
    """Return the name of a distribution's family, as `numpyro.distributions` calls it.

    A class of the user's own that has the name of one of these is another family: its name is given with its module's.
    """
    kind = type(_family(unmasked(fn)))
    name = kind.__name__.removesuffix("Logits").removesuffix("Probs")
    ours = kind.__module__.partition(".")[0] in ("numpyro", "pplgrad")
    known = hasattr(numpyro.distributions, name) or name == "OneHotCategorical"
    return name if ours or not known else f"{kind.__module__}.{kind.__qualname__}"


def event_elements(fn: Any) -> int:
    """Return the number of independent elements in an event."""
    return math.prod(fn.event_shape[: len(fn.event_shape) - len(_family(unmasked(fn)).event_shape)])


def elements(fn: Any, plates: Collection[int]) -> int:
    """Return the number of independent elements in an event and in the batch dimensions without a plate."""
    batch = fn.batch_shape
    loose = [size for i, size in enumerate(batch) if i - len(batch) not in plates]
    return math.prod(loose) * event_elements(fn)


def is_relaxable(fn: Any) -> bool:
    """Return whether a distribution is extended to weights of its categories."""
    return family(fn) in ("Bernoulli", "OneHotCategorical")


def parameters(fn: Any) -> dict[str, jax.Array] | None:
    """Return the parameters of a family of independent numbers, each of the shape of the value; None for others."""
    base, name = _family(fn), family(fn)
    if name not in _PARAMETERS:
        return None
    return {key: jnp.broadcast_to(getattr(base, key), fn.shape()) for key in _PARAMETERS[name]}


def drawn_again(fn: Any, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return more draws from a distribution, and their log densities."""
    values = jax.lax.stop_gradient(fn.sample(key, (count,)))
    return values, fn.log_prob(values)
