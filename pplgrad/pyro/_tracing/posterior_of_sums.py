"""The posterior of summed sites, given what a component has beside them: marginals, joint samples, the most probable joint value.

A component's densities are Π_f f(z), in plates and chains. The marginal of a summed site is the derivative of log Σ_z Π_f f(z) with respect to a
zero added to its log density. A joint sample goes back through the messages of the sum (forward filter, backward sample), the most probable value
back through those of the maximum (Viterbi). A scale stands outside of the logarithm, as in the objective, and so has no part in a posterior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.rings import LogRing, MapRing, Ring, SampleRing

from pplgrad.engine.marginal_sites import NEVER, no_posterior
from pplgrad.pyro._compat import ask_for_indices, indices_back, written_name
from pplgrad.pyro._distributions import mask_of, unmasked
from pplgrad.pyro._tracing.marginal_sites import Component, is_marginal, pack


@dataclass(frozen=True)
class _Summed:
    """A summed site of a component, by the names of its dimensions."""

    name: str
    number: int
    """Which of the component's sites it is."""
    own: str
    """The name of the dimension along which its values are."""
    plates: Mapping[str, int]
    """The dimensions of its plates."""
    batch: tuple[int, ...]
    """The shape of one value, without the dimensions of an event."""
    support: torch.Tensor
    """Its values, along the first axis."""
    mask: Any

    @classmethod
    def of(cls, number: int, site: Mapping[str, Any]) -> _Summed:
        names, frames = site["infer"]["_dim_to_symbol"], [x for x in site["cond_indep_stack"] if x.vectorized]
        batch = [1] * max((-frame.dim for frame in frames), default=0)
        for frame in frames:
            batch[frame.dim] = int(frame.size)
        fn = unmasked(site["fn"])
        support = fn.enumerate_support(expand=False)
        support = support.reshape(len(support), *fn.event_shape)
        plates = {names[frame.dim]: frame.dim for frame in frames}
        mask = _both(site["mask"], mask_of(site["fn"]))
        return cls(site["name"], number, names[site["infer"]["_enumerate_dim"]], plates, tuple(batch), support, mask)

    def laid_out(self, x: torch.Tensor, dims: str) -> torch.Tensor:
        """Return numbers in the site's plates, and along its values last if they are among the dimensions, all named by `dims`."""
        order = sorted(range(len(dims)), key=lambda i: self.plates.get(dims[i], 0))
        x = x.permute(order)
        shape = [1] * len(self.batch)
        for i, size in zip(order, x.shape, strict=True):
            if dims[i] in self.plates:
                shape[self.plates[dims[i]]] = size
        values = [x.shape[-1]] if self.own in dims else []
        return x.reshape([*shape, *values]).expand([*self.batch, *values])


class _Densities:
    """The log densities of a component's sites, packed, and nothing in them infinite."""

    def __init__(self, component: Component) -> None:
        self._component = component
        self.terms = [
            pack(site, x.detach().clamp(min=NEVER)[...])
            for site, x in zip(component.sites, component.log_probs(), strict=True)
        ]
        self.dims: list[str] = [x._pyro_dims for x in self.terms]  # type: ignore[attr-defined]
        self.sizes = {
            d: n for dims, x in zip(self.dims, self.terms, strict=True) for d, n in zip(dims, x.shape, strict=True)
        }
        # A plate of one element is no dimension of a packed density.
        self._ordinals = [ordinal.intersection(self.sizes) for ordinal in component.ordinals]
        self.summed = [_Summed.of(i, site) for i, site in enumerate(component.sites) if is_marginal(site)]

    def contracted(self, terms: list[torch.Tensor], ring: Ring) -> torch.Tensor:
        """Return what a ring makes of densities, one for each site."""
        for term, dims in zip(terms, self.dims, strict=True):
            term._pyro_dims = dims  # type: ignore[attr-defined]
        found = self._component.contracted(terms, self._ordinals, ring)
        if not (torch.isfinite(found) & (found > NEVER / 2)).all():
            names = [site["name"] for site in self._component.sites if not is_marginal(site)]
            raise no_posterior([x.name for x in self.summed], names)
        return found

    def along(self, name: _Summed, plain: torch.Tensor) -> torch.Tensor:
        """Return numbers in a site's plates (or in none) as they broadcast with its packed density."""
        dims = self.dims[name.number]
        while plain.dim() < len(name.batch):
            plain = plain[None]
        kept = [d for d in dims if d in name.plates]
        plain = plain.expand(name.batch).permute(_axes(name, kept)).reshape([self.sizes[d] for d in kept])
        return plain.reshape([self.sizes[d] if d in name.plates else 1 for d in dims])


def _axes(site: _Summed, kept: list[str]) -> list[int]:
    """Return the axes of the plates `kept`, in this order, and then all others, which have one element."""
    first = [len(site.batch) + site.plates[d] for d in kept]
    return first + [axis for axis in range(len(site.batch)) if axis not in first]


def _both(x: Any, y: Any) -> Any:
    return y if x is None else x if y is None else x & y


def marginals(component: Component) -> dict[str, torch.Tensor]:
    """Return the probability of each value of each summed site, along a last axis."""
    densities = _Densities(component)
    with torch.enable_grad():
        terms = [x.requires_grad_() for x in densities.terms]
        evidence = densities.contracted(terms, LogRing()).sum()
        gradients = torch.autograd.grad(evidence, [terms[site.number] for site in densities.summed])
    found = {}
    for site, x in zip(densities.summed, gradients, strict=True):
        dims = densities.dims[site.number]
        others = [i for i, d in enumerate(dims) if d != site.own and d not in site.plates]
        x = x.sum(others) if others else x
        kept = "".join(d for i, d in enumerate(dims) if i not in others)
        found[site.name] = site.laid_out(x, kept) if site.own in kept else site.laid_out(x, kept)[..., None]
    return found


def samples(component: Component) -> dict[str, torch.Tensor]:
    """Return one joint sample of the summed sites."""
    densities = _Densities(component)
    return _values(densities, _indices(densities, densities.terms, SampleRing))


def most_probable(component: Component) -> dict[str, torch.Tensor]:
    """Return the most probable joint value of the summed sites.

    An element that is masked, and that no element reads which counts, has no part in it: one value is as good as another to all that is
    left, and Σ p(z | parents) = 1. It gets the most probable value given the others.
    """
    densities = _Densities(component)
    counts = _counting(densities)
    terms = list(densities.terms)
    for site in densities.summed:
        if not counts[site.name].all():
            shown = densities.along(site, counts[site.name])
            terms[site.number] = torch.where(shown, terms[site.number], torch.zeros_like(terms[site.number]))
    chosen = _indices(densities, terms, MapRing)
    if all(x.all() for x in counts.values()):
        return _values(densities, chosen)
    terms = [x[...] for x in densities.terms]
    for site in densities.summed:
        dims = densities.dims[site.number]
        if site.own in dims:
            index = torch.arange(densities.sizes[site.own], device=terms[site.number].device).reshape(
                [-1 if d == site.own else 1 for d in dims]
            )
            other = densities.along(site, counts[site.name]) & (index != densities.along(site, chosen[site.name]))
            terms[site.number] = torch.where(other, torch.full_like(terms[site.number], NEVER), terms[site.number])
    return _values(densities, _indices(densities, terms, MapRing))


def with_known(found: dict[str, torch.Tensor], component: Component, trace: Any, kind: str) -> dict[str, torch.Tensor]:
    """Return what was found, with what is known in its place at sites with `obs_mask`, by the names that these have in the program.

    The host makes a site of what is observed, one of what is not, and a value of both: where that is the same at all values of the
    summed site, it is known.
    """
    nodes = {**trace.nodes, **{site["name"]: site for site in component.sites}}
    result = dict(found)
    for site in filter(is_marginal, component.sites):
        name = written_name(site["name"], nodes)
        if name is None or not nodes[name]["infer"].get("_deterministic"):
            continue
        fn, value, x = unmasked(site["fn"]), nodes[name]["value"], result.pop(site["name"])
        events = len(fn.event_shape)
        axis = value.dim() + site["infer"]["_enumerate_dim"] - events
        first = value.narrow(axis, 0, 1) if axis >= 0 else value
        same = (value == first).all(axis, keepdim=True) if axis >= 0 else torch.ones_like(value, dtype=torch.bool)
        batch = x.dim() - (1 if kind == "marginals" else events)
        known = same.flatten(same.dim() - events).all(-1) if events else same
        known, first = (y.reshape(y.shape[max(y.dim() - n, 0) :]) for y, n in ((known, batch), (first, batch + events)))
        if kind == "marginals":
            support = fn.enumerate_support(expand=False)
            support = support.reshape(len(support), *(1,) * (first.dim() - events), *fn.event_shape)
            hits = (support == first).flatten(first.dim() - events + 1).all(-1) if events else support == first
            first, events = hits.movedim(0, -1).to(x.dtype), 1
        result[name] = torch.where(known.reshape(*known.shape, *(1,) * events), first, x)
    return result


def _counting(densities: _Densities) -> dict[str, torch.Tensor]:
    """Return which elements of each summed site count: those that are not masked, and those that one that counts depends on."""
    counts: dict[str, torch.Tensor] = {}
    for site in reversed(densities.summed):
        mask = True if site.mask is None else site.mask
        own = torch.as_tensor(mask, dtype=torch.bool)
        while own.dim() > len(site.batch):
            own = own.any(0)  # A mask that is computed from other summed sites.
        found = own.expand(site.batch)
        if not found.all():
            for number, dims in enumerate(densities.dims):
                if site.own in dims and number != site.number:
                    found = found | _reads(densities, number, site, counts)
        counts[site.name] = found
    return counts


def _reads(densities: _Densities, number: int, site: _Summed, counts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return at which elements of a summed site a density depends on its value, and counts."""
    dims, x = densities.dims[number], densities.terms[number]
    axis = dims.index(site.own)
    varies = x.amax(axis, keepdim=True) != x.amin(axis, keepdim=True)
    reader = next((other for other in densities.summed if other.number == number), None)
    if reader is not None:
        varies = varies & densities.along(reader, counts[reader.name])
    others = [i for i, d in enumerate(dims) if d not in site.plates]
    for i in reversed(others):
        varies = varies.any(i)
    return site.laid_out(varies, "".join(d for i, d in enumerate(dims) if i not in others))


def _indices(densities: _Densities, terms: list[torch.Tensor], ring: type[Ring]) -> dict[str, torch.Tensor]:
    """Return the numbers of the values that go back through a ring's messages, in the plates of each summed site."""
    asked = [terms[site.number] for site in densities.summed]
    for term in asked:
        ask_for_indices(term)
    total = densities.contracted(terms, ring(cache={}, dim_to_size=densities.sizes))
    found = {}
    for site, (dims, index) in zip(
        densities.summed, indices_back(total, asked, [x.own for x in densities.summed]), strict=True
    ):
        found[site.name] = site.laid_out(index, dims)
    return found


def _values(densities: _Densities, indices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {site.name: site.support[indices[site.name]] for site in densities.summed}
