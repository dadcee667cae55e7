"""Divergences and entropies of NumPyro's distributions in closed form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Independent, MaskedDistribution, kl_divergence

from pplgrad.engine.closed_forms import no_closed_form
from pplgrad.errors import ProgramError
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._distributions import counted_parts, every_log_prob, family, is_structured
from pplgrad.numpyro._tracing.marginal_laws import InComponent
from pplgrad.numpyro._tracing.relaxations import Extended, extended


def closed_form(name: str, kind: str, guide: Any, model: Any) -> jax.Array:
    """Return the divergence of a site's guide from its model, or minus the guide's entropy: what stands for log q − log p."""
    q, p = guide["fn"], model["fn"] if kind == "kl" else None
    if isinstance(p, InComponent):
        raise no_closed_form(name, kind, [family(q)], "its density in the model reads a site that is summed out")
    laws = [family(fn) for fn in (q, p) if fn is not None]
    if p is not None and not _same_scale(guide["scale"], model["scale"]):
        raise ProgramError(
            f"Site '{name}' is scaled differently in guide and model, so that its densities are no divergence; drop it from "
            "closed_form."
        )
    masks = [getattr(fn, "_mask", None) for fn in (q, p) if fn is not None]
    bare = [unmasked(fn) for fn in (q, p) if fn is not None]
    if any(_masked_inside(fn) for fn in (q, p)) or not _same_mask(masks[0], masks[-1]):
        raise no_closed_form(name, kind, laws, "guide and model are masked differently")
    found = _closed(name, kind, bare[0], bare[1] if len(bare) > 1 else None, laws)
    if found.shape != q.batch_shape:
        # Some of NumPyro's leave out the dimensions along which their result is the same.
        found = jnp.broadcast_to(found, jnp.broadcast_shapes(found.shape, q.batch_shape))
    return found if masks[0] is None else jnp.where(masks[0], found, 0.0)


def _closed(name: str, kind: str, q: Any, p: Any, laws: list[str]) -> jax.Array:
    """Return the divergence, or minus the entropy if there is no `p`, or refuse."""
    found = _finite(q, p)
    if found is not None:
        return found
    if p is None and isinstance(q, Independent):
        # Before the sum over the event: some of NumPyro's leave out dimensions along which their result is the same.
        base = _closed(name, kind, q.base_dist, None, laws)
        inner = jnp.broadcast_to(base, jnp.broadcast_shapes(base.shape, q.base_dist.batch_shape))
        return inner.sum(range(inner.ndim - q.reinterpreted_batch_ndims, inner.ndim))
    if p is not None and "Kumaraswamy" in laws:
        raise no_closed_form(name, kind, laws, "NumPyro's is a series that it cuts off")
    try:
        return -q.entropy() if p is None else kl_divergence(q, p)
    except NotImplementedError as error:
        raise no_closed_form(name, kind, laws, "NumPyro knows none") from error
    except AttributeError as error:
        if error.name != "entropy":
            raise
        raise no_closed_form(name, kind, laws, "NumPyro knows none") from error


def _masked_inside(fn: Any) -> bool:
    """Return whether a mask stands elsewhere than around the distribution as a whole."""
    return fn is not None and unmasked(fn) is not fn and not isinstance(fn, MaskedDistribution)


def _same_mask(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if first is None or second is None or isinstance(first, jax.core.Tracer) or isinstance(second, jax.core.Tracer):
        return False
    return bool(jnp.all(jnp.asarray(first) == jnp.asarray(second)))


def _same_scale(first: Any, second: Any) -> bool:
    if first is second:
        return True
    return isinstance(first, (int, float)) and isinstance(second, (int, float)) and first == second


def _finite(q: Any, p: Any) -> jax.Array | None:
    """Return the sum over all values, or None if there are not finitely many or the two differ in them."""
    wide = [fn if fn is None or isinstance(fn, Extended) else _extension(fn) for fn in (q, p)]
    if wide[0] is None or (p is not None and wide[1] is None):
        return None
    log_q = wide[0].log_probs
    log_p = jnp.zeros_like(log_q) if wide[1] is None else wide[1].log_probs
    if log_q.shape[-1] != log_p.shape[-1] or not _same_values(q, p):
        return None
    possible = log_q > -jnp.inf
    safe = jnp.where(possible, log_q, 0.0)
    term = jnp.where(possible, jnp.exp(safe) * (safe - log_p), 0.0).sum(-1)
    events = wide[0].event_dim - wide[0].one_hot
    return term.sum(range(term.ndim - events, term.ndim)) if events else term


def _same_values(q: Any, p: Any) -> bool:
    """Return whether two distributions are known to have the same values in the same order."""
    if p is None:
        return True
    with jax.ensure_compile_time_eval():  # Values that are constants are so while a program is traced, too.
        values = [counted_parts(unmasked(fn)) for fn in (q, p)]
    first, second = (None if found is None else found[1] for found in values)
    if first is None or second is None or any(isinstance(x, jax.core.Tracer) for x in (first, second)):
        return first is second
    return first.shape == second.shape and bool((np.asarray(first) == np.asarray(second)).all())


def _extension(fn: Any) -> Any:
    parts = counted_parts(fn)
    if parts is None:
        return None
    if is_structured(fn):
        # As a law over the numbers of its values.
        log_probs = jnp.broadcast_to(every_log_prob(*parts), (*fn.batch_shape, len(parts[1])))
        return Extended(log_probs, True, log_probs.shape[-1:])
    return extended(fn)
