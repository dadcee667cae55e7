"""Draws of a guide with all their densities, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions import Delta, Independent, Unit

from pplgrad.assessment.draws import Draws
from pplgrad.assessment.gathering import (
    LatentSite,
    ObservedSite,
    Table,
    gathered,
    is_drawn_alone,
    named_axes,
    refuse_drawn_by_model,
    refuse_masked,
    refuse_moving_mask,
    refuse_scaled,
    refuse_subsampled,
    refuse_without_latents,
    shared_support,
)
from pplgrad.assessment.masks import mask_of, spread
from pplgrad.core.objectives import IWAE
from pplgrad.core.program import Program
from pplgrad.engine.closed_forms import NoClosedForms
from pplgrad.engine.layout import Layout
from pplgrad.engine.signals import Bounds
from pplgrad.estimators.reparam import Reparam
from pplgrad.estimators.score import ScoreFunction
from pplgrad.numpyro._array_ops import OPS
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._compat_jax import TRACING_ERRORS
from pplgrad.numpyro._distributions import finite_parts, innermost, is_reparameterized
from pplgrad.numpyro._elbo import TraceGrad_ELBO
from pplgrad.numpyro._evaluation import laid_out
from pplgrad.numpyro._rerun.enumeration import run_traces, subsamples
from pplgrad.numpyro._tracing.control_flow import Flow
from pplgrad.numpyro._tracing.marginal_laws import InComponent, Marginal, log_density
from pplgrad.numpyro._tracing.model_trace import sample_sites
from pplgrad.numpyro._tracing.particle_trace import ParticleOutputs, ParticleTrace

_CHUNK = 100
"""Draws that run at once."""


@dataclass(frozen=True)
class Found:
    """The draws of a program, and what is known of its structure."""

    draws: Draws
    layout: Layout


def weighted_draws(program: Program, params: dict, plates: tuple[str, ...] | None, count: int, key: jax.Array) -> Found:
    """Return draws of the guide, and the program's layout; or refuse a program whose weights mean nothing."""
    raw, guide = _looked_at(program, params, key)
    objective = IWAE(plates=plates)
    # An estimator with nothing to ask of its site, since no gradient is taken.
    chosen = {name: Reparam() if is_reparameterized(site["fn"]) else ScoreFunction() for name, site in guide.items()}
    # One draw after the other where a program cannot be traced.
    elbo = TraceGrad_ELBO(1, vectorize_particles=False, estimators=chosen, objective=objective)
    elbo._closed = NoClosedForms(objective=objective)
    arrays, static, reads = _particles(elbo, program, params, jax.random.split(key, count))
    layout, run = laid_out(static, arrays, reads, objective)
    bounds = Bounds(OPS, [(layout, run)], objective)
    first = {name: x[0] for name, x in arrays.values.items()}
    drawn, model = run_traces(program, params, key, first)
    refuse_masked(layout, _masks(static, arrays, drawn, model))
    *densities, kept = mapped(lambda values: _densities(program, params, key, values), arrays.values)
    for (_, name), rows in kept.items():
        if (np.asarray(rows) != np.asarray(rows)[:1]).any():
            refuse_moving_mask(name)
    models = len(static.model)
    table = Table(
        np.asarray(bounds.log_weights(0, run.costs)),
        _total(run.costs[:models], count),
        _total(run.costs[models:], count),
        {name: np.asarray(x) for name, x in arrays.values.items()},
        *({name: np.asarray(x) for name, x in found.items()} for found in densities),
    )
    latents = {name: _latent_site(drawn[name], sample_sites(model).get(name)) for name in static.estimators}
    summed = tuple(n for n, site in sample_sites(raw).items() if not site["is_observed"] and n not in latents)
    return Found(gathered(table, layout.weight_plates or (), latents, _observed_sites(raw), summed), layout)


def mapped(f: Callable, rows: Any) -> Any:
    """Return what a function gives for each row, compiled, or one after the other where it cannot be traced."""
    length = len(jax.tree.leaves(rows)[0])
    mine = min(_CHUNK, length)
    # A last piece of another length would be compiled again.
    numbers = np.arange(-(-length // mine) * mine) % length
    compiled = jax.jit(jax.vmap(f))
    try:
        found = [compiled(jax.tree.map(lambda x, n=n: x[n], rows)) for n in numbers.reshape(-1, mine)]
        return jax.tree.map(lambda *x: jnp.concatenate(x)[:length], *found)
    except TRACING_ERRORS:
        every = [f(jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(length)]
        return jax.tree.map(lambda *x: jnp.stack(x), *every)


def log_joint(
    program: Program, params: dict, found: Found, values: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array | None]]:
    """Return log p of each element of the plates that have weights, at given values of all latents, and the values that each can take."""
    _, model = run_traces(program, params, jax.random.key(0), values)
    return _by_element(found.layout, model), {name: _listed(model[name]["fn"]) for name in found.draws.latents}


def log_weights(program: Program, params: dict, layout: Layout, values: Mapping[str, jax.Array]) -> jax.Array:
    """Return log p − log q of each element of the plates that have weights, at given values of all latents."""
    guide, model = run_traces(program, params, jax.random.key(0), values)
    return _by_element(layout, model) - _by_element(layout, guide)


def _by_element(layout: Layout, trace: dict) -> jax.Array:
    """Return the log density of each element of the plates that have weights."""
    plates = layout.weight_plates or ()
    shape = layout.weight_shape
    kept = {plate.dim for plate in plates}
    reading = {cost.name for cost in layout.costs if cost.reads}
    total = jnp.zeros(shape)
    for name, site in sample_sites(trace).items():
        x = log_density(site)
        if name not in reading and not all(any(f.name == p.name for f in site["cond_indep_stack"]) for p in plates):
            continue  # No draw changes it, and it has no element: it stands beside the weights.
        x = x.sum([d for d in range(-x.ndim, 0) if d not in kept], keepdims=True)
        total = total + (x.reshape(x.shape[x.ndim - len(shape) :]) if x.ndim > len(shape) else x)
    return total


def _particles(
    elbo: TraceGrad_ELBO, program: Program, params: dict, keys: jax.Array
) -> tuple[ParticleOutputs, ParticleTrace, Any]:
    """Return the outputs of a particle for each key."""
    try:
        particle, static, reads = elbo._traced(keys[0], params, program)
    except TRACING_ERRORS:
        runs = elbo._one_by_one(list(keys), params, program)
        arrays = jax.tree.map(lambda *x: jnp.concatenate(x), *(run[0] for run in runs))
        return arrays, runs[0][1], None
    elbo._check(static)
    arrays, _ = particle.unpacked(mapped(particle, keys))
    return arrays, static, reads


def _looked_at(program: Program, params: dict, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trace of the model with a draw of the guide, nothing summed out, and the guide's latent sites; refuse what has no weights."""
    guide, model = (handlers.substitute(f, data=params) for f in (program.guide, program.model))
    drawn = handlers.trace(handlers.seed(guide, key)).get_trace(*program.args, **program.kwargs)
    latents = {name: site for name, site in sample_sites(drawn).items() if not site["is_observed"]}
    values = {name: site["value"] for name, site in latents.items()}
    against = handlers.substitute(handlers.seed(model, key), data=values)
    seen = handlers.trace(against).get_trace(*program.args, **program.kwargs)
    parts = {**subsamples(drawn), **subsamples(seen)}
    refuse_subsampled({name: (int(site["args"][1]), int(site["args"][0])) for name, site in parts.items()})
    refuse_without_latents(values)
    refuse_scaled([n for t in (seen, drawn) for n, site in sample_sites(t).items() if _is_scaled(site)])
    refuse_drawn_by_model([n for n, site in sample_sites(seen).items() if is_drawn_alone(site, values)])
    return seen, latents


def _is_scaled(site: Any) -> bool:
    return site["scale"] is not None and bool(np.any(np.asarray(site["scale"]) != 1))


def _masks(
    static: ParticleTrace, arrays: ParticleOutputs, drawn: dict, model: dict
) -> dict[tuple[str, str], np.ndarray | None]:
    """Return the mask of each density by side and name, in the shape of the particle's costs."""
    found: dict[tuple[str, str], np.ndarray | None] = {}
    flows: Mapping[str, Flow]
    for side, trace, costs, flows in (
        ("model", model, arrays.model_costs, static.model_flows),
        ("guide", drawn, arrays.guide_costs, {}),
    ):
        for name, site in sample_sites(trace).items():
            mask = _mask(site)
            if mask is not None:
                flow = flows.get(name)
                mask = np.flip(mask, 0) if flow is not None and flow.scanned and flow.reverse else mask
                mask = mask.reshape(costs[name].shape[1:])
            found[side, name] = mask
    return found


def _mask(site: Any) -> np.ndarray | None:
    if isinstance(site["fn"], (Marginal, InComponent)):
        return None
    counted, bare = log_density(site), unmasked(site["fn"]).log_prob(site["value"])
    return mask_of(np.asarray(counted), np.asarray(bare))


def _densities(program: Program, params: dict, key: jax.Array, values: Mapping[str, jax.Array]) -> tuple[dict, ...]:
    """Return log q and log p of the elements of each latent site, log p of the observed ones, and what of a masked site counts."""
    drawn, model = run_traces(program, params, key, values)
    log_q = {name: element_density(drawn[name]["fn"], value) for name, value in values.items()}
    log_p, observed = {}, {}
    for name, site in sample_sites(model).items():
        if isinstance(site["fn"], (Marginal, InComponent)):
            continue
        if site["is_observed"]:
            observed[name] = log_density(site)
        elif name in values:
            density = element_density(site["fn"], values[name])
            if density.shape == log_q[name].shape:
                log_p[name] = density
    kept = {}
    for side, trace in (("model", model), ("guide", drawn)):
        for name, site in sample_sites(trace).items():
            if not isinstance(site["fn"], (Marginal, InComponent)) and unmasked(site["fn"]) is not site["fn"]:
                kept[side, name] = (log_density(site) != 0) | (unmasked(site["fn"]).log_prob(site["value"]) == 0)
    return log_q, log_p, observed, kept


def _element(fn: Any) -> Any:
    """Return the distribution of one element."""
    fn = unmasked(fn)
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def element_density(fn: Any, value: jax.Array) -> jax.Array:
    """Return the log density of each independent element of a value, without masks."""
    element = _element(fn)
    return jnp.broadcast_to(element.log_prob(value), value.shape[: value.ndim - len(element.event_shape)])


def _latent_site(site: Any, other: Any) -> LatentSite:
    fn, value = site["fn"], site["value"]
    frames = [(frame.name, frame.dim) for frame in site["cond_indep_stack"]]
    batch = value.ndim - fn.event_dim
    elements = value.ndim - len(_element(fn).event_shape)
    mask = _mask(site)
    theirs = None if other is None else _support(other["fn"])
    return LatentSite(
        axes=named_axes(value.ndim, batch, frames),
        element_axes=named_axes(elements, batch, frames),
        discrete=_is_discrete(fn),
        support=shared_support(_support(fn), theirs),
        mask=spread(mask, value.shape[:elements], batch),
        auxiliary=other is None,
        point=isinstance(innermost(unmasked(fn)), Delta),
    )


def _observed_sites(raw: dict[str, Any]) -> dict[str, ObservedSite]:
    """Return the observed sites that draw something; `raw` is the model's trace with nothing summed out."""
    found = {}
    for name, site in sample_sites(raw).items():
        fn = unmasked(site["fn"])
        if not site["is_observed"] or isinstance(innermost(fn), (Delta, Unit)):
            continue
        value = jnp.broadcast_to(site["value"], jnp.broadcast_shapes(jnp.shape(site["value"]), fn.shape()))
        batch = value.ndim - fn.event_dim
        frames = [(frame.name, frame.dim) for frame in site["cond_indep_stack"]]
        mask = spread(_mask(site), value.shape, batch)
        axes = named_axes(value.ndim, batch, frames)
        found[name] = ObservedSite(np.asarray(value), axes, axes[:batch], _is_discrete(fn), _support(fn), mask)
    return found


def _is_discrete(fn: Any) -> bool:
    return bool(getattr(getattr(fn, "support", None), "is_discrete", False))


def _support(fn: Any) -> np.ndarray | None:
    listed = _listed(fn)
    return None if listed is None else np.asarray(listed)


def _listed(fn: Any) -> jax.Array | None:
    """Return the values that a site can take, or None if they are not finite, or are not known while a program is traced."""
    if isinstance(fn, (Marginal, InComponent)):
        return None
    parts = finite_parts(unmasked(fn))
    return None if parts is None else parts[1]


def _total(costs: Any, count: int) -> np.ndarray:
    return sum((np.asarray(x, float).reshape(count, -1).sum(1) for x in costs), np.zeros(count))
