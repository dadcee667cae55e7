"""Draws of another program than the guide in NumPyro: an objective's proposal, and the number that an objective learns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import block, seed, substitute, trace

from pplgrad.core.objectives import Objective
from pplgrad.core.off_policy import OffPolicy
from pplgrad.engine.checks import refuse_not_proposed, refuse_other_shape, refuse_several_numbers
from pplgrad.errors import ConfigurationError


def proposed_draws(
    proposal: Callable, key: jax.Array, params: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Return what the proposal draws at each of its sites, without gradient, at the parameters of the step.

    Given the guide's key, the guide itself draws as it does without a proposal.
    """
    fixed = jax.lax.stop_gradient(dict(params))
    with block():
        found = trace(substitute(seed(proposal, key), data=fixed)).get_trace(*args, **kwargs)
    return {
        name: jax.lax.stop_gradient(site["value"])
        for name, site in found.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def refuse_unlike(proposed: Mapping[str, jax.Array], latent: Collection[str], guide: Mapping[str, Any]) -> None:
    """Refuse a latent site of the guide that the proposal has not drawn, or draws in another shape."""
    for name in latent:
        refuse_not_proposed(name, proposed)
        if name in guide:
            refuse_other_shape(name, jnp.shape(proposed[name]), guide[name]["fn"].shape())


def log_normalizer(objective: Objective, params: Mapping[str, Any]) -> jax.Array | None:
    """Return the number that an objective learns, among the parameters; None if it learns none."""
    if not isinstance(objective, OffPolicy) or objective.parameter is None:
        return None
    name = objective.parameter
    if name not in params:
        raise ConfigurationError(
            f"{objective!r} learns the number '{name}', which NumPyro's SVI keeps if the guide registers it; write numpyro.param('{name}', 0.0) in "
            "the guide, and initialise SVI with that guide."
        )
    refuse_several_numbers(objective, jnp.shape(params[name]))
    return jnp.reshape(params[name], ())
