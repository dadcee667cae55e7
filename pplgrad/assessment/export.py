"""Draws for ArviZ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pplgrad.assessment.draws import Axes, Draws, Values, dims_of
from pplgrad.assessment.weights import missing

if TYPE_CHECKING:
    from xarray import DataTree


def data_tree(draws: Draws, replicates: Values) -> DataTree:
    """Return draws of the guide, what they weigh, replicated data and observed data, with dimensions named by plates."""
    try:
        import arviz_base
    except ImportError as error:
        raise missing(error) from error
    dims: dict[str, list[str]] = {"log_weight": [name for name, _ in draws.plates]}
    coords: dict[str, Any] = {}

    def named(name: str, x: np.ndarray, axes: Axes) -> None:
        dims[name] = dims_of(axes, name)
        for dim, size in zip(dims[name], x.shape, strict=True):
            coords[dim] = np.arange(size)

    for name, latent in draws.latents.items():
        named(name, latent.values[0], latent.axes)
    likelihood = {name: site.log_density for name, site in draws.observed.items() if site.log_density is not None}
    for name, site in draws.observed.items():
        named(name, site.value, site.axes)
    for dim, size in draws.plates:
        coords[dim] = np.arange(size)
    stats = {"log_p": draws.log_p, "log_q": draws.log_q, "log_weight": draws.log_weights}
    groups = {
        "posterior": {name: latent.values for name, latent in draws.latents.items()},
        "posterior_predictive": dict(replicates),
        "sample_stats": stats,
    }
    # A chain is what ArviZ calls independent draws in a row.
    data = {group: {name: x[None] for name, x in arrays.items()} for group, arrays in groups.items() if arrays}
    data["observed_data"] = {name: site.value for name, site in draws.observed.items()}
    tree = arviz_base.from_dict(data, dims=dims, coords=coords)
    # The log density of a site has the axes of its batch, where its value has those of the event too.
    shorter = {name: dims_of(draws.observed[name].density_axes, name) for name in likelihood}
    if not likelihood:
        return tree
    more = arviz_base.from_dict(
        {"log_likelihood": {name: x[None] for name, x in likelihood.items()}}, dims=shorter, coords=coords
    )
    tree["log_likelihood"] = more["log_likelihood"]
    return tree
