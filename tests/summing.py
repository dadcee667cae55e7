"""Programs with sites that only the model has: what both libraries' share."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pplgrad.testing.programs import Case

SUM = {"enumerate": "parallel"}
"""What asks for a sum. A host may write into what a site is given: each site gets a copy."""


@dataclass
class Program:
    """A guide, a model that is summed by the host, the same summed by hand, and what there is to know of the guide's draws."""

    case: Case
    by_hand: Case
    summed: Callable
    guide: Callable


def program(summed, by_hand, guide, made):
    """Return a program of which each model is a case of its own."""
    return Program(
        replace(made, build=lambda host: (summed, guide)),
        replace(made, build=lambda host: (by_hand, guide)),
        summed,
        guide,
    )


def case(latents, params, subsamples=None):
    return Case(
        "marginal", {name: np.asarray(x, float) for name, x in params.items()}, latents, None, {}, subsamples or {}
    )
