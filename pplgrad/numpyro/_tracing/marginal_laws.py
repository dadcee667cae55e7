"""What stands in a model's trace for densities that are summed together: a component as one observed site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pplgrad.core.objectives import CostWeights
from pplgrad.core.plates import Plate
from pplgrad.engine.description import SummedSite
from pplgrad.engine.marginal_sites import weight
from pplgrad.numpyro._compat import leaves_of, root, unmasked
from pplgrad.numpyro._distributions import family
from pplgrad.numpyro._tracing import contraction
from pplgrad.numpyro._tracing.factors import Dims, Factor, Ring
from pplgrad.numpyro._tracing.provenance import SitePlates


class DrawShape(NamedTuple):
    """How the model draws a summed site: the shape of its value, which dimensions of it are steps and plates, and its type."""

    shape: tuple[int, ...]
    event_dim: int
    scanned: bool
    dtype: Any

    @property
    def leading(self) -> tuple[int, ...]:
        """Return the shape of a value without the dimensions of an event."""
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def batch(self) -> tuple[int, ...]:
        """Return the shape of one step's value without the dimensions of an event."""
        return self.leading[self.scanned :]


@dataclass(frozen=True)
class Component:
    """Sites whose densities read the same summed sites, the names of the dimensions of each, and how the summed ones are drawn."""

    sites: tuple[Any, ...]
    dims: tuple[Dims, ...]
    summed: tuple[bool, ...]
    kept: Mapping[str, int]
    shapes: Mapping[str, DrawShape]

    @cached_property
    def densities(self) -> list[jax.Array]:
        """The log densities of the sites, at all values of the summed sites that they read."""
        # The mask of a summed site is left out: its values are summed over whether or not something reads them.
        bare = [
            {**site, "fn": unmasked(site["fn"])} if summed else site
            for site, summed in zip(self.sites, self.summed, strict=True)
        ]
        return [log_density(site) for site in bare]

    def log_density(self) -> jax.Array:
        """Return log Σ Π of the densities, in the plates that all of them share."""
        return self.contracted(
            [contraction.factor(x, d) for x, d in zip(self.densities, self.dims, strict=True)], Ring()
        )

    def contracted(self, factors: Sequence[Factor], ring: Ring) -> jax.Array:
        """Return what a ring makes of densities, one for each site, in the plates that all of them share."""
        return contraction.contracted(factors, self.dims, self.kept, ring)

    def variables(self) -> dict[str, SitePlates]:
        """Return where the values of summed sites are in them, by name; not of sites in the rolled steps of a scan."""
        found = {}
        for site, d, summed in zip(self.sites, self.dims, self.summed, strict=True):
            at = next((dim for dim, name in d.names.items() if name == site["name"]), None)
            if summed and d.time is None and at is not None:
                size = jnp.shape(site["value"])[0]
                found[site["name"]] = SitePlates((Plate(site["name"], at, size, size),), site["fn"].event_dim)
        return found


def log_density(site: Any) -> jax.Array:
    """Return the log density of a site at its value, not scaled."""
    fn, value, known = site["fn"], site["value"], site["intermediates"]
    return jnp.asarray(fn.log_prob(value, known) if known else fn.log_prob(value))


class Marginal:
    """The law of what a component has beside its summed sites: observed sites, and draws of the guide."""

    event_dim = 0

    def __init__(self, component: Component) -> None:
        self.component = component

    def weight(self, weights: CostWeights) -> Any:
        """Return the weight in an objective."""
        component = self.component
        others = [site for site, summed in zip(component.sites, component.summed, strict=True) if not summed]
        return weight(others, weights)

    def log_prob(self, value: Any) -> jax.Array:
        """Return the log density, whatever the value: the sites have theirs."""
        return self.component.log_density()

    def probes(self) -> list[jax.Array]:
        """Return every array that the distributions of the sites are known to hold, and observed values."""
        found = [leaf for site in self.component.sites for leaf in (*leaves_of(site["fn"]), *leaves_of(site["scale"]))]
        seen = [site["value"] for site in self.component.sites if site["is_observed"]]
        return [jnp.asarray(leaf) for leaf in [*found, *jax.tree.leaves(seen)]]


class InComponent:
    """The law of a draw of the guide whose density is part of a component: nothing of it is left to count."""

    def __init__(self, batch_shape: tuple[int, ...], event_dim: int) -> None:
        self.batch_shape, self.event_dim = batch_shape, event_dim

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Return zeros."""
        return jnp.zeros(self.batch_shape)

    def probes(self) -> list[jax.Array]:
        """Return nothing: the component holds what the density reads."""
        return []


def weight_of(site: Any, weights: CostWeights) -> Any:
    """Return the weight of a model's site in an objective."""
    if isinstance(site["fn"], Marginal):
        return site["fn"].weight(weights)
    return weights.observed if site["is_observed"] else weights.prior


def summed_sites(trace: Mapping[str, Any]) -> list[SummedSite]:
    """Return the sites that were summed out of a model's trace."""
    found: dict[str, SummedSite] = {}
    for law in (site["fn"] for site in trace.values() if isinstance(site.get("fn"), Marginal)):
        for site, summed in zip(law.component.sites, law.component.summed, strict=True):
            if summed:
                name = root(site["name"])
                plates = [frame.name for frame in site["cond_indep_stack"]]
                found.setdefault(name, SummedSite(name, family(site["fn"]), plates))
    return list(found.values())
