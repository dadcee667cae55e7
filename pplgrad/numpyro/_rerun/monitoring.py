"""A watched step in NumPyro: a few more draws of the gradient inside the compiled step, and what they show of each site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to, constraints

from pplgrad.core.estimator import Estimator
from pplgrad.core.program import Program
from pplgrad.engine.records import Numbers, Record, seen, settings
from pplgrad.engine.surrogate import Estimate
from pplgrad.errors import PplgradError, ProgramError, first_line
from pplgrad.monitoring.watch import Watcher
from pplgrad.numpyro._array_ops import OPS, concrete
from pplgrad.numpyro._baselines import is_baseline_param
from pplgrad.numpyro._compat import marked_mutable, unmasked
from pplgrad.numpyro._compat_jax import TRACING_ERRORS, tag
from pplgrad.numpyro._rerun.enumeration import latents, run_traces
from pplgrad.numpyro._tracing.closed_forms import closed_form
from pplgrad.numpyro._tracing.provenance import outputs_read

STEPS = "$pplgrad.steps"
"""The mutable site of a watched guide that counts the steps."""

Estimated = Callable[[jax.Array, dict, Record], Estimate]


def register_counter() -> None:
    """Register the step's number as mutable state, which SVI carries from step to step."""
    marked_mutable(STEPS, jnp.zeros((), jnp.int32), (STEPS, ""))


def monitor(
    watcher: Watcher,
    estimated: Estimated,
    key: jax.Array,
    params: dict,
    program: Program,
    resolved: Mapping[str, Estimator],
) -> None:
    """Tell the watcher of this step if it is due; the loss, its gradient and the draws of training are as without."""
    # Constants: nothing of this is part of what is differentiated.
    params, step = jax.lax.stop_gradient(params), params[STEPS]

    def emit() -> None:
        whole, sites = _numbers(watcher, estimated, jax.random.fold_in(key, 0x3A7C), params, program, resolved)
        jax.debug.callback(watcher.emit, step, whole, sites)

    known = concrete(step)
    if known is None:
        jax.lax.cond(step % watcher.watch.every == 0, emit, lambda: None)
    elif watcher.due(int(known)):
        emit()


def counted(state: dict) -> dict:
    """Return the mutable state with the step counted."""
    return {**state, STEPS: state[STEPS] + 1}


def _numbers(
    watcher: Watcher,
    estimated: Estimated,
    key: jax.Array,
    params: dict,
    program: Program,
    resolved: Mapping[str, Estimator],
) -> tuple[Numbers, dict[str, Numbers]]:
    """Return the numbers that the watcher emits, of the whole program and by site."""
    free, reads, law = _structure(program, params, key, resolved)
    start = {name: transform.inv(params[name]) for name, transform in free.items()}

    def draw(key: jax.Array) -> tuple[dict, Any]:
        def loss(unconstrained: dict) -> tuple[jax.Array, Any]:
            moved = {name: free[name](x) for name, x in unconstrained.items()}
            record = Record()
            result = estimated(key, {**params, **moved}, record)
            return -result.surrogate, (-result.value, record.tree(), law(params, key))

        return jax.grad(loss, has_aux=True)(start)

    gradients, (losses, (signals, learned), entropies) = jax.lax.map(draw, jax.random.split(key, watcher.watch.draws))
    numbers: dict[str, Numbers] = {}
    for name, estimator in resolved.items():
        entropy = {"entropy": entropies[name].mean()}
        mine = {key: x[0] for key, x in learned.get(name, {}).items()}
        numbers[name] = {**entropy, **settings(estimator, program.args, program.kwargs), **mine}
    leaves: list[jax.Array] = []
    numbers_of = {}
    for name, tree in gradients.items():
        parts = jax.tree.leaves(tree)
        numbers_of[name] = range(len(leaves), len(leaves) + len(parts))
        leaves += parts
    by_site = {
        site: [i for name in names if name in numbers_of for i in numbers_of[name]] for site, names in reads.items()
    }
    whole, sites = seen(OPS.xp, leaves, by_site, signals, numbers)
    return {"loss": losses.mean(), **whole}, sites


def _structure(
    program: Program, params: dict, key: jax.Array, resolved: Mapping[str, Estimator]
) -> tuple[dict[str, Any], dict[str, list[str]], Callable[[dict, jax.Array], dict[str, jax.Array]]]:
    """Return the parameters that training moves with their transforms, those that each site's density reads, and the entropies."""
    free: dict[str, Any] = {}
    order: list[str] = []

    def densities(params: dict, key: jax.Array) -> list[jax.Array]:
        tagged = {name: tag(name, x) for name, x in params.items()}
        drawn, run = run_traces(program, tagged, key, {})
        for site in (*drawn.values(), *run.values()):
            if site["type"] == "param" and site["name"] in params and not is_baseline_param(site["name"]):
                free[site["name"]] = biject_to(site["kwargs"].get("constraint", constraints.real))
        values = {name: jax.lax.stop_gradient(site["value"]) for name, site in latents(drawn).items()}
        again, _ = run_traces(program, tagged, key, values)
        order[:] = [name for name in latents(again) if name in resolved]
        return [unmasked(again[name]["fn"]).log_prob(values[name]).sum() for name in order]

    def entropies(params: dict, key: jax.Array) -> dict[str, jax.Array]:
        drawn, _ = run_traces(program, params, key, {})
        return {name: _entropy(drawn[name]) for name in order}

    try:
        read = outputs_read(jax.make_jaxpr(densities)(params, key))
    except TRACING_ERRORS as error:
        raise ProgramError(
            "A watched program must be one that JAX can trace, and the Python control flow of this one depends on a value; drop "
            f"config_estimators(watch=...). ({first_line(error)})"
        ) from error
    return free, {name: list(found) for name, found in zip(order, read, strict=True)}, entropies


def _entropy(site: Any) -> jax.Array:
    fn = unmasked(site["fn"])
    try:
        return -closed_form(site["name"], "entropy", {"fn": fn}, None).mean()
    except PplgradError:
        return -fn.log_prob(site["value"]).mean()
