"""Sites that are summed out, compared with the plain way while a step is watched: the model at one value of each.

All values of a summed site lie along a dimension to the left of all plates. That is right for a model that broadcasts, and computes densities
of no value at all in one that sums, sorts or reorders a whole value (`z.sum()` where a plate's dimension was meant).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pplgrad.core.program import Program
from pplgrad.engine.marginal_sites import mixed_values
from pplgrad.pyro._rerun.comparison import agree
from pplgrad.pyro._tracing.marginal_sites import Component, InComponent, Marginal, components, densities_of, is_marginal
from pplgrad.pyro._tracing.particle_trace import Traces

_AT_MOST = 8
"""Values of each site that are looked at; all sites have theirs at once."""


class _OneValue(Messenger):
    """Gives the summed sites the value of one number, or of what is left of it by the number of their values."""

    def __init__(self, names: frozenset[str], number: int) -> None:
        super().__init__()
        self._names, self._number = names, number

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._names and not msg["done"]:
            fn = msg["fn"]
            values = fn.enumerate_support(expand=False)
            value = values[self._number % len(values)]
            msg["value"], msg["done"] = value.expand(fn.batch_shape + fn.event_shape), True


def refuse_mixed_values(traces: Traces, program: Program) -> None:
    """Refuse a model of which a density at all values of the summed sites is not the one that it has at each of them."""
    found = components(traces.model)
    if not found or traces.hidden_draws:
        return  # What is drawn outside of sites would not be the same again.
    summed = [site for component in found for site in component.sites if is_marginal(site)]
    names = frozenset(site["name"] for site in summed)
    # What is in no component reads no summed site, or mixes the values of one (`z.sum()` has no dimension of z's).
    parts = [*((part.sites, part.dims) for part in found), (tuple(_other_sites(traces.model)), frozenset())]
    with torch.no_grad():
        every = [densities_of(sites) for sites, _ in parts]
    for number in range(min(_AT_MOST, max(_sizes(found)))):
        with torch.random.fork_rng(), torch.no_grad():
            # The model's own trace has its draws and minibatches too, beside the guide's.
            replayed = poutine.replay(_OneValue(names, number)(program.model), trace=traces.model)
            plain = poutine.trace(replayed).get_trace(*program.args, **program.kwargs)
        for (sites, dims), densities in zip(parts, every, strict=True):
            wrong = _mixed(sites, dims, densities, plain, number)
            if wrong is not None:
                first = next(filter(is_marginal, sites), summed[0])
                raise mixed_values(wrong, first["name"], first["infer"]["_enumerate_dim"])


def _other_sites(trace: Any) -> Iterator[Any]:
    """Yield the sites of a model that are not summed together, without draws whose densities are."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not (
            site_is_subsample(site) or isinstance(site["fn"], (Marginal, InComponent))
        ):
            yield site


def _sizes(found: list[Component]) -> Iterator[int]:
    """Yield the number of values of each summed site."""
    for component in found:
        for site in filter(is_marginal, component.sites):
            yield site["value"].shape[site["infer"]["_enumerate_dim"] - site["fn"].event_dim]


def _mixed(
    sites: Sequence[Any], dims: frozenset[str], densities: Sequence[torch.Tensor], plain: Any, number: int
) -> str | None:
    """Return the site of which a density is another at one value of the summed sites by itself; `dims` are the names of their dimensions."""
    missing = [site["name"] for site in sites if site["name"] not in plain.nodes]
    if missing:
        return str(missing[0])
    with torch.no_grad():
        alone = densities_of([{**plain.nodes[site["name"]], "infer": site["infer"]} for site in sites])
    for site, x, own in zip(sites, densities, alone, strict=True):
        names = site["infer"].get("_dim_to_symbol", {})
        for dim in range(-x.dim(), 0):
            if names.get(dim) in dims:
                x = x.narrow(dim, number % x.shape[dim], 1)
        if not agree(x, own):
            return str(site["name"])
    return None
