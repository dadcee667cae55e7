"""One run of a guide and a model: from Pyro's traces to the engine's sites, costs and arrays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample

from pplgrad.engine.configuration import listed
from pplgrad.engine.program import EVERY, CostSpec, Plate, Run, SiteSpec
from pplgrad.errors import EstimatorError, ProgramError
from pplgrad.estimators.base import Estimator, SiteInfo
from pplgrad.pyro._distributions import is_discrete, partly_reparameterized, score_squared, unmasked
from pplgrad.pyro._provenance import Provenance

PARTICLES = "num_particles_vectorized"

Resolve = Callable[[SiteInfo, Estimator | None], Estimator]


class SiteMessenger(Messenger):
    """Sees every site from the outside: binds estimators, makes draws constant, follows provenance.

    It stands outermost, so that what it puts into a message is what the program and the trace get to see.
    """

    def __init__(self, particles: int, resolve: Resolve | None, provenance: Provenance | None) -> None:
        super().__init__()
        self.estimators: dict[str, Estimator] = {}
        self.escaped: dict[str, int] = {}
        self._particles = particles
        self._resolve = resolve
        self._provenance = provenance

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if self._provenance is not None:
            self.escaped[msg["name"]] = self._provenance.escaped
        if msg["is_observed"]:
            return
        if self._resolve is not None:
            estimator = self._bind(msg)
            if estimator.uses_score and msg["value"].requires_grad:
                msg["value"] = msg["value"].detach()
        if self._provenance is not None:
            msg["value"] = self._provenance.tag(msg["name"], msg["value"])

    def _bind(self, msg: Any) -> Estimator:
        assert self._resolve is not None
        fn = msg["fn"]
        info = SiteInfo(
            name=msg["name"],
            distribution=type(fn).__name__,
            has_rsample=fn.has_rsample and not partly_reparameterized(fn),
            is_discrete=is_discrete(fn),
            particles=self._particles,
        )
        estimator = self._resolve(info, msg["infer"].get("estimator"))
        self.estimators[msg["name"]] = estimator
        return estimator


class _ModelInferMessenger(Messenger):
    """Stands innermost in the model, where `infer` is still the model's own, and refuses estimators there."""

    def _pyro_sample(self, msg: Any) -> None:
        if "estimator" in msg["infer"]:
            what = "observed" if msg["is_observed"] else "in the model"
            raise EstimatorError(
                f"Site '{msg['name']}' has infer={{'estimator': ...}} but is {what}; estimators belong to the latent "
                "sites of the guide."
            )


@dataclass
class Traces:
    """The traces of one run, with the estimator of each latent guide site."""

    guide: Any
    model: Any
    estimators: dict[str, Estimator]
    indices: dict[str, torch.Tensor]
    guide_escaped: dict[str, int] = field(default_factory=dict)
    model_escaped: dict[str, int] = field(default_factory=dict)


def run_traces(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict,
    particles: int,
    resolve: Resolve,
    provenance: Provenance | None,
) -> Traces:
    """Run the guide, and the model against it, and return their traces."""
    outer = SiteMessenger(particles, resolve, provenance)
    inner = SiteMessenger(particles, None, provenance)
    with provenance or nullcontext():
        effect_guide = poutine.unwrap(guide)
        if isinstance(effect_guide, Messenger):
            with outer:
                guide(*args, **kwargs)
            model_trace, guide_trace = effect_guide.get_traces()
            inner.escaped = outer.escaped
        else:
            with outer:
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            with ExitStack() as stack:
                if provenance is not None:
                    stack.enter_context(inner)
                    provenance.escaped = 0
                replayed = poutine.replay(_checked(model) if provenance is not None else model, trace=guide_trace)
                model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    check_match(guide_trace, model_trace)
    indices = {
        name: site["value"]
        for trace in (model_trace, guide_trace)
        for name, site in trace.nodes.items()
        if site_is_subsample(site) and _is_drawn(site)
    }
    return Traces(
        prune_subsample_sites(guide_trace),
        prune_subsample_sites(model_trace),
        outer.estimators,
        indices,
        outer.escaped,
        inner.escaped,
    )


def _checked(model: Callable) -> Callable:
    def checked(*args: Any, **kwargs: Any) -> Any:
        with _ModelInferMessenger():
            return model(*args, **kwargs)

    return checked


def _is_drawn(site: Any) -> bool:
    fn = site["fn"]
    return isinstance(site["value"], torch.Tensor) and len(site["value"]) < fn.size


def check_match(guide_trace: Any, model_trace: Any) -> None:
    """Refuse a latent site that only one of guide and model has."""

    def latent(trace: Any) -> list[str]:
        return [
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        ]

    in_guide, in_model = latent(guide_trace), latent(model_trace)
    for name in in_guide:
        site = guide_trace.nodes[name]
        if name not in model_trace.nodes and not site["infer"].get("is_auxiliary"):
            raise ProgramError(
                f"Site '{name}' is in the guide but not in the model; add it to the model, or mark it in the guide "
                f"with infer={{'is_auxiliary': True}}. The model's latent sites are: {listed(in_model)}."
            )
        if "estimator" in site["infer"] and site["is_observed"]:
            raise EstimatorError(f"Site '{name}' is observed and has no gradient to estimate; remove its estimator.")
    for name in in_model:
        if name not in guide_trace.nodes:
            raise ProgramError(
                f"Site '{name}' is in the model but not in the guide; draw it in the guide as well, or observe it. "
                f"The guide's latent sites are: {listed(in_guide)}."
            )
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and site["is_observed"] and "estimator" in site["infer"]:
            raise EstimatorError(f"Site '{name}' is observed and has no gradient to estimate; remove its estimator.")


@dataclass
class Recorded:
    """The arrays of one run, with the specifications they belong to where provenance was followed."""

    run: Run
    guide_names: list[str]
    model_names: list[str]
    sites: list[SiteSpec]
    costs: list[CostSpec]


def record(traces: Traces, particles: int, vectorized: bool, depth: int, provenance: Provenance | None) -> Recorded:
    """Compute the log densities of a run.

    Scores come for latent guide sites in guide order; costs for the model's sites and then for the guide's.
    `depth` is the position of the particle dimension (counted from the right) where particles are vectorized.
    """
    scores: list[torch.Tensor] = []
    model_costs: list[torch.Tensor] = []
    guide_costs: list[torch.Tensor] = []
    squares: dict[str, Callable[[], torch.Tensor]] = {}

    def shaped(name: str, x: torch.Tensor) -> torch.Tensor:
        return _with_particles(name, x, particles, depth) if vectorized else x[None]

    with provenance or nullcontext():
        for name, site in _samples(traces.model):
            model_costs.append(shaped(name, _cost(site, log_prob(name, site, site["fn"]))))
        for name, site in _samples(traces.guide):
            estimator = traces.estimators.get(name)
            log_q = log_prob(name, site, site["fn"])
            cost = _cost(site, log_q)
            if estimator is not None:
                bare = unmasked(site["fn"])
                score = log_q if bare is site["fn"] else log_prob(name, site, bare)
                scores.append(shaped(name, score))
                squares[name] = lambda n=name, s=site, b=bare: shaped(n, score_squared(n, b, s["value"]))
                if estimator.uses_score:
                    # E[∇ log q] = 0 given the parents, so that this path is only noise.
                    cost = cost.detach()
            guide_costs.append(shaped(name, cost))
    costs = model_costs + guide_costs
    run = Run(particles, scores, costs, dict(traces.indices), squares)
    guide_names = [name for name, _ in _samples(traces.guide)]
    model_names = [name for name, _ in _samples(traces.model)]
    recorded = Recorded(run, guide_names, model_names, [], [])
    if provenance is not None:
        _specify(recorded, traces, provenance)
    return recorded


def log_prob(name: str, site: Any, fn: Any) -> torch.Tensor:
    """Return the log density of a site's value, naming the site if its shape does not fit."""
    try:
        return fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    except (ValueError, RuntimeError) as error:
        raise ProgramError(
            f"The log density at site '{name}' ({type(fn).__name__}) cannot be computed: {error}"
        ) from error


def _samples(trace: Any) -> list[tuple[str, Any]]:
    return [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]


def _cost(site: Any, log_density: torch.Tensor) -> torch.Tensor:
    scale, mask = site["scale"], site["mask"]
    if mask is None and isinstance(scale, (int, float)) and scale == 1:
        return log_density
    return scale_and_mask(log_density, scale, mask)


def _with_particles(name: str, x: torch.Tensor, particles: int, depth: int) -> torch.Tensor:
    """Return `x` with the particle dimension in front; refuse what the particle plate did not broadcast."""
    if x.dim() < depth:
        return x.expand(particles, *(1,) * (depth - 1 - x.dim()), *x.shape)
    if x.dim() == depth and x.shape[0] == particles:
        return x
    raise ProgramError(
        f"Site '{name}' cannot run under vectorize_particles: its batch shape {tuple(x.shape)} has dimensions that "
        f"no plate declares; declare them with a plate or to_event, or use vectorize_particles=False."
    )


def _plates(site: Any, x: torch.Tensor) -> tuple[Plate, ...]:
    """Return the site's plates, except one whose dimension the log density does not span in full."""
    batch = x.shape[1:]
    return tuple(
        Plate(frame.name, frame.dim, int(frame.size), int(frame.full_size or frame.size))
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name != PARTICLES and -frame.dim <= len(batch) and batch[frame.dim] == frame.size
    )


def _specify(recorded: Recorded, traces: Traces, provenance: Provenance) -> None:
    """Fill in the specifications: plates, estimators, and what each log density reads."""

    def reads(bits: int) -> dict[str, int]:
        return dict.fromkeys(provenance.names(bits), EVERY)

    costs = iter(recorded.run.costs)
    for name, site in _samples(traces.model):
        x = next(costs)
        bits = provenance.of(x) | traces.model_escaped.get(name, 0)
        recorded.costs.append(CostSpec(name, _plates(site, x), 1.0, reads(bits)))
    scores = iter(recorded.run.scores)
    for name, site in _samples(traces.guide):
        x = next(costs)
        bits = provenance.of(x) | traces.guide_escaped.get(name, 0)
        estimator = traces.estimators.get(name)
        if estimator is not None:
            score = next(scores)
            upstream = reads(bits | provenance.of(score))
            own = {name: EVERY}
            upstream.pop(name, None)
            recorded.sites.append(SiteSpec(name, _plates(site, score), estimator, upstream))
            recorded.costs.append(CostSpec(name, _plates(site, x), -1.0, {**upstream, **own}))
        else:
            recorded.costs.append(CostSpec(name, _plates(site, x), -1.0, reads(bits)))
