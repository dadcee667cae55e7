"""Sites that are summed out, compared with the plain way while a step is watched: the model at one value of each.

All values of a summed site lie along a dimension to the left of all plates. That is right for a model that broadcasts, and computes densities
of no value at all in one that sums, sorts or reorders a whole value (`z.sum()` where a plate's dimension was meant).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pplgrad.core.program import Program
from pplgrad.engine.marginal_sites import mixed_values
from pplgrad.pyro._rerun.comparison import agree
from pplgrad.pyro._rerun.still_noise import StillNoise
from pplgrad.pyro._tracing.marginal_sites import (
    Component,
    MarginalMessenger,
    components,
    densities_of,
    is_marginal,
    sum_out,
)
from pplgrad.pyro._tracing.particle_trace import Traces, samples_of
from pplgrad.pyro._tracing.relaxations import ExtendedModelMessenger

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
    """Refuse a model of which a density at all values of the summed sites is not the one that it has at each of them.

    Both are computed again with what is random outside of the sites held still: it may be drawn for each of the values.
    """
    names = frozenset(site["name"] for part in components(traces.model) for site in part.sites if is_marginal(site))
    if not names:
        return
    with torch.random.fork_rng(), torch.no_grad(), StillNoise():
        # The model's own trace has its draws and minibatches too, beside the guide's.
        at_all = _trace(MarginalMessenger(traces.guide.nodes, traces.nesting)(program.model), traces, program)
        found = components(sum_out(at_all))
        # What is in no component reads no summed site, or mixes the values of one (`z.sum()` has no dimension of z's).
        inside = {site["name"] for part in found for site in part.sites}
        rest = tuple(site for name, site in samples_of(at_all) if name not in inside)
        parts = [*((part.sites, part.dims) for part in found), (rest, frozenset())]
        every = [densities_of(sites) for sites, _ in parts]
        summed = [site for part in found for site in part.sites if is_marginal(site)]
        for number in range(min(_AT_MOST, max(_sizes(found)))):
            plain = _trace(_OneValue(names, number)(program.model), traces, program)
            for (sites, dims), densities in zip(parts, every, strict=True):
                wrong = _mixed(sites, dims, densities, plain, number)
                if wrong is not None:
                    first = next(filter(is_marginal, sites), summed[0])
                    raise mixed_values(wrong, first["name"], first["infer"]["_enumerate_dim"])


def _trace(model: Callable, traces: Traces, program: Program) -> Any:
    """Return the trace of a model with the draws of another run, some of which may be relaxed."""
    with ExtendedModelMessenger.of(traces.estimators):
        return poutine.trace(poutine.replay(model, trace=traces.model)).get_trace(*program.args, **program.kwargs)


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
    alone = densities_of([{**plain.nodes[site["name"]], "infer": site["infer"]} for site in sites])
    for site, x, own in zip(sites, densities, alone, strict=True):
        names = site["infer"].get("_dim_to_symbol", {})
        for dim in range(-x.dim(), 0):
            if names.get(dim) in dims:
                x = x.narrow(dim, number % x.shape[dim], 1)
        if not agree(x, own):
            return str(site["name"])
    return None
