"""Discrete sites that only the model has, summed out exactly by NumPyro's own enumeration (`numpyro.contrib.funsor`).

A model's site with `infer={"enumerate": "parallel"}` that the guide does not draw takes all its values at once, along a dimension of its
own to the left of all plates. The densities that summed sites join (a component) become one observed site of the trace, whose log
density is log Σ Π of theirs (`contraction.py`). A scan in which there is something to sum runs as NumPyro enumerates it: its first steps
one by one (their sites have a prefix), and the others rolled. What stands around the trace needs to know nothing of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import funsor
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.contrib import funsor as host
from numpyro.contrib.funsor.infer_util import plate_to_enum_plate
from numpyro.primitives import Messenger

from pplgrad.engine.marginal_sites import (
    MOST,
    drawn_given_sum,
    joined,
    joint_values,
    no_finite_support,
    short,
    sum_over_draws,
    too_large,
    two_scales,
)
from pplgrad.errors import PplgradError, ProgramError, first_line, listed
from pplgrad.numpyro._compat import is_handed_out, root, unmasked
from pplgrad.numpyro._compat_jax import tag
from pplgrad.numpyro._distributions import family, finite_parts
from pplgrad.numpyro._tracing.control_flow import Flow, FlowMessenger
from pplgrad.numpyro._tracing.factors import Dims
from pplgrad.numpyro._tracing.marginal_laws import Component, DrawShape, InComponent, Marginal

Sites = Mapping[str, Any]


@dataclass(frozen=True)
class Enumeration:
    """What is summed out of a model, in which of its scans, left of how many dimensions; `drawn` are the values of the guide's sites, `shapes` say
    how the model draws the summed ones."""

    summed: frozenset[str]
    scans: frozenset[int]
    nesting: int
    drawn: Mapping[str, jax.Array]
    flows: Mapping[str, Flow]
    shapes: Mapping[str, DrawShape]

    def in_scan(self, name: str) -> bool:
        """Return whether a site is drawn in the body of a scan that is enumerated."""
        flow = self.flows.get(root(name))
        return flow is not None and flow.scanned and flow.number in self.scans

    @property
    def drawn_outside(self) -> frozenset[str]:
        """Return the guide's draws that do not stand in an enumerated scan."""
        return frozenset(name for name in self.drawn if not self.in_scan(name))

    def hand_in(self, msg: Any, inner: FlowMessenger) -> None:
        """Let the body of an enumerated scan take the guide's draws, which go along with the arrays that are scanned.

        `inner` stands around the body already.
        """
        if inner.number not in self.scans:
            return
        body, init, xs, length, reverse = msg["args"]
        names = [name for name, flow in self.flows.items() if flow.number == inner.number and name in self.drawn]
        # A value read from here is read as a whole: the sum over a scan has no steps.
        rows = {name: tag(name, self.drawn[name]) for name in names}
        if reverse:  # NumPyro hands values out in the order in which the steps run.
            rows = {name: jnp.flip(value, 0) for name, value in rows.items()}

        def with_draws(carry: Any, row: Any) -> Any:
            x, draws = row
            with HandIn(draws, inner.name_of):
                return body(carry, x)

        msg["args"] = (with_draws, init, (xs, rows), length, reverse)

    def is_summed(self, site: Any) -> bool:
        """Return whether a site of the enumerated model takes all its values at once."""
        return root(site["name"]) in self.summed and not site["is_observed"]


def enumeration(plain: Sites, flows: Mapping[str, Flow], summed: frozenset[str], guide: Sites) -> Enumeration:
    """Return what is to be done for the summed sites of a model, from its trace at one value of each; or refuse it."""
    deepest = 0
    for name, site in plain.items():
        if site["type"] != "sample":
            continue
        in_scan = name in flows and flows[name].scanned
        if name in summed:
            _check(name, site, flows.get(name))
        shape = _density_shape(site)
        frames = [-frame.dim for frame in site["cond_indep_stack"] if frame.dim is not None]
        deepest = max(deepest, len(shape) - in_scan, *frames, 0)
    scans = frozenset(flow.number for flow in flows.values() if flow.scanned)
    drawn = {name: guide[name]["value"] for name in plain if name in guide and guide[name]["type"] == "sample"}
    return Enumeration(summed, scans, deepest, drawn, flows, {name: _shape(plain[name], flows) for name in summed})


def _shape(site: Any, flows: Mapping[str, Flow]) -> DrawShape:
    flow = flows.get(site["name"])
    scanned = flow is not None and flow.scanned
    return DrawShape(jnp.shape(site["value"]), site["fn"].event_dim, scanned, jnp.result_type(site["value"]))


def _batch_shape(site: Any) -> tuple[int, ...]:
    shape = jnp.shape(site["value"])
    return shape[: len(shape) - site["fn"].event_dim]


def _density_shape(site: Any) -> tuple[int, ...]:
    """Return the shape of a site's log density, summed dimensions included."""
    return jnp.broadcast_shapes(tuple(site["fn"].batch_shape), _batch_shape(site))


def _check(name: str, site: Any, flow: Flow | None) -> None:
    """Refuse a site that cannot be summed out."""
    if site["infer"].get("num_samples") is not None:
        raise sum_over_draws(name, site["infer"]["num_samples"])
    fn = unmasked(site["fn"])
    with jax.ensure_compile_time_eval():
        parts = finite_parts(fn)
    if parts is None:
        raise no_finite_support(name, family(fn))
    base, support = parts
    if fn.event_shape != base.event_shape:
        raise joint_values(name, family(fn))
    if flow is None:
        return
    if not flow.scanned:
        raise ProgramError(
            f"Site '{name}' of the model is to be summed out in a branch of cond, which NumPyro cannot enumerate; draw it in the guide, or "
            "write the branches as one model with jnp.where."
        )
    usual = not isinstance(support, jax.core.Tracer) and np.array_equal(support, np.arange(len(support)))
    if not usual:
        raise ProgramError(
            f"Site '{name}' ({family(fn)}) of the model is to be summed out in a scan, where NumPyro gives it the values 0, 1, 2, ...; draw a "
            "Categorical there, and compute the values from it."
        )


class EnumerateMessenger(host.enum):
    """Gives the summed sites of a model all their values, and lets NumPyro enumerate its scans."""

    def __init__(self, plan: Enumeration) -> None:
        super().__init__(first_available_dim=-1 - plan.nesting)
        self._plan, self._met = plan, 0

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            self._met += 1
            if self._met - 1 in self._plan.scans:
                msg["kwargs"]["enum"] = True
                msg["kwargs"]["first_available_dim"] = self.first_available_dim
        elif msg["type"] != "sample":
            super().process_message(msg)
        elif msg["value"] is None and msg["name"] in self._plan.summed and not msg["is_observed"]:
            msg["value"] = _all_values(msg)
            msg["done"] = True


def _all_values(msg: Any) -> jax.Array:
    """Return the values of a site along a dimension of its own."""
    parts = finite_parts(unmasked(msg["fn"]))
    assert parts is not None  # `_check` has refused it.
    size = len(parts[1])
    numbers = funsor.Tensor(jnp.arange(size), OrderedDict({msg["name"]: funsor.Bint[size]}))
    return parts[1].reshape(*host.to_data(numbers).shape, *msg["fn"].event_shape)


class HandIn(Messenger):
    """Stands around the body of an enumerated scan, whose sites NumPyro does not replay: gives them the guide's draws of a step."""

    def __init__(self, draws: Mapping[str, jax.Array], name_of: Callable[[str], str]) -> None:
        super().__init__()
        self._draws, self._name_of = draws, name_of

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            raise ProgramError(
                "The model has control flow in the body of a scan while sites are summed out, which NumPyro cannot enumerate; draw the summed "
                "sites in the guide, or take the inner control flow out of the body."
            )
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["value"] = self._draws.get(self._name_of(msg["name"]), msg["value"])


class NameDims(host.trace):
    """Notes the names of the dimensions of each site of an enumerated model.

    A site that comes out of an enumerated scan has its names. NumPyro would look them up by its dimensions once more, of which that of time
    may be at the place of another variable.
    """

    def __init__(self, plan: Enumeration) -> None:
        super().__init__()
        self._plan = plan

    def postprocess_message(self, msg: Any) -> None:
        flow = self._plan.flows.get(msg["name"]) if msg["type"] == "sample" and is_handed_out(msg) else None
        if flow is None or not flow.scanned:
            super().postprocess_message(msg)


@contextmanager
def enumerating(plan: Enumeration) -> Iterator[None]:
    """Enumerate a model that runs in this context."""
    funsor.set_backend("jax")  # One for the whole process: whoever imports pyro.contrib.funsor takes it for torch.
    with NameDims(plan), EnumerateMessenger(plan):
        yield


@contextmanager
def naming(summed: Iterable[str]) -> Iterator[None]:
    """Run a model whose plates have names that NumPyro's enumeration knows; say which sites are summed out where it fails."""
    try:
        with plate_to_enum_plate():
            yield
    except PplgradError:
        raise
    except (TypeError, ValueError, IndexError, AssertionError, NotImplementedError) as error:
        raise ProgramError(
            f"The model does not run while the sites {listed(sorted(summed))}, which are summed out (infer={{'enumerate': 'parallel'}}), take "
            f"all their values at once, along dimensions to the left of all plates: {first_line(error)}. Write it so that it broadcasts, "
            "separate the steps of a chain with numpyro.contrib.funsor.markov or scan, or draw the sites in the guide."
        ) from error


def enumerated(plan: Enumeration, run: Callable[[Enumeration], dict[str, Any]], guide: Sites) -> dict[str, Any]:
    """Return a model's trace with a site for each component in the place of its sites; `run` runs the model as a plan says.

    All scans are enumerated at first: whether a density in a body reads a summed site shows there. The others then run as they are.
    """
    trace = run(plan)
    reached = _reached_scans(trace, plan)
    if reached != plan.scans:
        plan = replace(plan, scans=reached)
        trace = run(plan)
    for name, flow in plan.flows.items():
        if flow.reverse and plan.in_scan(name):
            raise ProgramError(
                f"Site '{name}' stands in a scan with reverse=True that reads sites that are summed out, and NumPyro would take its first steps "
                "from the wrong end; reverse the arrays that the scan goes along."
            )
    return _sum_out(trace, plan, guide)


def _reached_scans(trace: Sites, plan: Enumeration) -> frozenset[int]:
    """Return the scans of an enumerated model in which a density reads a summed site."""
    reached = [
        plan.flows[root(name)].number
        for name, site in trace.items()
        if site["type"] == "sample" and plan.in_scan(name) and _dims(site, plan).summed
    ]
    return frozenset(reached)


def _sum_out(trace: Sites, plan: Enumeration, guide: Sites) -> dict[str, Any]:
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    dims: dict[str, Dims] = {}
    marks: dict[str, frozenset[str]] = {}
    for name, site in sites.items():
        flow = plan.flows.get(root(name))
        if flow is not None and flow.scanned and not plan.in_scan(name):
            continue  # It reads nothing that is summed, and time is a dimension of its own.
        _check_size(site)
        dims[name] = _dims(site, plan)
        marks[name] = frozenset(map(root, dims[name].summed))
        if marks[name] and not (site["is_observed"] or plan.is_summed(site) or root(name) in plan.drawn):
            raise drawn_given_sum(name)
        if plan.is_summed(site) or plan.in_scan(name):
            marks[name] |= {root(name)}
    result = dict(trace)
    for names, _ in joined((name, marks[name]) for name in dims if marks[name]):
        component = _component([sites[name] for name in names], [dims[name] for name in names], plan)
        for name in names:
            del result[name]
            if root(name) in plan.drawn and not sites[name]["is_observed"]:
                result[root(name)] = _drawn(guide[root(name)], sites[name])
        node = _node(component)
        result[node["name"]] = node
    return result


def _dims(site: Any, plan: Enumeration) -> Dims:
    """Return the variables along the dimensions of a site's density."""
    shape = _density_shape(site)
    names = {dim: name for dim, name in site["infer"]["dim_to_name"].items() if -dim <= len(shape)}
    # A plate made before the model ran has no name there.
    names |= {frame.dim: frame.name for frame in site["cond_indep_stack"] if -frame.dim <= len(shape)}
    for dim in range(-len(shape), 0):
        if shape[dim] > 1:
            names.setdefault(dim, f"dimension {dim}")
    time = next((name for name in names.values() if name.startswith("_time_")), None)
    return Dims(names, frozenset(name for name in names.values() if root(name) in plan.summed), time)


def _check_size(site: Any) -> None:
    numbers = math.prod(_density_shape(site))
    if numbers > MOST:
        raise too_large(site["name"], numbers, "numpyro.contrib.funsor.markov or scan")


def _component(sites: list[Any], dims: list[Dims], plan: Enumeration) -> Component:
    summed = tuple(plan.is_summed(site) for site in sites)
    frames = [{frame.name: frame.dim for frame in site["cond_indep_stack"]} for site in sites]
    kept = {name: dim for name, dim in frames[0].items() if all(name in mine for mine in frames)}
    names = {root(site["name"]) for site in sites}
    shapes = {name: shape for name, shape in plan.shapes.items() if name in names}
    return Component(tuple(sites), tuple(dims), summed, kept, shapes)


def _drawn(site: Any, in_model: Any) -> dict[str, Any]:
    """Return what is left in the model of a site that the guide draws, and whose density is part of a component."""
    law = InComponent(_batch_shape(site), site["fn"].event_dim)
    own = {"name": site["name"], "value": site["value"], "fn": law, "scale": None, "intermediates": []}
    return {**in_model, **own}


def _node(component: Component) -> dict[str, Any]:
    """Return the site that stands for a component."""
    first = component.sites[0]
    names = [root(site["name"]) for site, summed in zip(component.sites, component.summed, strict=True) if summed]
    title = f"{short(list(dict.fromkeys(names)))} (summed out)" if names else f"{root(first['name'])} (all steps)"
    return {
        "type": "sample",
        "name": title,
        "fn": Marginal(component),
        "value": jnp.zeros(()),
        "is_observed": True,
        "args": (),
        "kwargs": {},
        "intermediates": [],
        "infer": {},
        "scale": _common_scale(component),
        "cond_indep_stack": [frame for frame in first["cond_indep_stack"] if frame.name in component.kept],
    }


def _common_scale(component: Component) -> Any:
    """Return the scale of all sites of a component, which stays outside of the logarithm."""
    first, *others = component.sites
    for site in others:
        x, y = (1.0 if scale is None else scale for scale in (first["scale"], site["scale"]))
        numbers = all(isinstance(scale, (int, float)) or jnp.ndim(scale) == 0 for scale in (x, y))
        traced = any(isinstance(scale, jax.core.Tracer) for scale in (x, y))
        if x is not y and (traced or not numbers or float(x) != float(y)):
            raise two_scales(root(first["name"]), root(site["name"]), "handlers.scale")
    return first["scale"]
