"""Many draws of a gradient in one step: where each element of a plate has parameters of its own, their rows are draws."""

from collections.abc import Callable
from typing import Any

import numpy as np


def gradient(
    backend: str,
    program: tuple[Callable, Callable],
    data: np.ndarray,
    seed: int,
    *,
    estimators: dict | None = None,
    particles: int = 1,
    objective: Any,
) -> dict[str, np.ndarray]:
    """Return one draw of the gradient of the objective (to be maximised), by parameter, at its first values."""
    draw = {"pyro": _in_pyro, "numpyro": _in_numpyro}[backend]
    return draw(program, np.asarray(data), seed, dict(estimators=estimators, objective=objective), particles)


def _in_pyro(program, data, seed, choice, particles):
    import pyro
    import torch

    from pplgrad.pyro import TraceGrad_ELBO

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x = torch.as_tensor(data, dtype=torch.get_default_dtype())
    TraceGrad_ELBO(particles, vectorize_particles=particles > 1, **choice).loss_and_grads(*program, x)
    store = pyro.get_param_store()
    return {name: -value.grad.numpy() for name, value in store._params.items()}


def _in_numpyro(program, data, seed, choice, particles):
    import jax
    import jax.numpy as jnp
    from numpyro import handlers

    from pplgrad.numpyro import TraceGrad_ELBO

    model, guide = program
    x, key = jnp.asarray(data, float), jax.random.key(seed)
    both = [handlers.trace(handlers.seed(part, key)).get_trace(x) for part in (model, guide)]
    params = {name: site["value"] for sites in both for name, site in sites.items() if site["type"] == "param"}
    elbo = TraceGrad_ELBO(particles, **choice)
    found = jax.jit(jax.grad(lambda p: elbo.loss(key, p, model, guide, x)))(params)
    return {name: -np.asarray(value) for name, value in found.items()}
