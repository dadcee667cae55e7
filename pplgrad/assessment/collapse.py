"""Local collapse: elements of latents that say nothing, or one thing only, for all data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pplgrad.assessment.draws import Draws, Latent

_SHARE = 0.01
"""Entropies nearer than this part of their maximum to 0 or to it are there."""
_NATS = 0.01
"""A divergence below is none."""


@dataclass(frozen=True)
class Collapse:
    """How many elements of a latent site are the same for all data, a share of its elements within one datum.

    Args:
        site: the latent site.
        elements: how many elements it has within one datum.
        entropy: the median entropy of the guide's elements, as a part of log K; NaN where values are not finite.
        decided: the share of elements whose entropy is 0 (below 1% of log K) for all data; NaN where values are not finite.
        undecided: the share of elements whose entropy is the maximum (above 99% of log K) for all data.
        prior: the share of elements whose guide is the model's prior (a divergence below 0.01 nats) for all data; NaN where the elements
            of guide and model do not correspond.
    """

    site: str
    elements: int
    entropy: float
    decided: float
    undecided: float
    prior: float


def collapses(draws: Draws) -> tuple[Collapse, ...]:
    """Return the collapse of each latent site that has a density of its own."""
    return tuple(_collapse(x, draws) for x in draws.latents.values() if not x.point and not x.auxiliary)


def collapsed(found: Mapping[str, Collapse]) -> list[str]:
    """Return the names of sites of which an element says the same for all data."""
    return [name for name, x in found.items() if max(x.decided, x.undecided, x.prior) > 0]


def _collapse(latent: Latent, draws: Draws) -> Collapse:
    # Where the whole program has one weight, the elements of every plate are data.
    plates = {name for name, _ in draws.plates} or set(latent.element_axes) - {None}
    data = tuple(i for i, axis in enumerate(latent.element_axes) if axis in plates)
    counted = np.broadcast_to(True if latent.mask is None else latent.mask, latent.log_q.shape[1:])

    def everywhere(holds: np.ndarray) -> float:
        # What a mask leaves out says nothing either way.
        kept = counted.any(data)
        return float(np.mean((holds | ~counted).all(data)[kept])) if kept.any() else math.nan

    entropy = decided = undecided = prior = math.nan
    if latent.support is not None and len(latent.support) > 1:
        # The mean over draws may exceed the maximum by chance.
        relative = np.minimum(-latent.log_q.mean(0) / math.log(len(latent.support)), 1.0)
        entropy = float(np.median(relative[counted])) if counted.any() else math.nan
        decided, undecided = everywhere(relative < _SHARE), everywhere(relative > 1 - _SHARE)
    if latent.log_p is not None:
        prior = everywhere((latent.log_q - latent.log_p).mean(0) < _NATS)
    elements = math.prod(n for i, n in enumerate(latent.log_q.shape[1:]) if i not in data)
    return Collapse(latent.name, elements, entropy, decided, undecided, prior)
