"""The exact gradient of an objective, by going through every outcome of a program with finitely many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from pplgrad.core.objectives import CostWeights, MultiSample, Objective
from pplgrad.core.program import Program
from pplgrad.diagnostics.checking import TooManyOutcomes
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._distributions import family, finite_parts
from pplgrad.numpyro._tracing.handlers import OffZero
from pplgrad.numpyro._tracing.marginal_laws import log_density, weight_of
from pplgrad.numpyro._tracing.model_trace import Drawn, model_trace, sample_sites

Values = dict[str, jax.Array]


def run_traces(program: Program, params: dict, key: jax.Array, values: Mapping[str, jax.Array]) -> tuple[dict, dict]:
    """Return the traces of guide and model, with given values of latent sites and subsampled plates where there are any."""
    model_key, guide_key = jax.random.split(key)
    guide, model = (
        handlers.substitute(handlers.substitute(f, data=params), data=values) for f in (program.guide, program.model)
    )
    with OffZero():
        drawn = handlers.trace(handlers.seed(guide, guide_key)).get_trace(*program.args, **program.kwargs)
    against = program._replace(model=model)
    return drawn, model_trace(against, model_key, {}, Drawn(drawn, {}, set()), check=False).trace


def latents(trace: dict) -> dict[str, Any]:
    """Return the sites of a trace that were drawn."""
    return {name: site for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}


def subsamples(trace: dict) -> dict[str, Any]:
    """Return the plates of a trace of which a part was drawn."""
    return {
        name: site
        for name, site in trace.items()
        if site["type"] == "plate" and site["args"][1] is not None and site["args"][1] < site["args"][0]
    }


def log_densities(
    program: Program, params: dict, values: Mapping[str, jax.Array], weights: CostWeights
) -> tuple[jax.Array, dict, dict, dict]:
    """Return log q of the draws, unscaled and unmasked, the log densities of guide and model as they count, and the guide's trace."""
    drawn, run = run_traces(program, params, jax.random.key(0), values)
    mine = latents(drawn)
    log_q = sum((unmasked(site["fn"]).log_prob(site["value"]).sum() for site in mine.values()), start=jnp.zeros(()))
    guide_costs = {name: weights.guide * _counted(site) for name, site in mine.items()}
    model_costs = {name: weight_of(site, weights) * _counted(site) for name, site in sample_sites(run).items()}
    return log_q, guide_costs, model_costs, drawn


def _counted(site: Any) -> jax.Array:
    """Return a site's log density as it counts: masked, and scaled."""
    return log_density(site) * (1.0 if site["scale"] is None else site["scale"])


def log_q_and_objective(
    program: Program, params: dict, values: Mapping[str, jax.Array], objective: Objective
) -> tuple[jax.Array, jax.Array]:
    """Return the log probability of the draws, and a weighted sum of log densities."""
    weights = objective.weights(program.args, program.kwargs)
    log_q, guide_costs, model_costs, _ = log_densities(program, params, values, weights)
    total = sum((x.sum() for x in model_costs.values()), start=jnp.zeros(()))
    return log_q, total - sum(x.sum() for x in guide_costs.values())


def outcomes(program: Program, params: dict, limit: int) -> tuple[Values, np.ndarray, float]:
    """Return the values of every outcome, stacked, the number of its minibatch, and the log probability of a minibatch."""
    drawn, run = run_traces(program, params, jax.random.key(0), {})
    axes: list[list[Any]] = []
    makers: list[tuple[str, int, tuple[int, ...], np.ndarray | None]] = []
    minibatches = list({**subsamples(drawn), **subsamples(run)}.items())
    for name, site in minibatches:
        size, part = site["args"][:2]
        # The order counts: a program may treat the places of a minibatch differently.
        if math.perm(size, part) > limit:
            raise TooManyOutcomes(f"there are more than {limit:,} outcomes")
        axes.append(list(itertools.permutations(range(size), part)))
        makers.append((name, 1, (part,), None))
    for name, site in latents(drawn).items():
        parts = finite_parts(unmasked(site["fn"]))
        if parts is None:
            raise TooManyOutcomes(f"site '{name}' ({family(site['fn'])}) has infinitely many values")
        base, support = parts
        shape = jnp.shape(site["value"])
        elements = math.prod(shape[: len(shape) - len(base.event_shape)])
        listed = np.asarray(support)
        axes += [list(range(len(listed)))] * elements
        makers.append((name, elements, shape, listed))
    if math.fsum(math.log2(len(axis)) for axis in axes) > math.log2(limit) + 1e-9:
        raise TooManyOutcomes(f"there are more than {limit:,} outcomes")
    rows: dict[str, list[Any]] = {name: [] for name, *_ in makers}
    numbers = []
    seen: dict[tuple, int] = {}
    for picked in itertools.product(*axes):
        numbers.append(seen.setdefault(picked[: len(minibatches)], len(seen)))
        start = 0
        for name, count, shape, support in makers:
            mine = picked[start : start + count]
            rows[name].append(np.array(mine[0]) if support is None else support[np.array(mine, int)].reshape(shape))
            start += count
    return {name: jnp.asarray(np.stack(x)) for name, x in rows.items()}, np.array(numbers), -math.log(len(seen))


def exact_gradient(
    program: Program,
    constrain: Callable[[dict], dict],
    params: dict,
    objective: Objective,
    particles: int,
    limit: int,
) -> dict[str, jax.Array]:
    """Return the gradient of the enumerated loss with respect to unconstrained parameters, or raise `TooManyOutcomes`."""
    every, minibatch, log_weight = outcomes(program, constrain(params), limit)
    tuples = None
    if isinstance(objective, MultiSample):
        tuples = jnp.asarray(_tuples(minibatch, objective.combined(particles), limit))

    def loss(params: dict) -> jax.Array:
        known = constrain(params)
        if tuples is None:
            log_q, values = _mapped(lambda o: log_q_and_objective(program, known, o, objective), every, len(minibatch))
        else:
            assert isinstance(objective, MultiSample)
            log_q, logs, scale = _mapped(lambda o: _log_weights(program, known, o, objective), every, len(minibatch))
            log_q, scale = log_q[tuples].sum(1), scale[0]
            bounds = scale * _bound(objective.power, logs[tuples] / scale)
            values = bounds.reshape(len(tuples), -1).sum(1)
        # An impossible outcome counts for nothing, whatever its value.
        possible = log_q > -jnp.inf
        weighted = jnp.exp(jnp.where(possible, log_q, 0.0) + log_weight) * jnp.where(possible, values, 0.0)
        return -jnp.sum(jnp.where(possible, weighted, 0.0))

    return jax.jit(jax.grad(loss))(params)


def _bound(power: float, logs: jax.Array) -> jax.Array:
    """Return the bound of the log weights of particles, along axis 1."""
    return (jax.nn.logsumexp(power * logs, axis=1) - math.log(logs.shape[1])) / power


def _mapped(f: Callable, every: Values, count: int) -> Any:
    """Map over outcomes, in pieces that fit into memory; a program without draws has one outcome."""
    return jax.lax.map(f, every, batch_size=256) if every else jax.tree.map(lambda x: jnp.asarray(x)[None], f({}))


def _tuples(minibatch: np.ndarray, combined: int, limit: int) -> np.ndarray:
    """Return the numbers of the outcomes in all tuples with the same minibatch."""
    groups = [np.flatnonzero(minibatch == number) for number in np.unique(minibatch)]
    if sum(float(len(group)) ** combined for group in groups) > limit:
        raise TooManyOutcomes(f"there are more than {limit:,} outcomes of {combined} particles")
    return np.array([picked for group in groups for picked in itertools.product(group, repeat=combined)])


def _log_weights(
    program: Program, params: dict, values: Mapping[str, jax.Array], objective: MultiSample
) -> tuple[jax.Array, jax.Array, float]:
    """Return log q, log p − log q of each element of the plates that all latent sites share, and the plates' scale."""
    log_q, guide_costs, model_costs, drawn = log_densities(program, params, values, CostWeights(1.0, 1.0, 1.0))
    frames = [{frame.name: frame for frame in site["cond_indep_stack"]} for site in latents(drawn).values()]
    shared = [f for name, f in frames[0].items() if all(name in other for other in frames)] if frames else []
    if objective.plates is not None:
        shared = [f for f in shared if f.name in objective.plates]
    kept = {f.dim for f in shared}
    total = jnp.zeros(())
    for costs, sign in ((model_costs, 1.0), (guide_costs, -1.0)):
        for name, x in costs.items():
            if any(x.ndim < -f.dim or x.shape[f.dim] != f.size for f in shared):
                raise TooManyOutcomes(f"site '{name}' stands outside of the plates that have a weight for each element")
            total = total + sign * x.sum([d for d in range(-x.ndim, 0) if d not in kept], keepdims=True)
    sizes = {name: site["args"] for name, site in drawn.items() if site["type"] == "plate"}
    scale = math.prod(sizes[f.name][0] / f.size for f in shared)
    return log_q, total, scale
