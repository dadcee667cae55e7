"""What becomes of an estimate: the loss with its gradient, checked, and the state that is kept."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.util import find_stack_level

from pplgrad.core.objectives import Objective
from pplgrad.core.plates import Read
from pplgrad.core.sites import CostSpec, Run
from pplgrad.engine.checks import impossible_branch, impossible_cost
from pplgrad.engine.layout import Layout
from pplgrad.engine.surrogate import Estimate, estimate
from pplgrad.errors import ConfigurationError, listed
from pplgrad.estimators.score import ScoreFunction
from pplgrad.numpyro._array_ops import OPS, attach, concrete, ours
from pplgrad.numpyro._baselines import is_baseline_param
from pplgrad.numpyro._compat_jax import manual_axes
from pplgrad.numpyro._tracing.particle_trace import ParticleOutputs, ParticleTrace
from pplgrad.numpyro._tracing.specification import specify


def as_jax(params: dict) -> dict:
    """Return parameters with JAX's arrays in the place of NumPy's, which a traced index cannot look into."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, params)


def laid_out(
    static: ParticleTrace,
    arrays: ParticleOutputs,
    reads: dict[str, dict[str, Read]] | None,
    objective: Objective | None,
) -> tuple[Layout, Run]:
    """Return the layout of a particle's sites and costs, and its arrays in their order."""
    sites, costs = specify(static, reads)
    squares = {name: (lambda x=x: x) for name, x in arrays.squares.items()}
    run = Run(
        particles=next((x.shape[0] for x in (*arrays.model_costs.values(), *arrays.guide_costs.values())), 1),
        scores=[arrays.scores[site.name] for site in sites],
        costs=[arrays.model_costs[name] for name in static.model] + [arrays.guide_costs[name] for name in static.guide],
        indices=dict(arrays.indices),
        score_squared=squares,
        through=arrays.through,
        weights_alone=arrays.weights_alone,
    )
    return Layout.build(sites, costs, objective), run


@ours
def with_gradient(result: Estimate) -> jax.Array:
    """Return the loss, whose gradient is the estimate; an infinite one is NaN."""
    surrogate = -result.guarded_surrogate(OPS)
    if result.baseline_loss is not None:
        surrogate = surrogate + result.baseline_loss
    value = -result.value
    return attach(jnp.where(jnp.isfinite(value), value, jnp.nan), surrogate)


@ours
def by_site(runs: list) -> dict[str, jax.Array]:
    """Return each site's part of the loss with the gradient of that part: its own costs, charged to all sites."""
    names = dict.fromkeys(name for _, static, _ in runs for name in (*static.model, *static.guide))
    losses = {}
    for name in names:
        parts = []
        for arrays, static, reads in runs:
            sites, costs = specify(static, reads)
            _, run = laid_out(static, arrays, reads, None)
            chosen = [i for i, cost in enumerate(costs) if cost.name == name]
            plain = [replace(s, estimator=ScoreFunction()) if s.estimator.uses_score else s for s in sites]
            kept: list[CostSpec] = [costs[i] for i in chosen]
            parts.append((Layout.build(plain, kept), replace(run, costs=[run.costs[i] for i in chosen])))
        losses[name] = with_gradient(estimate(OPS, parts, None))
    return losses


def checked_sharding(sharding: jax.sharding.Sharding | None, max_parallel: int | None) -> jax.sharding.Sharding | None:
    """Refuse what does not say how one axis is split over devices."""
    if sharding is None:
        return None
    if not isinstance(sharding, jax.sharding.Sharding):
        raise ConfigurationError(
            f"TraceGrad_ELBO(branch_sharding={sharding!r}) takes a sharding of one axis, such as NamedSharding(mesh, P('branches'))."
        )
    if max_parallel is not None:
        raise ConfigurationError(
            "TraceGrad_ELBO(branch_sharding=...) splits the branches over devices and max_parallel over time; drop one of the two."
        )
    return sharding


def refuse_devices_alone(result: Estimate) -> None:
    """Refuse averages of what one device of several has seen."""
    axes = manual_axes()
    if result.states and axes:
        site = next(iter(result.states))[0]
        raise ConfigurationError(
            f"A baseline at site '{site}' keeps an average, and inside shard_map (over {listed(axes)}) each device would keep its "
            "own; use jit with arrays of a NamedSharding, whose averages are over all devices, or LeaveOneOut() there."
        )


def refuse_impossible(result: Estimate, runs: list) -> None:
    """Refuse what is NaN or infinite, by the name of the site, where its value can be looked at: not under `jit`."""
    value = concrete(result.value)
    if value is None:
        return
    if jnp.isfinite(value):
        refuse_impossible_branches(result)
        return
    for arrays, static, _ in runs:
        for side, costs in (("model", arrays.model_costs), ("guide", arrays.guide_costs)):
            for name, cost in costs.items():
                if not jnp.isfinite(cost).all():
                    raise impossible_cost(name, side, bool(jnp.isnan(cost).any()), static.estimators.get(name))
    refuse_impossible_branches(result)


def refuse_impossible_branches(result: Estimate) -> None:
    """Refuse an estimate that is NaN or infinite because of another value than was drawn."""
    for name, fine in result.finite.items():
        if concrete(fine) == 0:
            raise impossible_branch(name)


@ours
def new_state(runs: list, result: Estimate, particles: int) -> dict | None:
    """Return the mutable state after the step: the first particle's, with the baselines' new state where it is finite."""
    arrays, static, _ = runs[0]
    if not arrays.mutable:
        return None
    own = [name for name in arrays.mutable if not is_baseline_param(name)]
    if own and particles > 1:
        warnings.warn(
            f"Of the program's own mutable state ({listed(own)}) only what the first of the {particles} particles leaves is kept; with "
            "num_particles=1 there is no other.",
            stacklevel=find_stack_level(),
        )
    state = {name: jax.tree.map(lambda x: x[0], value) for name, value in arrays.mutable.items()}
    for (token, key), name in static.mutables.items():
        new = result.states.get((static.tokens.get(token, ""), key))
        if new is not None:
            state[name] = {
                field: jnp.where(jnp.isfinite(new[field]), new[field], old).astype(old.dtype)
                for field, old in state[name].items()
            }
    return jax.lax.stop_gradient(state)
