"""Discrete sites that only the model has, summed out exactly by Pyro's own enumeration.

A model's site with `infer={"enumerate": "parallel"}` that the guide does not draw takes all its values at once, along a dimension of its
own to the left of all plates. The densities that summed sites join (a component) become one observed site of the trace, whose log
density is log Σ Π of theirs, by Pyro's tensor contraction: messages over plates and `pyro.markov` chains. What stands around the trace
needs to know nothing of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape, scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing, Ring
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample

from pplgrad.core.objectives import CostWeights
from pplgrad.engine.description import SummedSite
from pplgrad.engine.marginal_sites import (
    MOST,
    drawn_given_sum,
    joined,
    no_finite_support,
    short,
    sum_over_draws,
    too_large,
    two_scales,
    weight,
)
from pplgrad.errors import ProgramError, first_line, listed
from pplgrad.pyro._compat import NoMode, enumerate_from
from pplgrad.pyro._distributions import family, unmasked
from pplgrad.pyro._tracing.axes import NONE
from pplgrad.pyro._tracing.chains import Factor, chain_of
from pplgrad.pyro._tracing.host_checks import refuse_vectorized_markov
from pplgrad.pyro._tracing.known_densities import log_density
from pplgrad.pyro._tracing.watchers import watching

_DEEPEST = 10
"""The dimensions that plates may take where `max_plate_nesting` is not known."""


class MarginalMessenger(EnumMessenger):
    """Stands innermost in a model and enumerates its sites that ask for it and that the guide does not draw.

    Nothing is done in a model without such a site. `nesting` is the number of dimensions that plates take, those of particles and branches
    among them.
    """

    def __init__(self, drawn: Iterable[str], nesting: float) -> None:
        super().__init__()
        self._drawn = frozenset(drawn)
        self._nesting = _DEEPEST if nesting == math.inf else int(nesting)
        self._enumerates = False

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        refuse_vectorized_markov(msg)
        infer, name = msg["infer"], msg["name"]
        wanted = infer.get("enumerate") == "parallel" and not (msg["is_observed"] or msg["done"] or name in self._drawn)
        if not self._enumerates and not wanted:
            if "_markov_scope" in infer:
                # Sites of the same chain that are enumerated later ask for these.
                self._markov_depths[name] = infer["_markov_depth"]
                self._value_dims[name] = {}
            return
        if not self._enumerates:
            enumerate_from(-1 - self._nesting)
            self._enumerates = True
        deepest = max((-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized), default=0)
        if deepest > self._nesting:
            raise ProgramError(
                f"Site '{name}' stands in a plate at dimension {-deepest}, where the values of sites that are summed out are, because "
                f"max_plate_nesting is {self._nesting}; pass max_plate_nesting={deepest}."
            )
        if wanted:
            _check(name, msg["fn"], infer)
        elif infer.get("enumerate"):
            msg["infer"] = {key: value for key, value in infer.items() if key != "enumerate"}
        super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._enumerates:
            super()._pyro_post_sample(msg)


def against(model: Callable, guide_trace: Any, nesting: float) -> Callable:
    """Return a model that runs with a guide's draws, and takes all values of the sites that are summed out."""
    return poutine.replay(MarginalMessenger(guide_trace.nodes, nesting)(model), trace=guide_trace)


def trace_against(model: Callable, guide_trace: Any, nesting: float, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Return the trace of a model with a guide's draws, with its components in the place of what is summed out."""
    return sum_out(poutine.trace(against(model, guide_trace, nesting)).get_trace(*args, **kwargs))


def is_marginal(site: Any) -> bool:
    """Return whether a site takes all its values at once."""
    return site["infer"].get("_enumerate_dim") is not None


def _check(name: str, fn: Any, infer: Mapping[str, Any]) -> None:
    if infer.get("num_samples") is not None:
        raise sum_over_draws(name, infer["num_samples"])
    if not getattr(fn, "has_enumerate_support", False):
        raise no_finite_support(name, family(fn))


def _batch_shape(site: Mapping[str, Any]) -> Any:
    """Return the shape of a site's log density, summed dimensions included."""
    value = site["value"]
    return broadcast_shape(value.shape[: value.dim() - site["fn"].event_dim], site["fn"].batch_shape)


def _check_size(site: Mapping[str, Any]) -> None:
    numbers = math.prod(_batch_shape(site))
    if numbers > MOST:
        raise too_large(site["name"], numbers, "pyro.markov")


@dataclass(frozen=True)
class Component:
    """Sites whose densities read the same summed sites, by the names of their dimensions."""

    sites: tuple[Mapping[str, Any], ...]
    ordinals: tuple[frozenset[str], ...]
    dims: frozenset[str]
    symbol_to_dim: Mapping[str, int]

    def log_density(self) -> torch.Tensor:
        """Return log Σ Π of the densities, in the plates that all of them share."""
        log_probs = self.log_probs()
        watchers = watching()  # None while a step is recorded, where each operation counts.
        with NoMode() if watchers else nullcontext():
            found = self._contracted(log_probs)
        for provenance in watchers:
            provenance.combined(found, [(x, _shared_axes(x, found)) for x in log_probs])
        return found

    def log_probs(self) -> list[torch.Tensor]:
        """Return the log densities of the sites, in one type of numbers, which a contraction asks for."""
        found = densities_of(self.sites)
        dtype = reduce(torch.promote_types, (x.dtype for x in found))
        return [x if x.dtype == dtype else x.to(dtype) for x in found]

    def _contracted(self, log_probs: list[torch.Tensor]) -> torch.Tensor:
        # Views, since what packs them writes on them.
        terms: list[Any] = [pack(site, log_prob[...]) for site, log_prob in zip(self.sites, log_probs, strict=True)]
        factors = [Factor(x, x._pyro_dims, plates) for x, plates in zip(terms, self.ordinals, strict=True)]
        chain = chain_of(factors, self.dims)
        if chain is None:
            found = self.contracted(terms, self.ordinals, LogRing())
        else:
            found = chain.sum()
            found._pyro_dims = chain.batch  # type: ignore[attr-defined]
        return packed.unpack(found, self.symbol_to_dim)

    def contracted(self, terms: list[torch.Tensor], ordinals: Iterable[frozenset[str]], ring: Ring) -> torch.Tensor:
        """Return log Σ Π of packed densities, or what else a ring makes of them, packed."""
        tree: OrderedDict[frozenset[str], list[torch.Tensor]] = OrderedDict()
        for term, ordinal in zip(terms, ordinals, strict=True):
            tree.setdefault(ordinal, []).append(term)
        try:
            (found,) = contract_tensor_tree(tree, set(self.dims), ring=ring).values()
        except (NotImplementedError, ValueError) as error:
            names = [site["name"] for site in self.sites]
            raise ProgramError(
                f"The sites {listed(names)} cannot be summed out together: {first_line(error)}"
            ) from error
        return found[0]


def densities_of(sites: Iterable[Mapping[str, Any]]) -> list[torch.Tensor]:
    """Return the log densities of sites as they are summed: not scaled, and masked where something reads them."""
    return [_log_prob(site) for site in sites]


def pack(site: Mapping[str, Any], log_prob: torch.Tensor) -> torch.Tensor:
    """Return a site's log density with its dimensions named."""
    try:
        return packed.pack(log_prob, site["infer"]["_dim_to_symbol"])
    except ValueError as error:
        raise ProgramError(
            f"The log density of site '{site['name']}' has the shape {tuple(log_prob.shape)}, of which a dimension belongs to no plate and to no "
            "summed site, so that it cannot be summed out; declare the dimension with pyro.plate or .to_event()."
        ) from error


def _shared_axes(log_prob: torch.Tensor, found: torch.Tensor) -> list[int]:
    """Return which axis of a density each axis of a component's follows: that of the same plate."""
    dims = range(-found.dim(), 0)
    has = [-dim <= log_prob.dim() and found.shape[dim] > 1 and log_prob.shape[dim] == found.shape[dim] for dim in dims]
    return [log_prob.dim() + dim if follows else NONE for dim, follows in zip(dims, has, strict=True)]


def _log_prob(site: Mapping[str, Any]) -> torch.Tensor:
    # The mask of a summed site is left out: its values are summed over whether or not something reads them.
    fn = unmasked(site["fn"]) if is_marginal(site) else site["fn"]
    found = log_density(fn, site["value"], *site["args"], **site["kwargs"])
    if not is_marginal(site):
        found = scale_and_mask(found, mask=site["mask"])
    return found


class Marginal(TorchDistribution):
    """The law of what a component has beside its summed sites: observed sites, and draws of the guide."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, component: Component, batch_shape: torch.Size) -> None:
        self.component = component
        super().__init__(batch_shape, validate_args=False)

    def weight(self, weights: CostWeights) -> Any:
        """Return the weight in an objective; one sum has no two of them."""
        return weight([site for site in self.component.sites if not is_marginal(site)], weights)

    def log_prob(self, value: Any) -> torch.Tensor:
        """Return the log density, whatever the value: the sites have theirs."""
        return self.component.log_density()


class InComponent(TorchDistribution):
    """The law of a draw of the guide whose density is part of a component: nothing of it is left to count."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, value: torch.Tensor, event_dim: int) -> None:
        batch = value.dim() - event_dim
        super().__init__(value.shape[:batch], value.shape[batch:], validate_args=False)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros(self.batch_shape, device=value.device)


def weight_of(site: Any, weights: CostWeights) -> Any:
    """Return the weight of a model's site in an objective."""
    if isinstance(site["fn"], Marginal):
        return site["fn"].weight(weights)
    return weights.observed if site["is_observed"] else weights.prior


def sum_out(trace: Any) -> Any:
    """Return a model's trace with a site for each component in the place of its sites; one that sums nothing out as it is."""
    summed = [name for name, site in trace.nodes.items() if site["type"] == "sample" and is_marginal(site)]
    if not summed:
        return trace
    trace.symbolize_dims()
    result = trace.copy()
    for names, dims in _components(trace):
        component = _component(trace, names, dims)
        _refuse_draws_at_all_values(component)
        for name in names:
            site = trace.nodes[name]
            result.remove_node(name)
            if not (site["is_observed"] or is_marginal(site)):
                law = InComponent(site["value"], site["fn"].event_dim)
                result.add_node(name, **{**site, "fn": law, "scale": 1.0, "mask": None})
        node = _node(component, [name for name in names if name in summed])
        result.add_node(node["name"], **node)
    return result


def _refuse_draws_at_all_values(component: Component) -> None:
    """Refuse a site that the model draws, and not the guide, given a summed one: it has a draw for each value of that."""
    for site in component.sites:
        value, names = site["value"], site["infer"]["_dim_to_symbol"]
        batch = value.shape[: value.dim() - site["fn"].event_dim]
        if not (site["is_observed"] or is_marginal(site)) and any(
            size > 1 and names.get(i - len(batch)) in component.dims for i, size in enumerate(batch)
        ):
            raise drawn_given_sum(site["name"])


def summed_sites(trace: Any) -> list[SummedSite]:
    """Return the sites that were summed out of a model's trace."""
    return [
        SummedSite(site["name"], family(site["fn"]), [x.name for x in site["cond_indep_stack"] if x.vectorized])
        for component in components(trace)
        for site in component.sites
        if is_marginal(site)
    ]


def components(trace: Any) -> list[Component]:
    """Return the components of a model's trace, of which each is a site of it."""
    return [site["fn"].component for site in trace.nodes.values() if isinstance(site.get("fn"), Marginal)]


def _components(trace: Any) -> list[tuple[list[str], frozenset[str]]]:
    """Return the names of sites that summed dimensions join, and these dimensions, in the order of the trace."""
    parts = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        dims = _summed_dims(site)
        if dims or is_marginal(site):
            _check_size(site)
            parts.append((name, dims))
    return joined(parts)


def _summed_dims(site: Any) -> frozenset[str]:
    """Return the names of the summed dimensions that a site's log density has."""
    shape = _batch_shape(site)
    plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    names = site["infer"]["_dim_to_symbol"]
    return frozenset(
        names[dim] for dim in range(-len(shape), 0) if shape[dim] > 1 and dim in names and dim not in plates
    )


def _component(trace: Any, names: list[str], dims: frozenset[str]) -> Component:
    sites = [trace.nodes[name] for name in names]
    ordinals = [
        frozenset(trace.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
        for site in sites
    ]
    return Component(tuple(sites), tuple(ordinals), dims, trace.symbol_to_dim)


def _node(component: Component, summed: list[str]) -> dict[str, Any]:
    """Return the site that stands for a component."""
    first = component.sites[0]
    shared = frozenset.intersection(*(frozenset(site["cond_indep_stack"]) for site in component.sites))
    frames = tuple(frame for frame in first["cond_indep_stack"] if frame in shared)
    shape = [1] * max((-frame.dim for frame in frames if frame.vectorized), default=0)
    for frame in frames:
        if frame.vectorized:
            shape[frame.dim] = frame.size
    return {
        "type": "sample",
        "name": f"{short(summed)} (summed out)",
        "fn": Marginal(component, torch.Size(shape)),
        "value": torch.zeros(()),
        "is_observed": True,
        "args": (),
        "kwargs": {},
        "infer": {},
        "scale": _common_scale(component),
        "mask": None,
        "cond_indep_stack": frames,
        "done": True,
        "stop": False,
        "continuation": None,
    }


def _common_scale(component: Component) -> Any:
    """Return the scale of all sites of a component, which stays outside of the logarithm."""
    first, *others = component.sites
    for site in others:
        x, y = first["scale"], site["scale"]
        if x is not y and not (torch.as_tensor(x).dim() == torch.as_tensor(y).dim() == 0 and float(x) == float(y)):
            raise two_scales(first["name"], site["name"], "poutine.scale")
    return first["scale"]
