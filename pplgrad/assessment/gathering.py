"""From what a plug-in sees in one run and notes in many, to the draws of an assessment."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pplgrad.assessment.draws import Axes, Draws, Latent, Observed
from pplgrad.assessment.masks import Masked, refuse_masks
from pplgrad.core.plates import Plate
from pplgrad.engine.layout import Layout
from pplgrad.errors import ProgramError, listed


@dataclass(frozen=True)
class LatentSite:
    """What does not change from draw to draw at a latent site of the guide; axes are those of its value and of its elements."""

    axes: Axes
    element_axes: Axes
    discrete: bool
    support: np.ndarray | None
    mask: np.ndarray | None
    auxiliary: bool
    point: bool


@dataclass(frozen=True)
class ObservedSite:
    """What does not change from draw to draw at an observed site of the model."""

    value: np.ndarray
    axes: Axes
    density_axes: Axes
    discrete: bool
    support: np.ndarray | None
    mask: np.ndarray | None


@dataclass(frozen=True)
class Table:
    """What changes from draw to draw, each array (draws, ...): weights, densities of the whole, and by site."""

    log_weights: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    values: Mapping[str, np.ndarray]
    element_log_q: Mapping[str, np.ndarray]
    element_log_p: Mapping[str, np.ndarray]
    observed_log_p: Mapping[str, np.ndarray]


def gathered(
    table: Table,
    plates: Sequence[Plate],
    latents: Mapping[str, LatentSite],
    observed: Mapping[str, ObservedSite],
    summed: tuple[str, ...],
) -> Draws:
    """Return the draws of an assessment."""
    ordered = sorted(plates, key=lambda plate: plate.dim)
    logs = table.log_weights.reshape(len(table.log_weights), *(plate.size for plate in ordered))
    # Rounding differs from draw to draw; what is beside the weights does not.
    beside = table.log_p - table.log_q - logs.reshape(len(logs), -1).sum(1)
    finite = beside[np.isfinite(beside)]
    return Draws(
        log_weights=logs,
        plates=tuple((plate.name, plate.size) for plate in ordered),
        beside=_rounded(finite, table.log_p),
        log_p=table.log_p,
        log_q=table.log_q,
        latents={
            name: Latent(
                name,
                table.values[name],
                site.axes,
                table.element_log_q[name],
                table.element_log_p.get(name),
                site.element_axes,
                site.discrete,
                site.support,
                site.mask,
                site.auxiliary,
                site.point,
            )
            for name, site in latents.items()
        },
        observed={
            name: Observed(
                name,
                site.value,
                site.axes,
                table.observed_log_p.get(name),
                site.density_axes,
                site.discrete,
                site.support,
                site.mask,
            )
            for name, site in observed.items()
        },
        summed=summed,
    )


def _rounded(beside: np.ndarray, log_p: np.ndarray) -> float:
    """Return the constant beside the weights, 0 where rounding alone is left."""
    if not len(beside):
        return 0.0
    found = float(np.median(beside))
    size = np.abs(log_p[np.isfinite(log_p)]).max(initial=1.0)
    return 0.0 if abs(found) <= 1e-6 * size else found


def shared_support(guide: np.ndarray | None, model: np.ndarray | None) -> np.ndarray | None:
    """Return the values of an element if guide and model give it the same ones, else None."""
    if guide is None or model is None or guide.shape != model.shape or not np.array_equal(guide, model):
        return None
    return guide


def is_drawn_alone(site: Any, drawn: Container[str]) -> bool:
    """Return whether the model draws a site (a host's record of it) that is not among those that the guide has drawn."""
    return not (site["is_observed"] or site["name"] in drawn or site["infer"].get("enumerate") == "parallel")


def refuse_without_latents(latents: Container[str]) -> None:
    """Refuse a guide that draws nothing."""
    if not latents:
        raise ProgramError(
            "The guide draws no latent site, so that there is no fit to assess; draw the model's latents in it."
        )


def refuse_drawn_by_model(names: Sequence[str]) -> None:
    """Refuse a site that the model alone draws: its density would count without that of its draw."""
    if names:
        raise ProgramError(
            f"Site '{sorted(names)[0]}' is drawn by the model alone, so that its draws have no importance weights; draw it in the guide as well, or "
            "sum it out if it is discrete (infer={'enumerate': 'parallel'})."
        )


def refuse_subsampled(plates: Mapping[str, tuple[int, int]]) -> None:
    """Refuse plates of which a part is drawn; `plates` are their numbers of drawn and of all elements."""
    for name, (size, full) in plates.items():
        if size < full:
            raise ProgramError(
                f"Plate '{name}' draws {size:,} of its {full:,} elements, so that the weights are those of a minibatch; call assess_fit with all data, "
                "and without subsample_size in the plate."
            )


def refuse_scaled(names: Sequence[str]) -> None:
    """Refuse scaled sites, whose densities are none of a posterior."""
    if names:
        raise ProgramError(
            f"Site '{names[0]}' is scaled, so that its log density is none of the posterior and draws have no importance weights; take the scale "
            "off for assess_fit."
        )


def refuse_other_sites(names: Sequence[str]) -> None:
    """Refuse a program whose sites are others from draw to draw."""
    if names:
        raise ProgramError(
            f"The sites of the program differ from draw to draw ({listed(sorted(names))}), so that draws cannot be put together; give every draw the same "
            "sites, such as by a mask."
        )


def refuse_masked(layout: Layout, masks: Mapping[tuple[str, str], np.ndarray | None]) -> None:
    """Refuse masks under which weights mean nothing; `masks` are those of each density by side ("model" or "guide") and name."""
    latents = {site.name: masks["guide", site.name] for site in layout.sites}
    densities = []
    for cost in layout.costs:
        side = "model" if cost.sign > 0 else "guide"
        densities.append(Masked(cost.name, side, tuple(cost.reads), masks.get((side, cost.name))))
    auxiliary = {site.name for site in layout.sites} - {cost.name for cost in layout.costs if cost.sign > 0}
    refuse_masks(latents, [d for d in densities if d.name not in auxiliary])


def refuse_moving_mask(name: str) -> None:
    """Refuse a mask that is another one from draw to draw: what is there then depends on the draws, and so does what a weight is made of."""
    raise ProgramError(
        f"The mask of site '{name}' depends on the draws, so that draws have no importance weights; take the mask off in model and guide (where the "
        "site has no effect the guide may draw it from the prior)."
    )


def named_axes(ndim: int, batch: int, frames: Sequence[tuple[str, int]]) -> Axes:
    """Return the plate of each axis of an array whose first `batch` axes are batch axes; `frames` are plates and their negative dimensions.

    >>> named_axes(3, 2, [("data", -1)])
    (None, 'data', None)
    """
    axes: list[str | None] = [None] * ndim
    for name, dim in frames:
        if batch + dim >= 0:
            axes[batch + dim] = name
    return tuple(axes)
