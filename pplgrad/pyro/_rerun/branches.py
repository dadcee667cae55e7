"""Branches in Pyro: the program run again, with all branches in one particle plate or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pplgrad.core.alternatives import Values
from pplgrad.core.noise import Noise
from pplgrad.core.objectives import CostWeights
from pplgrad.core.program import Program
from pplgrad.core.sites import Run
from pplgrad.engine.branches import chunks, exists_or_not, with_other_sites
from pplgrad.engine.checks import another_network
from pplgrad.engine.every_draw import refuse_other_sites
from pplgrad.engine.layout import Layout
from pplgrad.errors import CompileError, EstimatorError, ProgramError
from pplgrad.pyro._array_ops import OPS, TorchNoise, placed
from pplgrad.pyro._baselines import PREFIX, forgetting
from pplgrad.pyro._recording import is_recording, moved_generators
from pplgrad.pyro._rerun.changed_elements import ChangedRun, Unfollowed
from pplgrad.pyro._rerun.comparison import (
    compare_rows,
    refuse_another_run,
    refuse_interaction,
    same_branches,
    values_at,
)
from pplgrad.pyro._rerun.draws import PyroDraw
from pplgrad.pyro._rerun.enumeration import Fixed
from pplgrad.pyro._rerun.interventions import Branch, Fresh, Intervention, Replace, deep, joined
from pplgrad.pyro._tracing.host_checks import PARTICLES, Nesting, at_other_values, broadcasting
from pplgrad.pyro._tracing.marginal_sites import trace_against, weight_of
from pplgrad.pyro._tracing.particle_trace import (
    Traces,
    closed_cost,
    cost_of,
    samples_of,
    with_particles,
    without_shapes,
)
from pplgrad.pyro._tracing.provenance import Provenance
from pplgrad.pyro._tracing.relaxations import ExtendedModelMessenger, is_extended, kind_of


class PyroBranches:
    """`pplgrad.engine.branches.BranchHost` for one run of a program."""

    def __init__(
        self,
        program: Program,
        traces: Traces,
        layout: Layout,
        run: Run,
        vectorized: bool,
        depth: int | None,
        weights: CostWeights,
        at_once: int | None,
        given: Callable[[], Iterable[torch.Tensor]] | None = None,
        unfollowed: set[str] | None = None,
    ) -> None:
        """`depth` is the place of the particle plate where branches are vectorized, None where they run one by one.

        No more than `at_once` branches of each particle are in the plate. `given` returns the tensors that were there before, where
        the step is watched: then branches are compared with the plain way (`_rerun/comparison.py`). Branches that change one element each are
        followed from the draw (`_rerun/changed_elements.py`) and not run, but those of the sites that are `unfollowed`, to which this adds; None
        stands for all.
        """
        self._program = program
        self._traces = traces
        self._layout = layout
        self._particles = run.particles
        self._vectorized = vectorized
        self._depth = depth
        self._weights = weights
        self._at_most = at_once
        self._before = run.costs
        self._given = given
        self._unfollowed = unfollowed
        self._compared = given is None or traces.compared
        self._rounding = 0.0

    @property
    def can_differentiate(self) -> bool:
        """Whether branches can be differentiated."""
        return True

    @property
    def held_at_once(self) -> int | None:
        """The number of differentiated branches of a particle that may be held at once."""
        return 1 if self._depth is None else self._at_most

    def draw(self, site: str) -> PyroDraw:
        """Return the draw of a site."""
        return PyroDraw(site, self._traces.guide.nodes[site], self._vectorized)

    def noise(self, site: str) -> Noise:
        """Return the noise of a site's estimator."""
        return TorchNoise()

    def learned(self, site: str, name: str, start: Any) -> torch.Tensor:
        """Return a number or array from the param store, put there at first use."""
        node = self._traces.guide.nodes[site]

        def made() -> torch.nn.Parameter:
            return torch.nn.Parameter(node["fn"].log_prob(node["value"]).new_tensor(start))

        found = pyro.param(f"{PREFIX}{site}.{name}", made)
        if found.shape != np.shape(start):
            what = self._traces.estimators[site]
            raise EstimatorError(another_network(what, site, name, found.shape, np.shape(start), forgetting(site)))
        return found

    def branch_costs(self, values: Mapping[str, Values]) -> dict[str, list[torch.Tensor]]:
        """Return the costs in all branches."""
        with torch.no_grad():
            unfollowed = values.keys() if self._unfollowed is None else self._unfollowed
            found = {name: self._of_elements(name, x) for name, x in values.items() if name not in unfollowed}
            followed = {name: costs for name, costs in found.items() if costs is not None}
            rest = {name: x for name, x in values.items() if name not in followed or self._given is not None}
            plain = self._run_all(rest, None) if rest else {}
            for name in followed.keys() & plain.keys():
                if not same_branches(self._layout, name, followed[name], plain[name], self._rounding):
                    self._leave_alone(name)
            return {**followed, **plain}

    def _leave_alone(self, name: str) -> None:
        """Run the branches of a site from here on."""
        if self._unfollowed is not None:
            self._unfollowed.add(name)

    def _of_elements(self, name: str, values: Values) -> list[torch.Tensor] | None:
        """Return the costs in branches that change one element each, (particles * count, *batch); None where all are run."""
        elements, others = values.elements, [site for site, _ in self._traces.guide_sites if site != name]
        if elements is None or not elements.axes or self._traces.from_prior() or self._traces.hidden_draws:
            return None
        if any(self._follows(site, name) for site in others):
            return None
        if self._traces.unseen:  # What another thread computes is followed by nothing.
            return None
        event, every = self._traces.guide.nodes[name]["fn"].event_dim, elements.values
        every = every[0] if self._depth is None else deep(every, event, self._depth).movedim(1, 0)
        drawn = self._at_draw(name, event).to(every.dtype)
        # In a plate of particles the value has its dimension, and more of size 1 in front of its own.
        before = drawn.dim() - (elements.values.dim() - 2)
        axes = [at + before for at in elements.axes]
        found = []
        try:
            for first, last in chunks(values.count, self._at_most):
                numbers = None if last - first == values.count else torch.arange(first, last, device=every.device)
                found.append(self._followed(ChangedRun(drawn, every, axes, numbers), name))
        except Unfollowed:
            self._leave_alone(name)
            return None
        costs = [torch.cat(column, 1) if len(column) > 1 else column[0] for column in zip(*found, strict=True)]
        return [x.reshape(self._particles * values.count, *x.shape[2:]) for x in costs]

    def _at_draw(self, name: str, event: int) -> torch.Tensor:
        """Return the draw of a site as the program has it, in a plate of all particles or without one."""
        if self._depth is None:
            return self._traces.guide.nodes[name]["value"].detach()
        return self._kept(name, event, self._depth).detach()[:, 0]

    def _followed(self, run: ChangedRun, site: str) -> list[torch.Tensor]:
        """Return the costs of a run at the draw in each of the branches that it follows: (particles, branches, *batch)."""
        rows, depth = (1, None) if self._depth is None else (self._particles, self._depth)

        def replace(name: str, fresh: Fresh, fn: Any) -> torch.Tensor:
            return run.value if name == site else self._at_draw(name, fn.event_dim)

        apart = nullcontext() if depth is None else broadcasting(depth - 1, site)
        # What is drawn here is of no use: without a plate the generators go on from where they are.
        held = torch.random.fork_rng(devices=self._traces.rng_devices()) if depth is None else nullcontext()
        with moved_generators(), held, apart, run:
            traces = self._run(replace, None, rows, depth)
            every = self._costs(*traces, None, rows, depth)
        if run.failed:
            raise Unfollowed
        self._rounding = max(self._rounding, run.rounding)
        return [run.rows(x).movedim(0, 1) for x in every]

    def value_costs(self, values: Mapping[str, Values]) -> dict[str, list[torch.Tensor]]:
        """Return the costs in all branches, with their gradient."""
        return self._run_all(values, None)

    def differentiated_costs(self, values: Mapping[str, Values]) -> dict[str, list[torch.Tensor]]:
        """Return the costs in all branches, with their gradient to the parameters."""
        return self._run_all(values, None, differentiated=True)

    def soft_costs(
        self, values: Mapping[str, Values], temperatures: Mapping[str, Any]
    ) -> dict[str, list[torch.Tensor]]:
        """Return the costs at relaxed values, with their gradient."""
        return self._run_all(values, temperatures)

    def _run_all(
        self, values: Mapping[str, Values], temperatures: Mapping[str, Any] | None, differentiated: bool = False
    ) -> dict[str, list[torch.Tensor]]:
        branches, start = [], 0
        for name, alternatives in values.items():
            branches.append(Branch(name, alternatives, start, start + alternatives.count, differentiated))
            start += alternatives.count
        if not self._compared:
            self._compare_second_run(branches[0].site)
        if self._depth is None:
            self._refuse_hidden_draws(branches[0].site)
            return self._one_by_one(branches, temperatures)
        return self._at_once(branches, start, self._depth, temperatures)

    def path_slopes(
        self, run: Run, sites: Sequence[str], weigh: Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the values of sites with their gradient, and the derivative with respect to them of what `weigh` makes."""
        values = [self._traces.guide.nodes[name]["value"] for name in sites]
        moving = [value for value in values if value.requires_grad]
        total = weigh(run.costs, run.scores) if moving else None
        if total is None or not total.requires_grad:  # No draw moves, or no cost depends on one.
            return [(value, torch.zeros_like(value)) for value in values]
        slopes = iter(torch.autograd.grad(total, moving, retain_graph=True, materialize_grads=True))
        return [(value, next(slopes) if value.requires_grad else torch.zeros_like(value)) for value in values]

    def _follows(self, site: str, chosen: str) -> bool:
        """Return whether a site's draw depends on the chosen site's; a site of this branch alone surely does."""
        return chosen in self._layout.ancestors.get(site, {chosen: 0})

    def _one_by_one(
        self, branches: Sequence[Branch], temperatures: Mapping[str, Any] | None
    ) -> dict[str, list[torch.Tensor]]:
        """Run each branch from the state of the generator in which the primary run began."""
        result = {}
        with moved_generators(), torch.random.fork_rng(devices=self._traces.rng_devices()):
            for branch in branches:
                rows = []
                for number in range(branch.stop - branch.start):
                    with moved_generators():
                        self._traces.restore_rng()
                    with at_other_values(branch.site, self._traces.estimators[branch.site]):
                        traces = self._run(self._replacing(branch, number), temperatures, 1, None)
                        rows.append(self._costs_of_branch(*traces, branch, temperatures))
                result[branch.site] = [torch.cat(column) for column in zip(*rows, strict=True)]
        return result

    def _costs_of_branch(
        self, guide: Any, model: Any, branch: Branch, temperatures: Mapping[str, Any] | None
    ) -> list[torch.Tensor]:
        """Return the costs of a branch that ran by itself, where other sites may exist unless it is relaxed or differentiated."""
        if temperatures is not None:
            return self._costs(guide, model, branch.site)
        found = self._costs_found(guide, model, 1, None, self._weights)
        if branch.differentiated:
            known = {(spec.name, spec.sign) for spec in self._layout.costs}
            refuse_other_sites(self._layout, branch.site, {name for name, _ in found.keys() ^ known})
        return with_other_sites(OPS, self._layout, branch.site, found, self._before)

    def _refuse_hidden_draws(self, site: str) -> None:
        """Refuse draws outside of sites, which other runs have to share, where they cannot."""
        if not self._traces.hidden_draws:
            return
        if self._depth is not None:
            raise ProgramError(
                f"The guide draws random numbers outside of its sample sites (dropout, or sites under block), which the "
                f"branches of site '{site}' would draw anew under vectorize_particles; use "
                "vectorize_particles=False, or ScoreFunction() there."
            )
        if is_recording():
            raise CompileError(
                f"The step cannot be compiled, because the guide draws random numbers outside of its sample sites (dropout, or "
                f"sites under block), which the branches of site '{site}' have to share; use compile=False, or "
                "ScoreFunction() there."
            )

    def _replacing(self, branch: Branch, number: int) -> Replace:
        nodes = self._traces.guide.nodes
        chosen = branch.values.at(placed([number], None, nodes[branch.site]["value"].device))[0, 0]

        def replace(name: str, fresh: Fresh, fn: Any) -> torch.Tensor:
            if name == branch.site:
                return chosen
            if self._follows(name, branch.site):
                return self._following(name, fresh, branch)
            return nodes[name]["value"] if branch.differentiated else nodes[name]["value"].detach()

        return replace

    def _following(self, name: str, fresh: Fresh, branch: Branch) -> torch.Tensor:
        """Return what a site that follows a branch's drew there."""
        return self._constant_if_scored(name, fresh(branch)) if branch.differentiated else fresh(branch)

    def _constant_if_scored(self, name: str, drawn: torch.Tensor) -> torch.Tensor:
        """Return what a site drew, as a constant if its estimator uses the score."""
        estimator = self._traces.estimators.get(name)
        return drawn.detach() if estimator is not None and estimator.uses_score else drawn

    def _at_once(
        self, branches: Sequence[Branch], count: int, depth: int, temperatures: Mapping[str, Any] | None
    ) -> dict[str, list[torch.Tensor]]:
        """Run all branches of all particles, those of a chunk in one plate, and one chunk after the other."""
        self._refuse_hidden_draws(branches[0].site)
        # What is differentiated is held in any case, and relaxed branches are few.
        at_once = self._at_most if temperatures is None else None
        # The generators go on from here: put back, they would give the same numbers again, as the draws of the next step.
        with moved_generators():
            found = [
                self._rows([branch.between(*chunk) for branch in branches], chunk[1] - chunk[0], depth, temperatures)
                for chunk in chunks(count, at_once)
            ]
        every = [torch.cat(column, 1) for column in zip(*found, strict=True)] if len(found) > 1 else found[0]
        return {
            branch.site: [
                x[:, branch.start : branch.stop].reshape(self._particles * (branch.stop - branch.start), *x.shape[2:])
                for x in every
            ]
            for branch in branches
        }

    def _rows(
        self, branches: Sequence[Branch], count: int, depth: int, temperatures: Mapping[str, Any] | None
    ) -> list[torch.Tensor]:
        """Run branches of all particles in one plate, particle by particle, `count` rows each: (particles, count, *batch)."""
        particles = self._particles

        def replace(name: str, fresh: Fresh, fn: Any) -> torch.Tensor:
            kept = self._kept(name, fn.event_dim, depth)
            parts = []
            for branch in branches:
                if branch.start == branch.stop:
                    continue
                if name == branch.site:
                    values = branch.values.at(torch.arange(branch.values.count, device=kept.device))
                    part = deep(values, fn.event_dim, depth)
                elif self._follows(name, branch.site):
                    value = self._following(name, fresh, branch)
                    part = value.reshape(particles, count, *value.shape[1:])[:, branch.start : branch.stop]
                else:
                    part = kept if branch.differentiated else kept.detach()
                parts.append(part.expand(-1, branch.stop - branch.start, *part.shape[2:]))
            return joined(parts, particles)

        return self._costs_of_rows(replace, temperatures, count, depth, branches[0].site)

    def _kept(self, name: str, event: int, depth: int) -> torch.Tensor:
        """Return the draw of a site for all rows: (particles, 1, *batch, *E)."""
        value = self._traces.guide.nodes[name]["value"]
        return deep((value if self._vectorized else value[None])[:, None], event, depth)

    def _costs_of_rows(
        self,
        replace: Replace,
        temperatures: Mapping[str, Any] | None,
        count: int,
        depth: int,
        site: str,
    ) -> list[torch.Tensor]:
        """Run rows of all particles in one plate, `count` of each particle: (particles, count, *batch).

        While a step is watched, what runs together is compared with what runs by itself.
        """
        particles = self._particles
        # Particles that run together have been compared already, and branches run beside them.
        follow = self._given is not None and not self._vectorized and temperatures is None
        provenance = Provenance(self._given()) if follow and self._given is not None else None
        with broadcasting(depth - 1, site), provenance or nullcontext():
            traces = self._run(replace, temperatures, particles * count, depth, provenance)
            every = self._costs(*traces, None, particles * count, depth)
            watched = self._given is not None and not self._vectorized
            seen = self.every_cost(*traces, every, particles * count, depth) if watched else every
        if provenance is not None:
            refuse_interaction(self._layout, seen, provenance, partial(self.alone, *traces))
        elif watched:
            compare_rows(self._layout, seen, partial(self.alone, *traces, temperatures=temperatures))
        return [x.reshape(particles, count, *x.shape[1:]) for x in every]

    def refuse_particles_that_meet(self, provenance: Provenance) -> None:
        """Raise `ParticlesInteract` where particles of the primary run, which is watched, depend on each other."""
        guide, model = self._traces.guide, self._traces.model
        with provenance:
            costs = self.every_cost(guide, model, self._before, self._particles, self._depth)
        refuse_interaction(self._layout, costs, provenance, partial(self.alone, guide, model))

    def alone(
        self, guide: Any, model: Any, row: int, temperatures: Mapping[str, Any] | None = None
    ) -> list[torch.Tensor] | None:
        """Return the costs of a row of particles or branches by itself, at its own draws; None if the program cannot run so."""
        values = values_at(guide, row)
        own = values_at(model, row, self._traces.from_prior())
        try:
            with moved_generators(), torch.random.fork_rng(devices=self._traces.rng_devices()), torch.no_grad():
                traces = self._run(lambda name, fresh, event: values[name], temperatures, 1, None, own=own)
                return self._costs(*traces, None, weights=self._all_seen)
        except (RuntimeError, IndexError, ValueError, KeyError, TypeError, AssertionError):
            return None

    def _compare_second_run(self, chosen: str) -> None:
        """Run the program on the draws of the primary run, and refuse it if it computes something else."""
        self._compared = True
        nodes, depth = self._traces.guide.nodes, self._depth if self._vectorized else None
        rows = self._particles if self._vectorized else 1
        with moved_generators(), torch.random.fork_rng(devices=self._traces.rng_devices()), torch.no_grad():
            self._traces.restore_rng()
            traces = self._run(lambda name, fresh, event: nodes[name]["value"].detach(), None, rows, depth)
            again = self._costs(*traces, chosen, rows, depth, self._all_seen)
            before = self.every_cost(self._traces.guide, self._traces.model, self._before, rows, depth)
        refuse_another_run(self._layout, before, again, chosen)

    @without_shapes()
    def _run(
        self,
        replace: Callable,
        temperatures: Mapping[str, Any] | None,
        rows: int,
        depth: int | None,
        provenance: Provenance | None = None,
        own: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[Any, Any]:
        """Return the traces of guide and model with `replace` standing outside of everything.

        The model draws anew what it alone draws, unless it is given the values (`own`).
        """
        model, guide, args, kwargs = self._program

        def plated(function: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                with pyro.plate(PARTICLES, rows, dim=-depth), Nesting(depth - 1):  # type: ignore[operator]
                    return function(*args, **kwargs)

            return run if depth is not None else function

        chosen = self._traces.estimators
        with Intervention(self._traces.guide, replace, chosen, temperatures, (args, kwargs), provenance):
            effect = poutine.unwrap(guide)
            if isinstance(effect, Messenger):
                # A guide that is a handler runs the model itself, and keeps both traces.
                if temperatures is not None:
                    raise ProgramError(
                        f"The guide {type(effect).__name__} runs the model itself, where draws cannot be relaxed; use ScoreFunction(), "
                        "LocalExpectation() or DisARM() at its sites."
                    )
                plated(guide)(*args, **kwargs)
                model_trace, guide_trace = effect.get_traces()
                return guide_trace, model_trace
            guide_trace = poutine.trace(plated(guide)).get_trace(*args, **kwargs)
        wide = {name: kind_of(x["fn"]) for name, x in guide_trace.nodes.items() if is_extended(x.get("fn"))}
        nesting = self._traces.nesting if depth is None else depth
        with Intervention(self._traces.model), Fixed(own or {}), ExtendedModelMessenger(wide):
            return guide_trace, trace_against(plated(model), guide_trace, nesting, args, kwargs)

    def every_cost(
        self, guide: Any, model: Any, costs: list[torch.Tensor], rows: int, depth: int | None
    ) -> list[torch.Tensor]:
        """Return the costs of a run as they are compared: those that the objective leaves out too, on which draws depend."""
        if self._all_seen is self._weights:
            return costs
        return self._costs(guide, model, None, rows, depth, self._all_seen)

    @property
    def _all_seen(self) -> CostWeights:
        """The objective's weights, or 1 for all densities if it leaves some out."""
        leaves_out = any(not isinstance(weight, (int, float)) or weight == 0 for weight in self._weights)
        return CostWeights(1.0, 1.0, 1.0) if leaves_out else self._weights

    def _costs(
        self,
        guide: Any,
        model: Any,
        site: str | None,
        rows: int = 1,
        depth: int | None = None,
        weights: CostWeights | None = None,
    ) -> list[torch.Tensor]:
        """Return the costs in the order of the layout, or refuse a run with other sites."""
        found = self._costs_found(guide, model, rows, depth, weights or self._weights)
        wanted = [(spec.name, spec.sign) for spec in self._layout.costs]
        changed = found.keys() ^ wanted
        if changed:
            where = f"the value of site '{site}'" if site is not None else "the values of other sites"
            raise exists_or_not(min(changed)[0], where)
        return [found[key] for key in wanted]

    def _costs_found(
        self, guide: Any, model: Any, rows: int, depth: int | None, weights: CostWeights
    ) -> dict[tuple[str, float], torch.Tensor]:
        """Return the costs of a run by name and sign, those of sites that the layout does not know among them."""
        found = {}
        for sign, side in ((1.0, model), (-1.0, guide)):
            for name, node in samples_of(side):
                if sign > 0:
                    weight = weight_of(node, weights)
                else:
                    weight = weights.observed if node["is_observed"] else weights.guide
                closed = self._traces.closed.get(name)
                if closed is not None and sign < 0:
                    cost = closed_cost(name, closed, guide, model, weights)
                else:
                    cost = cost_of(name, node, weight, closed)
                found[name, sign] = cost[None] if depth is None else with_particles(node, cost, rows, depth)
        return found
