"""How an ELBO runs a program: its particles, together or one by one, watched or not, and what checks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from pyro.infer.util import is_validation_enabled

from pplgrad.configuration import (
    EstimatorMapping,
    Resolved,
    collect_mappings,
    refuse_unmatched,
    resolve,
    watcher_of,
)
from pplgrad.core.estimator import Estimator
from pplgrad.core.filtering import FIVO
from pplgrad.core.objectives import MultiSample, Objective, ReweightedWakeSleep
from pplgrad.core.off_policy import OffPolicy
from pplgrad.core.program import Program, Proposed
from pplgrad.core.sites import Run
from pplgrad.engine.checks import refuse_drawn_by_model, refuse_lost, refuse_lost_in_model, refuse_misuse
from pplgrad.engine.closed_forms import ClosedForms
from pplgrad.engine.filter_checks import refuse_options
from pplgrad.engine.layout import Layout
from pplgrad.engine.records import Record
from pplgrad.engine.surrogate import estimate
from pplgrad.monitoring.watch import Watcher
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._baselines import Networks, baselines_of, state_of_functions
from pplgrad.pyro._distributed import TorchDataParallel
from pplgrad.pyro._evaluation import Evaluation
from pplgrad.pyro._filter import Filtered
from pplgrad.pyro._mixtures import components
from pplgrad.pyro._recreated_params import keeping_params
from pplgrad.pyro._rerun.comparison import ParticlesInteract
from pplgrad.pyro._rerun.joint import PyroReruns
from pplgrad.pyro._rerun.summed_values import refuse_mixed_values
from pplgrad.pyro._rerun.wake_sleep import sleep_phase
from pplgrad.pyro._reuse.dependency_structure import Structure, Structures
from pplgrad.pyro._reuse.guards import Guard
from pplgrad.pyro._reuse.tensors_before import tensors_before
from pplgrad.pyro._tracing.handlers import SharedMinibatch, site_info
from pplgrad.pyro._tracing.host_checks import Nesting, broadcasting, refuse_density_of_hidden_draw
from pplgrad.pyro._tracing.particle_trace import (
    Traces,
    check_match,
    generators,
    record,
    restore,
    run_traces,
    watching_infer,
)
from pplgrad.pyro._tracing.proposals import log_normalizer
from pplgrad.pyro._tracing.provenance import Provenance
from pplgrad.pyro._tracing.threads import OtherThreads

Result = TypeVar("Result")


def vectorized_or_sequential(known: Structure | None, run: Callable[[], Result]) -> Result:
    """Return what a run gives; where it finds that particles or branches meet, from the same random state with each by itself.

    That is found in a step that is watched alone, so that others need not note the state.
    """
    if known is None or not known.following:
        return run()
    before = generators()
    try:
        return run()
    except ParticlesInteract as interaction:
        known.run_sequentially(interaction.message)
    restore(before)
    return run()


class Runner:
    """Runs a program for an ELBO, whose settings these are."""

    num_particles: int
    vectorize_particles: bool
    max_plate_nesting: float
    objective: Objective
    higher_order: bool
    max_parallel: int | None
    _mapping: EstimatorMapping
    _closed: ClosedForms
    _resolved: dict[Any, Resolved]
    _watcher: Watcher | None
    _compiler: Any
    _peers: TorchDataParallel | None
    _networks: Networks
    _structures: Structures
    _guess_max_plate_nesting: Callable
    _vectorized_num_particles: Callable

    def _runs(self, program: Program, known: Structure | None) -> Iterator[tuple[Traces, Provenance | None]]:
        """Run the particles, following provenance where the structure is to be found (`known.following`)."""
        apart = known is not None and known.apart
        vectorized = self.vectorize_particles and self.num_particles > 1 and not apart
        shown = program
        proposal = self.objective.proposal if isinstance(self.objective, OffPolicy) else None
        if self.vectorize_particles and self.max_plate_nesting == math.inf:
            self._guess_max_plate_nesting(*program)
        if vectorized:
            nesting = Nesting(int(self.max_plate_nesting) - 1)
            model, guide = (self._vectorized_num_particles(nesting(f)) for f in (program.model, program.guide))
            shown = program._replace(model=model, guide=guide)
            proposal = None if proposal is None else self._vectorized_num_particles(nesting(proposal))
        if proposal is not None:
            shown = shown._replace(guide=Proposed(shown.guide, proposal))
        minibatch = SharedMinibatch() if isinstance(self.objective, MultiSample) else nullcontext()
        for _ in range(1 if vectorized else self.num_particles):
            watched = known is not None and known.following
            # The elements that an earlier particle drew are there before this one, which reads its data at them.
            shared = minibatch.elements() if isinstance(minibatch, SharedMinibatch) else ()
            provenance = Provenance([*self._given(program), *shared]) if watched else None
            state = state_of_functions(self._every_estimator()) if watched else {}
            if watched:
                torch.clear_autocast_cache()  # What an earlier step cast would come from nowhere.
            with collect_mappings() as mappings, minibatch:
                with (
                    broadcasting(int(self.max_plate_nesting) - 1) if vectorized else nullcontext(),
                    OtherThreads() if watched else nullcontext() as others,
                ):
                    traces = run_traces(shown, self._resolve, provenance, self.max_plate_nesting)
            traces.particles, traces.apart = self.num_particles if vectorized else 1, apart
            traces.changed = [function for function, guard in state.items() if guard is None or not guard.holds()]
            traces.compared = not (watched and known is not None and known.second_run_due)
            traces.shown = shown
            if watched and others is not None and others.ran:
                # A program of which everything is known hands nothing to another thread.
                traces.unseen = Guard.of(*program) is None
            self._watcher = watcher_of(mappings)
            self._close(traces, program)
            if known is None or provenance is not None:
                self._check(traces, mappings, provenance)
            yield traces, provenance

    def _filtered(self, program: Program, objective: FIVO) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the objective and its surrogate where the particles are filtered; if it raises, the param store is as it was."""
        together = self.num_particles > 1
        refuse_options(
            objective,
            {
                "vectorize_particles=False": together and not self.vectorize_particles,
                "compile": self._compiler is not None,
                "process_group": self._peers is not None,
                "max_parallel": self.max_parallel is not None,
                "closed_form": bool(self._closed.kinds),
            },
        )
        with keeping_params():
            if together and self.max_plate_nesting == math.inf:
                self._guess_max_plate_nesting(*program)
            depth = int(self.max_plate_nesting) if together else 0
            model, guide = watching_infer(program.model), program.guide
            if together:
                nesting = Nesting(depth - 1)
                model, guide = (self._vectorized_num_particles(nesting(f)) for f in (model, guide))
            shown = program._replace(model=model, guide=guide)
            filtered = Filtered(shown, objective, self._resolve, self.num_particles, depth)
            value, surrogate = filtered.run()
            refuse_options(objective, {"config_estimators(watch=...)": watcher_of(filtered.mappings) is not None})
            refuse_unmatched(self._mapping, filtered.estimators, filtered.observed, "TraceGrad_ELBO(estimators=...)")
            for mapping in filtered.mappings:
                refuse_unmatched(mapping, filtered.estimators, filtered.observed, "config_estimators")
        return value, surrogate

    def _compare_summed(self, traces: Traces) -> None:
        """Compare what sites that are summed out add to densities with the plain way."""
        together = traces.particles > 1
        with broadcasting(int(self.max_plate_nesting) - 1) if together else nullcontext():
            refuse_mixed_values(traces, traces.shown)

    def _given(self, program: Program) -> list[torch.Tensor]:
        """Return the tensors that are there before a run."""
        chosen = [found.estimator for found in self._resolved.values()]
        return tensors_before(*program, self.objective, self._mapping, chosen)

    def _every_estimator(self) -> list[Estimator]:
        """Return the estimators that are known before a run."""
        return [*self._mapping.estimators.values(), *(found.estimator for found in self._resolved.values())]

    def _close(self, traces: Traces, program: Program) -> None:
        """Note which sites have their divergence or entropy in closed form."""
        for name, estimator in traces.estimators.items():
            own = traces.guide.nodes[name]["infer"].get("closed_form")
            if own is not None or self._closed.kinds:
                weights = self.objective.weights(program.args, program.kwargs)
                kind = self._closed.find(name, own, estimator, name in traces.model.nodes, weights)
                if kind is not None:
                    traces.closed[name] = kind

    def _resolve(self, name: str, fn: Any, own: Estimator | None, plates: frozenset[int]) -> Estimator:
        """Choose a site's estimator: the ELBO's mapping, the site's own or the guide wrapper's, the default."""
        key = (name, fn.__class__, fn.has_rsample, fn.shape(), own, components(fn))
        found = self._resolved.get(key)
        if found is None:
            site = site_info(name, fn, self.num_particles, plates, self.objective)
            found = self._resolved[key] = resolve(self._mapping, own, site, True, self.higher_order)
        return found.estimator

    def _check(self, traces: Traces, mappings: list[EstimatorMapping], provenance: Provenance | None) -> None:
        """Refuse a guide and model that do not match, and a key of a mapping that names no latent site."""
        refuse_drawn_by_model(self.objective, traces.from_prior())
        check_match(traces, self.max_plate_nesting)
        hidden = traces.hidden_draws if provenance is None else provenance.hidden_draws
        refuse_density_of_hidden_draw(
            traces.guide, lambda x: hidden and (provenance is None or provenance.is_random(x))
        )
        if provenance is not None and provenance.escaped_ever:
            return  # The sites of this program depend on its draws: a name may be absent this time.
        observed = [name for name, site in traces.guide_sites + traces.model_sites if site["is_observed"]]
        refuse_unmatched(self._mapping, traces.estimators, observed, "TraceGrad_ELBO(estimators=...)")
        for mapping in mappings:
            refuse_unmatched(mapping, traces.estimators, observed, "config_estimators")
        self._closed.refuse_unmatched(list(traces.estimators))

    def _record(self, traces: Traces, provenance: Provenance | None, program: Program, checked: bool = False) -> Run:
        """Compute the log densities of a run; shapes are checked where the structure is not known already, or if `checked`."""
        vectorized = traces.particles > 1
        depth = int(self.max_plate_nesting) if vectorized else 0
        weights = self.objective.weights(program.args, program.kwargs)
        nesting = None
        if (checked or provenance is not None) and is_validation_enabled():
            nesting = self.max_plate_nesting
        return record(traces, traces.particles, vectorized, depth, provenance, weights, nesting)

    def _branches(
        self,
        program: Program,
        traces: Traces,
        layout: Layout,
        run: Run,
        provenance: Provenance | None = None,
    ) -> PyroReruns:
        vectorized = traces.particles > 1
        depth = None
        if self.vectorize_particles and not traces.apart:
            depth = int(self.max_plate_nesting) + (0 if vectorized else 1)
        weights = self.objective.weights(program.args, program.kwargs)
        at_once = None if self.max_parallel is None else self.max_parallel // run.particles
        given = None if provenance is None else partial(self._given, program)
        unfollowed = self._structures.unfollowed(program)
        return PyroReruns(program, traces, layout, run, vectorized, depth, weights, at_once, given, unfollowed)

    def _checked_estimate(
        self,
        program: Program,
        record: Record | None = None,
        known: Structure | None = None,
        peers: TorchDataParallel | None = None,
    ) -> tuple[Evaluation, float]:
        """Run the program and return the estimate and its value; if it raises, the param store is as it was."""
        with keeping_params():
            evaluation = self._evaluate(program, record, known, peers)
            value = evaluation.checked(evaluation.numbers().tolist())
        return evaluation, value

    def _evaluate(
        self,
        program: Program,
        record: Record | None = None,
        known: Structure | None = None,
        peers: TorchDataParallel | None = None,
    ) -> Evaluation:
        """Run the program and return the objective's value, surrogate and new states, which are not stored yet."""
        known = known or self._structures.find(program)
        structure = known
        return vectorized_or_sequential(known, lambda: self._evaluate_particles(program, record, structure, peers))

    def _evaluate_particles(
        self,
        program: Program,
        record: Record | None,
        known: Structure,
        peers: TorchDataParallel | None,
    ) -> Evaluation:
        """Run particles and branches, those that may at once."""
        layouts: list[Layout] = []
        runs: list[Run] = []
        traced: list[Traces] = []
        branches: list[PyroReruns] = []
        for traces, provenance in self._runs(program, known):
            run = self._record(traces, provenance, program)
            layouts.append(known.layout(traces, run, provenance, self.objective))
            refuse_misuse(layouts[-1], known.misused, known.cut)
            refuse_lost(traces.estimators, known.lost)
            refuse_lost_in_model(traces.from_prior(), known.lost)
            run.indices.update(traces.indices() if any(site.plates for site in layouts[-1].sites) else {})
            runs.append(run)
            traced.append(traces)
            branches.append(self._branches(program, traces, layouts[-1], run, provenance))
            if not traces.compared:
                self._compare_summed(traces)
            if provenance is not None and traces.particles > 1:
                branches[-1].refuse_particles_that_meet(provenance)
            if provenance is not None and self.num_particles > traces.particles:
                alone = baselines_of(self._networks, layouts[-1:], [run], [traces], provenance, program)
                if alone is not None:
                    alone.check_functions()
            last = provenance
        host = baselines_of(self._networks, layouts, runs, traced, last if len(runs) == 1 else None, program)
        result = estimate(
            OPS,
            list(zip(layouts, runs, strict=True)),
            host,
            branches,
            self.objective,
            self.higher_order,
            record,
            peers,
            log_normalizer(self.objective, runs[0].costs),
        )
        if isinstance(self.objective, ReweightedWakeSleep) and self.objective.sleeps:
            result.surrogate = result.surrogate + sleep_phase(self.objective, program)
        return Evaluation(result, traced, runs, host)
