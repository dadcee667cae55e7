"""NumPyro's mixtures as the estimators see them: weights, locations and scales."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from pplgrad.core.mixtures import Components, Mixture
from pplgrad.numpyro._array_ops import OPS
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._distributions import innermost

_LAWS: dict[type, tuple[str, bool]] = {
    **{getattr(dist, law): (law, False) for law in ("Normal", "Laplace", "Logistic", "Gumbel", "Cauchy")},
    dist.LogNormal: ("Normal", True),
}

jax.tree_util.register_dataclass(Components, ["loc", "scale"], ["law", "of_log", "correlated"])
jax.tree_util.register_dataclass(Mixture, ["value", "log_weights", "parts"], ["event_dim"])


def mixture(fn: Any, value: jax.Array) -> Mixture:
    """Return the mixture that a value was drawn from; `components` has said that it is one."""
    base, parts = innermost(unmasked(fn)), _components(fn)
    assert parts is not None
    log_weights = jax.nn.log_softmax(base.mixing_distribution.logits, -1)
    return Mixture.of(OPS, value, log_weights, parts, base.event_dim)


def components(fn: Any) -> tuple[int, bool] | None:
    """Return the number of components of a mixture, and whether the entries of each are independent; None for other laws."""
    parts = _components(fn)
    if parts is None:
        return None
    return innermost(unmasked(fn)).mixture_size, not any(part.correlated for part in parts)


def _components(fn: Any) -> tuple[Components, ...] | None:
    base = innermost(unmasked(fn))
    if type(base) is dist.MixtureSameFamily:
        found = [_located(base.component_distribution)]
    elif type(base) is dist.MixtureGeneral:
        found = [_located(one, alone=True) for one in base.component_distributions]
    else:
        return None
    parts = tuple(part for part in found if part is not None)
    # Of the law of x and of that of log x the supports differ.
    same = len({part.of_log for part in parts}) == 1 and len({part.correlated for part in parts}) == 1
    return parts if len(parts) == len(found) and same else None


def _located(whole: Any, alone: bool = False) -> Components | None:
    """Return components with their locations and scales; `alone` says that the law is of one component, without a dimension for it."""
    inner, events = innermost(whole), whole.event_shape
    correlated = type(inner) is dist.MultivariateNormal
    if correlated and len(events) > 1 or not (correlated or type(inner) in _LAWS):
        return None
    law, of_log = ("Normal", False) if correlated else _LAWS[type(inner)]
    loc, scale = (inner.loc, inner.scale_tril) if correlated else (inner.loc, inner.scale)

    def placed(x: Any, more: int) -> jax.Array:
        # Arrays may have fewer dimensions than the law.
        rest = jnp.shape(scale)[-1:] if more else ()
        own = tuple(jnp.shape(x))[: jnp.ndim(x) - more]
        x = jnp.broadcast_to(x, (*jax.numpy.broadcast_shapes(own, (*whole.batch_shape, *events)), *rest))
        return jnp.expand_dims(x, -1 - len(events) - more) if alone else x

    return Components(law, placed(loc, 0), placed(scale, int(correlated)), of_log, correlated)
