"""Draws of another program than the guide in Pyro: an objective's proposal, and the guide's sites at its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pplgrad.core.objectives import Objective
from pplgrad.core.off_policy import OffPolicy
from pplgrad.core.program import Proposed
from pplgrad.engine.checks import refuse_not_proposed, refuse_other_shape, refuse_several_numbers
from pplgrad.errors import ProgramError


def proposed_draws(program: Proposed, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return what the proposal draws at each of its sites, without gradient.

    Its sites and parameters are hidden from what stands around, which sees the elements of minibatches alone.
    """
    if isinstance(poutine.unwrap(program.guide), Messenger):
        raise ProgramError(
            "A guide that is an effect handler draws while the model runs, and has no sites that a proposal could draw before; use an objective "
            "without a proposal, or a guide that is a function."
        )
    with torch.no_grad(), poutine.block(hide_fn=lambda msg: not site_is_subsample(msg)):
        trace = poutine.trace(program.proposal).get_trace(*args, **kwargs)
    return {
        # A tensor of its own: a proposal may give one value to several sites, or hand out a parameter.
        name: site["value"].detach().clone()
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


class AtDraws(Messenger):
    """Stands around a guide: its latent sites take the values of a proposal."""

    def __init__(self, draws: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._draws = draws

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        name = msg["name"]
        refuse_not_proposed(name, self._draws)
        msg["value"], msg["done"] = self._draws[name], True

    def _pyro_post_sample(self, msg: Any) -> None:
        # The particle plate has broadcast the distribution now.
        if msg["name"] in self._draws and not msg["is_observed"]:
            refuse_other_shape(msg["name"], msg["value"].shape, msg["fn"].shape())


def at_draws(guide: Callable, draws: Mapping[str, torch.Tensor]) -> Callable:
    """Return the guide with its latent sites at these values."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with AtDraws(draws):
            return guide(*args, **kwargs)

    return run


def log_normalizer(objective: Objective, costs: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the number that an objective learns from the param store, put there at first use; None if it learns none."""
    if not isinstance(objective, OffPolicy) or objective.parameter is None:
        return None

    def start() -> torch.Tensor:
        return torch.nn.Parameter(torch.zeros_like(costs[0].detach().sum()) if costs else torch.zeros(()))

    found = pyro.param(objective.parameter, start)
    refuse_several_numbers(objective, found.shape)
    return found.reshape(())
