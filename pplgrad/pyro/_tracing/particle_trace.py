"""One run of a guide and a model: from Pyro's traces to the engine's sites, costs and arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import or_
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import CostWeights
from pplgrad.core.plates import EVERY, OWN, WHOLE, Plate, Read
from pplgrad.core.program import Program, Proposed
from pplgrad.core.sites import CostSpec, Run, SiteSpec
from pplgrad.engine.checks import (
    impossible_log_prob,
    is_about_the_value,
    refuse_mismatch,
)
from pplgrad.errors import PplgradError, ProgramError
from pplgrad.pyro._compat import WithoutDispatch, WithoutFunctions
from pplgrad.pyro._distributions import (
    is_drawn_from_prior,
    score_squared,
    unmasked,
)
from pplgrad.pyro._tracing.closed_forms import closed_form
from pplgrad.pyro._tracing.handlers import ModelInferMessenger, Resolve, SiteMessenger
from pplgrad.pyro._tracing.host_checks import PARTICLES, check_programs, check_shape
from pplgrad.pyro._tracing.known_densities import log_density
from pplgrad.pyro._tracing.marginal_sites import Marginal, trace_against, weight_of
from pplgrad.pyro._tracing.proposals import at_draws, proposed_draws
from pplgrad.pyro._tracing.provenance import Provenance
from pplgrad.pyro._tracing.relaxations import ExtendedModelMessenger


@dataclass
class Traces:
    """The traces of one run, with the estimator of each latent guide site."""

    guide: Any
    model: Any
    estimators: dict[str, Estimator]
    guide_escaped: dict[str, int]
    model_escaped: dict[str, int]
    rng: dict[Any, torch.Tensor]
    hidden_draws: bool
    closed: dict[str, str] = field(default_factory=dict)
    particles: int = 1
    """The particles that run together, in a plate of their own."""
    apart: bool = False
    """Whether branches run one by one in any case."""
    unseen: bool = False
    """Whether another thread may have had a part in the run, which is not followed."""
    compared: bool = False
    """Whether the run is not to be compared with a second one on the same draws."""
    shown: Any = None
    """The program that ran: the user's, in a plate of particles if they run together."""
    changed: list[Callable] = field(default_factory=list)
    """Functions of baselines whose Python state changed while the program ran."""
    nesting: float = math.inf
    """How many dimensions the plates take, if that is known."""

    def __post_init__(self) -> None:
        self.guide_sites = samples_of(self.guide)
        self.model_sites = samples_of(self.model)

    def indices(self) -> dict[str, torch.Tensor]:
        """Return the elements of each subsampled plate."""
        return {
            name: site["value"]
            for trace in (self.model, self.guide)
            for name, site in trace.nodes.items()
            if site_is_subsample(site) and _is_drawn(site)
        }

    def from_prior(self) -> list[str]:
        """Return the names of the sites that the model alone draws."""
        return [name for name, site in self.model_sites if not (site["is_observed"] or name in self.guide.nodes)]

    def rng_devices(self) -> list[Any]:
        """Return the devices, beside the CPU, whose generators were there when the run began."""
        return [device for device in self.rng if device != "cpu"]

    def restore_rng(self) -> None:
        """Put the generators into the state in which the run began."""
        restore(self.rng)

    def signature(self) -> tuple:
        """Return the program's structure: names, families, shapes, plates and estimators of all sites, in order."""
        model = [_kind(name, site) for name, site in self.model_sites]
        guide = [(_kind(n, site), id(self.estimators.get(n)), self.closed.get(n)) for n, site in self.guide_sites]
        return (model, guide)


@contextmanager
def without_shapes() -> Iterator[None]:
    """Raise an error of pplgrad's as it was: Pyro's traces add the shapes of all their sites to its sentence."""
    try:
        yield
    except PplgradError as error:
        first: BaseException = error
        while type(first.__cause__) is type(error) and str(first).startswith(str(first.__cause__)):
            first = first.__cause__
        raise first from first.__cause__


@without_shapes()
def run_traces(
    program: Program,
    resolve: Resolve,
    provenance: Provenance | None,
    nesting: float = math.inf,
) -> Traces:
    """Run the guide, and the model against it, and return their traces.

    `nesting` is how many dimensions plates take, if it is known: sites that are summed out have theirs to the left of them.
    """
    model, guide, args, _ = program
    kwargs = dict(program.kwargs)
    outer = SiteMessenger(resolve, provenance, args, kwargs)
    inner = SiteMessenger(None, provenance, args, kwargs)
    if isinstance(guide, Proposed):
        draws = proposed_draws(guide, args, kwargs)
        guide = at_draws(guide.guide, draws)
        for value in draws.values() if provenance is not None else ():
            provenance.give(value)  # type: ignore[union-attr]
    rng = generators()
    hidden_draws = False
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
            hidden_draws = provenance is not None and provenance.hidden_draws
            with ExitStack() as stack:
                if provenance is not None:
                    stack.enter_context(inner)
                    provenance.escaped = 0
                    inner.estimators, inner.softens = outer.estimators, outer.softens
                if any(found.relaxes for found in outer.estimators.values()):
                    stack.enter_context(ExtendedModelMessenger.of(outer.estimators))
                shown = watching_infer(model) if provenance is not None else model
                model_trace = trace_against(shown, guide_trace, nesting, args, kwargs)
    for name, site in model_trace.nodes.items():
        if isinstance(site.get("fn"), Marginal):
            inner.escaped[name] = reduce(
                or_, (inner.escaped.get(part["name"], 0) for part in site["fn"].component.sites)
            )
    escaped = outer.escaped, inner.escaped
    return Traces(guide_trace, model_trace, outer.estimators, *escaped, rng, hidden_draws, nesting=nesting)


def restore(states: dict[Any, torch.Tensor]) -> None:
    """Put generators into the states that `generators` returned."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def generators() -> dict[Any, torch.Tensor]:
    """Return the state of each device's generator; looking at a GPU that is not in use would start it."""
    states: dict[Any, torch.Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states.update(enumerate(torch.cuda.get_rng_state_all()))
    return states


def watching_infer(model: Callable) -> Callable:
    """Return a model in which an estimator at a site is refused."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        with ModelInferMessenger():
            return model(*args, **kwargs)

    return checked


def _is_drawn(site: Any) -> bool:
    fn = site["fn"]
    return isinstance(site["value"], torch.Tensor) and len(site["value"]) < fn.size


def samples_of(trace: Any) -> list[tuple[str, Any]]:
    """Return the sample sites of a trace by name, without those of plates."""
    return [(n, site) for n, site in trace.nodes.items() if site["type"] == "sample" and not site_is_subsample(site)]


def _kind(name: str, site: Any) -> tuple:
    fn = site["fn"]
    return (
        name,
        fn.__class__,
        fn.batch_shape,
        fn.event_shape,
        site["cond_indep_stack"],
        site["is_observed"],
        site["mask"] is None,
        getattr(site["value"], "shape", None),
        tuple(_kind(part["name"], part) for part in fn.component.sites) if isinstance(fn, Marginal) else (),
    )


def check_match(traces: Traces, nesting: float) -> None:
    """Refuse a guide and a model that do not fit together."""
    refuse_mismatch(dict(traces.guide_sites), dict(traces.model_sites), is_drawn_from_prior)
    check_programs(traces.model, traces.guide, nesting)


def record(
    traces: Traces,
    particles: int,
    vectorized: bool,
    depth: int,
    provenance: Provenance | None,
    weights: CostWeights,
    nesting: float | None = None,
) -> Run:
    """Compute the log densities of a run.

    Scores come for latent guide sites in guide order; costs for the model's sites and then for the guide's.
    `depth` is the position of the particle dimension (counted from the right) where particles are vectorized. With `nesting`, the
    most nested plates that there may be, the shapes of costs are checked as Pyro does.
    """
    scores: list[torch.Tensor] = []
    model_costs: list[torch.Tensor] = []
    guide_costs: list[torch.Tensor] = []
    squares: dict[str, Callable[[], torch.Tensor]] = {}
    through: dict[str, torch.Tensor] = {}
    weights_alone: dict[str, torch.Tensor] = {}

    def shaped(site: Any, x: torch.Tensor) -> torch.Tensor:
        if vectorized:
            return with_particles(site, x, particles, depth)
        if provenance is None:
            return x[None]
        with WithoutFunctions(), WithoutDispatch():
            return x[None]  # A view, of which is known what is known of its storage.

    def counted(site: Any, x: torch.Tensor) -> torch.Tensor:
        if nesting is not None:
            with torch._C.DisableTorchFunction():
                check_shape(site, x, nesting)
        return shaped(site, x)

    with provenance or nullcontext(), _escapes(provenance) as escaped:
        for name, site in traces.model_sites:
            model_costs.append(
                counted(site, cost_of(name, site, weight_of(site, weights), traces.closed.get(name), provenance))
            )
            escaped(traces.model_escaped, name)
        for name, site in traces.guide_sites:
            estimator = traces.estimators.get(name)
            log_q = log_prob(name, site, site["fn"])
            if estimator is not None and estimator.sticking_the_landing:
                detached = log_prob(name, {**site, "value": site["value"].detach()}, site["fn"])
                numbers = {**site, "scale": _constant(site["scale"])}
                through[name] = shaped(site, weighted(_scaled(numbers, detached), _constant(weights.guide), provenance))
            if name in traces.closed:
                cost = closed_cost(name, traces.closed[name], traces.guide, traces.model, weights, provenance)
            else:
                cost = weighted(_scaled(site, log_q), weights.guide, provenance)
            counted_cost = counted(site, cost)
            if estimator is not None:
                bare = unmasked(site["fn"])
                score = log_q if bare is site["fn"] else log_prob(name, site, bare)
                scores.append(counted_cost if score is cost else shaped(site, score))
                squares[name] = partial(_shaped_square, shaped, site, bare)
                if isinstance(site["scale"], torch.Tensor) or isinstance(weights.guide, torch.Tensor):
                    weights_alone[name] = shaped(
                        site, weighted(_scaled(site, log_q.detach()), weights.guide, provenance)
                    )
            guide_costs.append(counted_cost)
            escaped(traces.guide_escaped, name)
    return Run(particles, scores, model_costs + guide_costs, {}, squares, through, weights_alone)


def _constant(weight: Any) -> Any:
    return weight.detach() if isinstance(weight, torch.Tensor) else weight


@contextmanager
def _escapes(provenance: Provenance | None) -> Iterator[Callable[[dict[str, int], str], None]]:
    """Give what notes, beside what had left the tensors when a site was drawn, what its log density and those before it read."""
    if provenance is not None:
        provenance.escaped = 0

    def note(noted: dict[str, int], name: str) -> None:
        if provenance is not None:
            noted[name] = noted.get(name, 0) | provenance.escaped

    yield note


def _shaped_square(shaped: Callable, site: Any, fn: Any) -> torch.Tensor:
    return shaped(site, score_squared(site["name"], fn, site["value"]))


def log_prob(name: str, site: Any, fn: Any) -> torch.Tensor:
    """Return the log density of a site's value, naming the site if its shape does not fit."""
    try:
        return log_density(fn, site["value"], *site["args"], **site["kwargs"])
    except PplgradError:
        raise
    except (ValueError, RuntimeError) as error:
        if not is_about_the_value(error):
            raise
        raise impossible_log_prob(name, fn, error) from error


def closed_cost(
    name: str, kind: str, guide: Any, model: Any, weights: CostWeights, provenance: Provenance | None = None
) -> torch.Tensor:
    """Return what stands for a guide site's log density in closed form, as it counts in the objective."""
    node = guide.nodes[name]
    return weighted(_scaled(node, closed_form(name, kind, node, model.nodes.get(name))), weights.guide, provenance)


def cost_of(
    name: str, site: Any, weight: Any = 1.0, closed: str | None = None, provenance: Provenance | None = None
) -> torch.Tensor:
    """Return a site's log density as it counts in the objective: scaled, masked and weighted.

    A model's site whose divergence is in closed form counts with its guide's site alone.
    """
    if closed == "kl":
        return torch.zeros_like(log_prob(name, site, site["fn"]))
    return weighted(_scaled(site, log_prob(name, site, site["fn"])), weight, provenance)


def weighted(cost: torch.Tensor, weight: Any, provenance: Provenance | None = None) -> torch.Tensor:
    """Return a cost times its weight in the objective; a weight of 0 leaves nothing, not even of an infinite cost.

    What it depends on stays: the weight may be another one at the next step.
    """
    if isinstance(weight, (int, float)) and weight in (0, 1):
        if weight:
            return cost
        nothing = torch.zeros_like(cost)
        if provenance is not None:
            provenance.follow(nothing, cost)
        return nothing
    return cost * weight


def _scaled(site: Any, log_density: torch.Tensor) -> torch.Tensor:
    scale, mask = site["scale"], site["mask"]
    if mask is None and isinstance(scale, (int, float)) and scale == 1:
        return log_density
    return scale_and_mask(log_density, scale, mask)


def with_particles(site: Any, x: torch.Tensor, particles: int, depth: int) -> torch.Tensor:
    """Return `x` with the particle dimension in front; refuse what the particle plate did not broadcast."""
    if x.dim() <= depth:
        declared = {frame.dim for frame in site["cond_indep_stack"]}
        batch = x.shape if x.dim() < depth else x.shape[1:]
        # A program that does not broadcast may well have moved the particles into a dimension of its own.
        if all(size == 1 or i - len(batch) in declared for i, size in enumerate(batch)):
            if x.dim() < depth:
                return x.expand(particles, *(1,) * (depth - 1 - x.dim()), *x.shape)
            if x.shape[0] == particles:
                return x
    raise ProgramError(
        f"Site '{site['name']}' cannot run under vectorize_particles: its batch shape {tuple(x.shape)} has dimensions "
        f"that no plate declares; declare them with a plate or to_event, or use vectorize_particles=False."
    )


def _plates(site: Any, x: torch.Tensor) -> tuple[Plate, ...]:
    """Return the site's plates, except one whose dimension the log density does not span in full."""
    batch = x.shape[1:]
    return tuple(
        Plate(frame.name, frame.dim, int(frame.size), int(frame.full_size or frame.size))
        for frame in site["cond_indep_stack"]
        if frame.vectorized and frame.name != PARTICLES and -frame.dim <= len(batch) and batch[frame.dim] == frame.size
    )


def specify(run: Run, traces: Traces, provenance: Provenance | None) -> tuple[list[SiteSpec], list[CostSpec]]:
    """Return the specifications of a run's sites and costs: plates, estimators, and what each log density reads.

    Without provenance everything is taken to read every site drawn before it, which is unbiased for any program.
    """
    sites: list[SiteSpec] = []
    costs: list[CostSpec] = []
    drawn = list(traces.estimators)
    scores = dict(zip(drawn, run.scores, strict=True))
    plates = {name: _plates(traces.guide.nodes[name], scores[name]) for name in drawn}

    def reads(x: torch.Tensor, own: tuple[Plate, ...], escaped: int, before: list[str]) -> dict[str, Read]:
        if provenance is None:
            return dict.fromkeys(before, WHOLE)
        found = {}
        for name in provenance.names(provenance.of_these((x,))):
            if name not in plates:
                continue  # A draw of the model's, which is known by what it was computed from, too.
            shared = [(plate.name, plate.dim) for plate in own if plate in plates[name] and plate.size > 1]
            mixed = provenance.mixed(x, name, shared) if shared else None
            found[name] = Read(EVERY, mixed) if mixed else OWN
        return {**found, **{name: WHOLE for name in provenance.names(escaped) if name in plates}}

    arrays = iter(run.costs)
    for name, site in traces.model_sites:
        x = next(arrays)
        own = _plates(site, x)
        costs.append(CostSpec(name, own, 1.0, reads(x, own, traces.model_escaped.get(name, 0), drawn)))
    before: list[str] = []
    for name, site in traces.guide_sites:
        x = next(arrays)
        escaped = traces.guide_escaped.get(name, 0)
        own = _plates(site, x)
        whole = reads(x, own, escaped, before)
        estimator = traces.estimators.get(name)
        if estimator is None:
            costs.append(CostSpec(name, own, -1.0, whole))
            continue
        closed = name in traces.closed
        score = scores[name]
        # The score of a site whose cost is not scaled is that cost.
        upstream = dict(whole) if score is x else reads(score, plates[name], escaped, before)
        for other, also in ({} if closed else whole).items():
            upstream[other] = upstream[other].joined(also) if other in upstream else also
        itself = upstream.pop(name, OWN)
        sites.append(SiteSpec(name, plates[name], estimator, upstream))
        if not closed or provenance is None:
            whole = {**upstream, **dict.fromkeys(drawn if closed else (), WHOLE), name: itself}
        costs.append(CostSpec(name, own, -1.0, whole, closed))
        before.append(name)
    return sites, costs
