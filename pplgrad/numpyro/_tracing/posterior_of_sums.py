"""The posterior of summed sites, given what a component has beside them: marginals, joint samples, the most probable joint value.

A component's densities are Π_f f(z), in plates and along the steps of scans. All three are derivatives of its contraction with respect to
zeros added to the log densities of the summed sites, with one backward pass: of log Σ_z Π_f f(z) they are the marginals. Where each sum
passes its derivative on to one value alone (`factors.py`), the largest or one drawn from what it sums, they are one at the
most probable joint value (Viterbi), or at a joint sample (forward filter, backward sample), and zero at all others. A scale
stands outside of the logarithm, as in the objective, and so has no part in a posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.engine.marginal_sites import NEVER
from pplgrad.numpyro._compat import PREVIOUS, mask_of, root, unmasked, written_name
from pplgrad.numpyro._distributions import finite_parts
from pplgrad.numpyro._tracing.contraction import factor
from pplgrad.numpyro._tracing.factors import Dims, Factor, MostProbable, Ring, Sampled
from pplgrad.numpyro._tracing.marginal_laws import Component

Found = dict[str, jax.Array]


@dataclass(frozen=True)
class _Part:
    """A summed site of a component: a site of the model, or what the host makes of one in a scan (each of the first steps, all others)."""

    name: str
    number: int
    """Which of the component's sites it is."""
    site: Any
    dims: Dims
    batch: tuple[int, ...]
    """The shape of one value of the model's site, without steps and without the dimensions of an event."""
    first: int
    """The first of its steps among those of the site; 0 outside of a scan."""
    steps: int

    def of_own(self, f: Factor) -> Factor:
        """Return the sum of numbers over all but the site's own values, plates and steps."""
        return f.multiplied_over(set(f.names) - self.dims.plates - {self.name, self.dims.time})

    def laid_out(self, f: Factor) -> jax.Array:
        """Return numbers along steps, then in the site's plates, then along its values; there are no other variables."""
        x = f.laid_out([*_places(self.dims, len(self.batch)), self.name])
        return jnp.broadcast_to(x, (self.steps, *self.batch, x.shape[-1]))

    def along(self, x: jax.Array, names: Sequence[str]) -> jax.Array:
        """Return numbers of the site's elements, of all its steps, as they broadcast with numbers along `names`."""
        x = x[self.first : self.first + self.steps]
        places = _places(self.dims, x.ndim - 1)
        x = x.max(tuple(i for i, place in enumerate(places) if place not in names))
        return Factor(x, tuple(place for place in places if place in names)).laid_out(names)


def _places(dims: Dims, depth: int) -> list[str]:
    """Return the names of the steps and of the plates at the last dimensions, empty where there are none."""
    plates = [dims.names.get(dim, "") for dim in range(-depth, 0)]
    return [dims.time or "", *(name if name in dims.plates else "" for name in plates)]


class _Densities:
    """The log densities of a component's sites, as functions of their variables, and nothing in them infinite."""

    def __init__(self, component: Component) -> None:
        self._component = component
        self.dims = component.dims
        densities = component.densities
        self.factors = [
            factor(jnp.maximum(jax.lax.stop_gradient(x), NEVER), d) for x, d in zip(densities, self.dims, strict=True)
        ]
        found: dict[str, list[int]] = {}
        for i, summed in enumerate(component.summed):
            if summed:
                found.setdefault(root(component.sites[i]["name"]), []).append(i)
        self.parts: dict[str, list[_Part]] = {}
        for name, numbers in found.items():
            # The first steps have one prefix more, the farther they are from those that are rolled.
            numbers.sort(key=lambda i: -len(component.sites[i]["name"]))
            first, mine = 0, self.parts.setdefault(name, [])
            for i in numbers:
                f, time = self.factors[i], self.dims[i].time
                steps = 1 if time is None else f.sizes[time]
                site = component.sites[i]
                mine.append(_Part(site["name"], i, site, self.dims[i], component.shapes[name].batch, first, steps))
                first += steps

    def readers(self) -> dict[int, _Part]:
        """Return the summed sites by their numbers."""
        return {part.number: part for parts in self.parts.values() for part in parts}

    def derivatives(self, changed: Mapping[int, jax.Array], ring: Ring) -> tuple[Found, jax.Array]:
        """Return the derivative with respect to the log density of each value of each summed site, and whether there is anything possible.

        `changed` are other numbers of some of the densities.
        """
        numbers = list(self.readers())
        data = {i: changed.get(i, self.factors[i].data) for i in numbers}

        def total(data: dict[int, jax.Array]) -> tuple[jax.Array, jax.Array]:
            terms = [Factor(data[i], f.names) if i in data else f for i, f in enumerate(self.factors)]
            found = self._component.contracted(terms, ring)
            return found.sum(), (jnp.isfinite(found) & (found > NEVER / 2)).all()

        gradients, possible = jax.grad(total, has_aux=True)(data)
        return self.joined(
            lambda part: part.laid_out(part.of_own(Factor(gradients[part.number], self.factors[part.number].names)))
        ), possible

    def joined(self, of: Callable[[_Part], jax.Array]) -> Found:
        """Return what holds for all steps of each summed site, in their order, from what holds for its parts."""
        return {name: jnp.concatenate([of(part) for part in parts]) for name, parts in self.parts.items()}

    def indices(self, changed: Mapping[int, jax.Array], ring: Ring) -> tuple[Found, jax.Array]:
        """Return the numbers of the values at which derivatives are one."""
        found, possible = self.derivatives(changed, ring)
        return {name: jnp.argmax(x, -1) for name, x in found.items()}, possible

    def values(self, indices: Found) -> Found:
        """Return values by their numbers, in the shape in which the model draws them."""
        found = {}
        for name, parts in self.parts.items():
            finite = finite_parts(unmasked(parts[0].site["fn"]))
            assert finite is not None  # It has been refused.
            drawn = self._component.shapes[name]
            found[name] = finite[1][indices[name]].reshape(drawn.shape).astype(drawn.dtype)
        return found

    def probabilities(self, found: Found) -> Found:
        """Return numbers along the values of sites, behind the shape in which the model draws them."""
        return {name: x.reshape(*self._component.shapes[name].leading, -1) for name, x in found.items()}


def with_known(found: Found, component: Component, trace: Mapping[str, Any], kind: str) -> Found:
    """Return what was found, with what is known in its place at sites with `obs_mask`, by the names that these have in the program.

    The host makes a site of what is observed, one of what is not, and a value of both: where that is the same at all values of the
    summed site, it is known. In the steps of a scan that value has no place of its own.
    """
    result, names = dict(found), {*trace, *(site["name"] for site in component.sites)}
    for site in (site for site, summed in zip(component.sites, component.summed, strict=True) if summed):
        name, drawn = written_name(site["name"], names), component.shapes.get(site["name"])
        if name is None or drawn is None or drawn.scanned or trace.get(name, {}).get("type") != "deterministic":
            continue
        events, value, x = drawn.event_dim, jnp.asarray(trace[name]["value"]), result.pop(site["name"])
        axis = value.ndim - jnp.ndim(site["value"])
        first = value.take(jnp.array([0]), axis) if axis >= 0 else value
        same = (value == first).all(axis, keepdims=True) if axis >= 0 else jnp.ones_like(value, bool)
        known = same.all(tuple(range(-events, 0)))
        batch = len(drawn.leading)
        known = known.reshape(known.shape[max(known.ndim - batch, 0) :])
        first = first.reshape(first.shape[max(first.ndim - batch - events, 0) :])
        if kind == "marginals":
            finite = finite_parts(unmasked(site["fn"]))
            assert finite is not None  # It has been refused.
            support = finite[1].reshape(-1, *(1,) * (first.ndim - events), *finite[1].shape[1:])
            hits = (support == first).all(tuple(range(-events, 0)))
            first, events = jnp.moveaxis(hits, 0, -1).astype(x.dtype), 1
        result[name] = jnp.where(known.reshape(*known.shape, *(1,) * events), first, x)
    return result


def marginals(component: Component, key: jax.Array) -> tuple[Found, jax.Array]:
    """Return the probability of each value of each summed site, along a last axis, and whether anything is possible."""
    densities = _Densities(component)
    found, possible = densities.derivatives({}, Ring())
    return {name: jnp.where(possible, x, jnp.nan) for name, x in densities.probabilities(found).items()}, possible


def samples(component: Component, key: jax.Array) -> tuple[Found, jax.Array]:
    """Return one joint sample of the summed sites, and whether anything is possible."""
    densities = _Densities(component)
    found, possible = densities.indices({}, Sampled(key))
    return densities.values(found), possible


def most_probable(component: Component, key: jax.Array) -> tuple[Found, jax.Array]:
    """Return the most probable joint value of the summed sites, and whether anything is possible.

    An element that is masked, and that no element reads which counts, has no part in it: one value is as good as another to all that is
    left, and Σ p(z | parents) = 1. It gets the most probable value given the others.
    """
    densities = _Densities(component)
    counts = _counting(densities)
    if counts is None:
        found, possible = densities.indices({}, MostProbable())
        return densities.values(found), possible
    changed = {}
    for i, part in densities.readers().items():
        f = densities.factors[i]
        changed[i] = jnp.where(part.along(counts[root(part.name)], f.names), f.data, 0.0)
    chosen, possible = densities.indices(changed, MostProbable())
    for i, part in densities.readers().items():
        f = densities.factors[i]
        index = Factor(jnp.arange(f.sizes.get(part.name, 1)), (part.name,)).laid_out(f.names)
        other = index != part.along(chosen[root(part.name)], f.names)
        changed[i] = jnp.where(part.along(counts[root(part.name)], f.names) & other, NEVER, f.data)
    found, _ = densities.indices(changed, MostProbable())
    return densities.values(found), possible


def _counting(densities: _Densities) -> Found | None:
    """Return which elements of each summed site count, or None if all do.

    Those do that are not masked, and those that a density depends on which counts, as all do but those of summed sites that do not count.
    """
    masks = {i: mask_of(part.site["fn"]) for i, part in densities.readers().items()}
    if all(mask is None for mask in masks.values()):
        return None

    def own(part: _Part) -> jax.Array:
        mask = masks[part.number]
        f = factor(jnp.asarray(True if mask is None else mask), densities.dims[part.number])
        places = set(_places(part.dims, len(part.batch)))
        others = tuple(i for i, name in enumerate(f.names) if name not in places)
        f = Factor(f.data.any(others), tuple(name for name in f.names if name in places))
        return part.laid_out(f)[..., 0]

    reads = _reads(densities)

    def step(state: tuple[Found, Any]) -> tuple[Found, Any]:
        counts, _ = state
        new = dict(counts)
        for read in reads:
            new = read(counts, new)
        return new, jnp.any(jnp.stack([(new[name] != counts[name]).any() for name in new]))

    return jax.lax.while_loop(lambda state: state[1], step, (densities.joined(own), jnp.asarray(True)))[0]


def _reads(densities: _Densities) -> list[Callable[[Found, Found], Found]]:
    """Return functions, each of which notes which elements of one summed site one density depends on where it counts."""
    by_name = {part.name: part for part in densities.readers().values()}
    depth = max(len(part.batch) for part in by_name.values())
    found = []
    for i, (f, d) in enumerate(zip(densities.factors, densities.dims, strict=True)):
        reader = densities.readers().get(i)
        for name in d.summed & set(f.names):
            if reader is not None and name == reader.name:
                continue
            axis = f.names.index(name)
            varies = Factor(f.data.max(axis, keepdims=True) != f.data.min(axis, keepdims=True), f.names)
            places = _places(d, depth)
            others = tuple(j for j, other in enumerate(f.names) if other not in places)
            varies = Factor(varies.data.any(others), tuple(other for other in f.names if other in places))
            lag = (len(name) - len(root(name))) // len(PREVIOUS)
            rolled = by_name.get(root(name)) if d.time is not None else None
            if rolled is not None and rolled.dims.time == d.time:
                target, rows, whole = rolled, slice(rolled.first - lag, rolled.first - lag + rolled.steps), False
            else:
                target, whole = by_name[name], True
                last = target.first + target.steps - 1
                rows = slice(last, last + 1)
            found.append(_read(varies.laid_out(places), reader, target, rows, whole))
    return found


def _read(
    varies: jax.Array, reader: _Part | None, target: _Part, rows: slice, whole: bool
) -> Callable[[Found, Found], Found]:
    """Return what notes which elements of a summed site a density depends on; at any of its steps if `whole`.

    `varies` says at which steps and elements of its plates the density depends on the site's value.
    """

    def note(counts: Found, new: Found) -> Found:
        hit = varies
        if reader is not None:
            mine = counts[root(reader.name)][reader.first : reader.first + reader.steps]
            hit = hit & mine.reshape(len(mine), *(1,) * (varies.ndim - mine.ndim), *mine.shape[1:])
        batch = (*(1,) * (varies.ndim - 1 - len(target.batch)), *target.batch)
        hit = hit.any(tuple(i + 1 for i, size in enumerate(batch) if size == 1), keepdims=True)
        if whole:
            hit = hit.any(0, keepdims=True)
        name, before = root(target.name), new[root(target.name)]
        hit = jnp.broadcast_to(hit, (hit.shape[0], *batch)).reshape(hit.shape[0], *target.batch)
        return {**new, name: before.at[rows].set(before[rows] | hit)}

    return note
