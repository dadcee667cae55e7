"""Train a model script in NumPyro."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import ScoreFunction
from pplgrad.lab.script import Script, ScriptError
from pplgrad.lab.study import Batches, Progress, RunConfig, evaluation_steps, total_variance
from pplgrad.lab.words import estimator
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators, is_baseline_param, split_optimizer


def train(config: RunConfig, script: Script, progress: Progress) -> dict[str, Any]:
    """Train one run; return its curves, gradient variance and time per step."""
    batches = Batches(config, script)
    model, guide = script.program("numpyro", config.options, batches.train, config.seed)
    chosen = estimator(config.estimator, script.baseline_inputs)
    guide = config_estimators(guide, dict.fromkeys(script.discrete, chosen))
    elbo = TraceGrad_ELBO(config.particles)
    optimizer = split_optimizer(Adam(config.learning_rate), Adam(config.baseline_learning_rate))
    svi = SVI(model, guide, optimizer, elbo)
    fixed = {which: jnp.asarray(batches.fixed(which)) for which in ("train", "test")}
    # A batch of the stream would be lost to training, and all later ones would differ from Pyro's.
    state = svi.init(jax.random.key(config.seed), fixed["train"][: batches.size])
    # A relaxation has an objective of its own; what is compared is the bound at hard draws.
    evaluate = TraceGrad_ELBO(10, estimators=dict.fromkeys(script.discrete, ScoreFunction()))
    key = jax.random.key(config.seed + 1)

    @jax.jit
    def objective(params: dict, data: jax.Array) -> jax.Array:
        return -evaluate.loss(key, params, model, guide, data) / data.shape[0]

    @jax.jit
    def advance(state: Any, data: jax.Array) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda s, x: svi.update(s, x), state, data)

    curve: dict[str, list] = {"step": [], "train": [], "test": [], "seconds": []}
    stops = evaluation_steps(config.steps, config.points)
    per_step: list[float] = []
    total = 0.0
    for begin, stop in zip([0, *stops[:-1]], stops, strict=True):
        if stop > begin:
            data = jnp.asarray(np.stack([batches.next() for _ in range(stop - begin)]))
            start = time.perf_counter()
            state, losses = advance(state, data)
            losses.block_until_ready()
            spent = time.perf_counter() - start
            total += spent
            if begin > 0:
                per_step.append(spent / (stop - begin))
            progress(stop - begin)
        params = svi.get_params(state)
        curve["step"].append(stop)
        for which, values in fixed.items():
            curve[which].append(float(objective(params, values)))
            # Nothing can be raised under jit, and NaN parameters fail later where no message says why.
            if not np.isfinite(curve[which][-1]):
                raise ScriptError(
                    f"Training {script.path} in NumPyro with '{config.estimator}', seed {config.seed}: the {which} objective "
                    f"is {curve[which][-1]} after {stop} steps; lower --learning-rate, or check the model on this data."
                )
        curve["seconds"].append(total)
    return {
        "curve": curve,
        "gradient_variance": _gradient_variance(svi, state, elbo, model, guide, jnp.asarray(batches.next()), config),
        "milliseconds_per_step": 1e3 * float(np.median(per_step or [total / max(config.steps, 1)])),
    }


def _gradient_variance(
    svi: SVI, state: Any, elbo: Any, model: Any, guide: Any, batch: jax.Array, config: RunConfig
) -> float:
    """Return the trace of the covariance of the guide's gradient of the loss per datum, at the final parameters."""
    # Unconstrained, as in Pyro: the parameters that the optimizer moves.
    params = svi.optim.get_params(state.optim_state)
    sites = handlers.trace(
        handlers.substitute(handlers.seed(guide, jax.random.key(0)), svi.get_params(state))
    ).get_trace(batch)
    names = [n for n, site in sites.items() if site["type"] == "param" and not is_baseline_param(n)]
    rest = {n: value for n, value in params.items() if n not in names}
    mutable = state.mutable_state or {}

    def loss(ours: dict, key: jax.Array) -> jax.Array:
        return elbo.loss(key, svi.constrain_fn({**ours, **rest}) | mutable, model, guide, batch) / batch.shape[0]

    keys = jax.random.split(jax.random.key(config.seed + 2), config.gradient_draws)
    ours = {n: params[n] for n in names}
    gradient = jax.jit(jax.grad(loss))
    draws = [np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient(ours, key))]) for key in keys]
    return total_variance(np.stack(draws).astype(float))
