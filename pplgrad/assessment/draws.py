"""What a plug-in hands over: draws of the guide with their densities, and what was observed, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Axes = tuple[str | None, ...]
"""The plate of each axis of an array, None for an axis without one."""
Values = Mapping[str, np.ndarray]
"""Values of sites by name."""


@dataclass(frozen=True)
class Latent:
    """A latent site of the guide.

    `values` are (draws, *axes), `log_q` and `log_p` (draws, *element_axes): the guide's and the model's log density of each element, a row
    of independent elements being taken apart where the distribution is one. `log_p` is None where the model's elements are not those of the guide.
    `support` has the values of one element, (K, *event), where guide and model have the same ones. `mask` says which elements count.
    """

    name: str
    values: np.ndarray
    axes: Axes
    log_q: np.ndarray
    log_p: np.ndarray | None
    element_axes: Axes
    discrete: bool
    support: np.ndarray | None = None
    mask: np.ndarray | None = None
    auxiliary: bool = False
    point: bool = False
    """Whether the guide's distribution is a point mass."""


@dataclass(frozen=True)
class Observed:
    """An observed site: its value, which of its elements a mask leaves, and its log density (draws, *batch), None where it is summed with others."""

    name: str
    value: np.ndarray
    axes: Axes
    log_density: np.ndarray | None
    density_axes: Axes
    discrete: bool
    support: np.ndarray | None = None
    mask: np.ndarray | None = None
    """Which elements of the value count, in the shape of the value; None for all."""


@dataclass(frozen=True)
class Draws:
    """Independent draws of the guide.

    `log_weights` are log p − log q of each element, (draws, *plates). `beside` is the sum of the log densities that no draw changes and
    that stand outside of the plates. `log_p` and `log_q` are those of the whole program, (draws,).
    """

    log_weights: np.ndarray
    plates: tuple[tuple[str, int], ...]
    beside: float
    log_p: np.ndarray
    log_q: np.ndarray
    latents: Mapping[str, Latent]
    observed: Mapping[str, Observed]
    summed: tuple[str, ...] = field(default_factory=tuple)

    @property
    def made_by_model(self) -> bool:
        """Whether the model draws all latents, each with a density in the guide, and sums none out: then its draws have weights too."""
        return not self.summed and not any(x.auxiliary or x.point for x in self.latents.values())

    @property
    def count(self) -> int:
        """The number of draws."""
        return len(self.log_weights)

    @property
    def flat(self) -> np.ndarray:
        """The log weights as (draws, elements)."""
        return self.log_weights.reshape(self.count, -1)


def dims_of(axes: Axes, name: str) -> list[str]:
    """Return a name for each axis: its plate's, or the site's with a number.

    >>> dims_of(("data", None), "z")
    ['data', 'z_dim_0']
    """
    free = iter(range(len(axes)))
    return [f"{name}_dim_{next(free)}" if plate is None else plate for plate in axes]
