"""The sleep phase of wake-sleep in NumPyro: the guide at latents and data that the model drew."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace, uncondition

from pplgrad.core.objectives import ReweightedWakeSleep
from pplgrad.core.program import Program
from pplgrad.numpyro._tracing.handlers import OffZero


def sleep_phase(
    objective: ReweightedWakeSleep,
    key: jax.Array,
    params: dict,
    program: Program,
) -> jax.Array:
    """Return (1 − insomnia) times the mean log q of the model's draws, with its gradient to the guide's parameters."""

    model, guide, args, kwargs = program

    def one(key: jax.Array) -> jax.Array:
        model_key, guide_key = jax.random.split(key)
        fixed = jax.lax.stop_gradient(params)
        drawn = trace(uncondition(substitute(seed(model, model_key), data=fixed))).get_trace(*args, **kwargs)
        samples = {name: site for name, site in drawn.items() if site["type"] == "sample"}
        data = {
            n: jax.lax.stop_gradient(site["value"]) for n, site in samples.items() if "was_observed" in site["infer"]
        }
        assert objective.dream is not None
        dreamt = objective.dream(data, *args, **kwargs)
        kinds = ("sample", "plate")
        kept = {n: site["value"] for n, site in drawn.items() if site["type"] in kinds and n not in data}
        # Not by `replay`, which would put the model's `infer` in the place of the guide's.
        run = substitute(seed(guide, guide_key), data={**params, **jax.lax.stop_gradient(kept)})
        total: Any = jnp.zeros(())
        with OffZero():
            sites = trace(run).get_trace(*dreamt)
        for name, site in sites.items():
            if site["type"] == "sample" and name in kept and not site["is_observed"]:
                scale = 1.0 if site["scale"] is None else site["scale"]
                total = total + jnp.sum(site["fn"].log_prob(site["value"]) * scale)
        return total

    return (1 - objective.insomnia) * jax.vmap(one)(jax.random.split(key, objective.dreams)).mean()
