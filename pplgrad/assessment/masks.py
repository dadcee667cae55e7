"""Masks under which importance weights are those of a posterior."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pplgrad.errors import ProgramError


@dataclass(frozen=True)
class Masked:
    """A log density of model or guide: the latent sites that it reads, and which of its elements count (None: all)."""

    name: str
    side: str
    reads: Collection[str]
    mask: np.ndarray | None


def mask_of(counted: np.ndarray, bare: np.ndarray) -> np.ndarray | None:
    """Return which elements of a log density count, from the density as it counts and without its mask; None for all.

    >>> mask_of(np.array([0.0, -1.0]), np.array([-2.0, -1.0])).tolist()
    [False, True]
    """
    counted, bare = np.broadcast_arrays(counted, bare)
    kept = ~((counted == 0) & (bare != 0))
    return None if kept.all() else kept


def spread(mask: np.ndarray | None, shape: tuple[int, ...], batch: int) -> np.ndarray | None:
    """Return a mask of the first `batch` axes of a shape as one of the whole shape; None for all.

    >>> spread(np.array([True, False]), (2, 3), 1).tolist()
    [[True, True, True], [False, False, False]]
    """
    if mask is None:
        return None
    return np.broadcast_to(mask.reshape(*mask.shape, *(1,) * (len(shape) - batch)), shape)


def refuse_masks(latents: Mapping[str, np.ndarray | None], densities: Sequence[Masked]) -> None:
    """Refuse masks that leave a latent's density out of one program alone, or out while something that counts reads the latent.

    A latent that is masked in model and guide, like everything that reads it, is not there: the weights are those of the others. With its
    density in one of them alone, or read by a density that counts, weights have another mean than the evidence.
    """
    for density in densities:
        own = latents.get(density.name)
        if density.name in latents and not same_mask(own, density.mask):
            raise ProgramError(
                f"Site '{density.name}' is masked differently in model and guide, so that its draws have no importance weights; put the same mask "
                "around the site in both."
            )
        for name in density.reads:
            mask = latents.get(name)
            if mask is not None and name != density.name and not _covers(density.mask, mask):
                raise ProgramError(
                    f"Site '{name}' is masked where site '{density.name}' of the {density.side} reads it and is not masked, so that draws have no "
                    f"importance weights; mask '{density.name}' there too, or take the mask off '{name}'."
                )


def same_mask(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    """Return whether two masks leave the same elements."""
    if first is None or second is None:
        return first is second
    try:
        return bool(np.equal(*np.broadcast_arrays(first, second)).all())
    except ValueError:
        return False


def _covers(outer: np.ndarray | None, inner: np.ndarray) -> bool:
    """Return whether a density leaves out all elements that the mask `inner` leaves out."""
    if outer is None:
        return False
    try:
        return not (outer & ~inner).any()
    except ValueError:
        return False
