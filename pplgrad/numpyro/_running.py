"""How a `TraceGrad_ELBO` runs a program: its particles, their branches, and what its baselines need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, trace

from pplgrad.configuration import (
    EstimatorMapping,
    Resolved,
    own_estimator,
    refuse_pyros_baseline,
    refuse_unmatched,
    resolve,
)
from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.core.off_policy import OffPolicy
from pplgrad.core.plates import Read
from pplgrad.core.program import Program, Proposed
from pplgrad.core.sites import Run
from pplgrad.engine.checks import (
    refuse_drawn_by_model,
    refuse_misuse,
)
from pplgrad.engine.closed_forms import ClosedForms, Counting
from pplgrad.engine.layout import Layout
from pplgrad.engine.marginal_sites import refuse_unfollowed
from pplgrad.errors import ConfigurationError, ProgramError, first_line
from pplgrad.numpyro._array_ops import OPS, JaxOps
from pplgrad.numpyro._baselines import NumPyroBaselines
from pplgrad.numpyro._compat_jax import TRACING_ERRORS, reused
from pplgrad.numpyro._evaluator import Particle
from pplgrad.numpyro._rerun.joint import NumPyroReruns
from pplgrad.numpyro._tracing.control_flow import FlowMessenger
from pplgrad.numpyro._tracing.handlers import site_info
from pplgrad.numpyro._tracing.particle_trace import ParticleOutputs, ParticleTrace, run_particle
from pplgrad.numpyro._tracing.relaxation_checks import misused, raise_if_index
from pplgrad.numpyro._tracing.specification import (
    densities_read,
    numbered,
    outputs_with_gradient,
    refuse_jumps,
    refuse_moving,
    sizes_of,
    specify,
)


class Runner:
    """Runs a program for an ELBO, whose settings these are."""

    num_particles: int
    vectorize_particles: Any
    vectorize_particles_fn: Callable
    objective: Objective
    higher_order: bool
    max_parallel: int | None
    branch_sharding: jax.sharding.Sharding | None
    fuse: bool
    _mapping: EstimatorMapping
    _closed: ClosedForms
    _resolved: dict[str, Resolved]
    _stateless: set[str]
    _vectorized_particles: int

    def _with_one_minibatch(self, key: jax.Array, program: Program) -> Program:
        """Make the particles of one bound draw the same elements of a subsampled plate: a weight is that of one data point."""
        proposal = self.objective.proposal if isinstance(self.objective, OffPolicy) else None
        if isinstance(self.objective, MultiSample) and self.num_particles > 1:
            hidden, mine = ["sample", "prng_key", "control_flow"], jax.random.fold_in(reused(key), 0xDA7A)
            model, guide = (seed(f, mine, hide_types=hidden) for f in (program.model, program.guide))
            program = program._replace(model=model, guide=guide)
            proposal = None if proposal is None else seed(proposal, mine, hide_types=hidden)
        return program if proposal is None else program._replace(guide=Proposed(program.guide, proposal))

    def _counting(self, program: Program) -> Counting:
        with trace() as seen:
            weights = self.objective.weights(program.args, program.kwargs)
        for name, site in seen.items():
            if site["type"] == "param":
                raise ConfigurationError(
                    f"A weight of {type(self.objective).__name__} reads the parameter '{name}' with numpyro.param, which keeps its first value "
                    "there: no handler stands around the function. Pass what it reads as an argument of the program."
                )
        return Counting(weights, self._closed)

    def _runs(
        self, rng_key: jax.Array, params: dict, program: Program
    ) -> tuple[list[tuple[ParticleOutputs, ParticleTrace, dict[str, dict[str, Read]] | None]], JaxOps]:
        """Run the particles: as one traced function mapped over their keys, or one by one if it cannot be traced.

        Return the runs, and the operations that know of them which arrays are rows of one.
        """
        several = self.num_particles > 1
        keys = jax.random.split(reused(rng_key), self.num_particles) if several else None
        try:
            particle, static, reads = self._traced(reused(rng_key if keys is None else keys[0]), params, program)
        except TRACING_ERRORS as error:
            if several and self.vectorize_particles is not False:
                raise ProgramError(
                    "The program cannot run under vectorize_particles, because its Python control flow depends on a "
                    f"value; use vectorize_particles=False. ({first_line(error)})"
                ) from error
            keys = [rng_key] if keys is None else list(keys)
            return self._one_by_one(keys, params, program), OPS
        self._check(static)
        if keys is None:
            found = [jnp.asarray(x)[None] for x in particle(reused(rng_key))]
        else:
            found = self.vectorize_particles_fn(particle, reused(keys))
        arrays, views = particle.unpacked(found)
        return [(arrays, static, reads)], JaxOps(views)

    def _traced(
        self, key: jax.Array, params: dict, program: Program
    ) -> tuple[Particle, ParticleTrace, dict[str, dict[str, Read]]]:
        """Trace one particle once; return it as a function of the key, and what its densities read."""
        seen: list[ParticleTrace] = []
        counting = self._counting(program)

        def particle(key: jax.Array, params: dict) -> ParticleOutputs:
            arrays, static = run_particle(key, params, program, self._resolve, counting)
            seen.append(static)
            return arrays

        try:
            closed, shapes = jax.make_jaxpr(particle, return_shape=True)(key, params)
        except TypeError as error:
            if any(found.estimator.relaxes for found in self._resolved.values()):
                raise_if_index(error)
            raise
        numbers, read = numbered(closed, shapes, seen[-1])
        reads = densities_read(seen[-1], numbers, read, sizes_of(closed))
        reached = cache(lambda: outputs_with_gradient(numbers, closed, key, params))
        refuse_moving(seen[-1], numbers, reached)
        refuse_jumps(seen[-1], numbers, closed, reached)
        if seen[-1].extended:
            costs = [*numbers.model_costs.values(), *numbers.guide_costs.values()]
            found = misused(closed, seen[-1].extended, seen[-1].reparameterized, costs)
            refuse_misuse(Layout.build(*specify(seen[-1], reads)), *found)
        return Particle(closed, shapes, params, self.fuse), seen[-1], reads

    def _one_by_one(
        self, keys: list, params: dict, program: Program
    ) -> list[tuple[ParticleOutputs, ParticleTrace, dict[str, dict[str, Read]] | None]]:
        """Run particles as plain Python: every cost is charged to all that was drawn before it."""
        runs: list[tuple[ParticleOutputs, ParticleTrace, dict[str, dict[str, Read]] | None]] = []
        counting = self._counting(program)
        for key in keys:
            arrays, static = run_particle(key, params, program, self._resolve, counting)
            refuse_moving(static, arrays, params=params)
            refuse_unfollowed(static.summed)
            refuse_drawn_by_model(self.objective, static.from_prior)
            runs.append((jax.tree.map(lambda x: jnp.asarray(x)[None], replace(arrays, probes={})), static, None))
        return runs

    def _branches(
        self, key: jax.Array, params: dict, program: Program, runs: list, parts: list[tuple[Layout, Run]]
    ) -> list[NumPyroReruns]:
        """Return what runs the branches of each run: mapped over particles as the run was, or one by one."""
        keys = [key] if self.num_particles == 1 else list(jax.random.split(reused(key), self.num_particles))
        together = len(runs) == 1 and runs[0][2] is not None
        result = []
        for number, ((arrays, static, _), (layout, _)) in enumerate(zip(runs, parts, strict=True)):
            mine = keys if together else keys[number : number + 1]
            map_particles = self.vectorize_particles_fn if len(mine) > 1 else None
            noise = jax.random.fold_in(reused(mine[0]), 0x5EED)
            result.append(
                NumPyroReruns(
                    program,
                    params,
                    mine,
                    noise,
                    arrays,
                    static.event_dims,
                    layout,
                    self._resolve,
                    map_particles,
                    together,
                    self._registered([runs[number]], params)[0],
                    self._counting(program),
                    None if self.max_parallel is None else self.max_parallel // self._vectorized_particles,
                    self.fuse,
                    self.branch_sharding,
                )
            )
        return result

    def _resolve(self, name: str, msg: Any, where: FlowMessenger | None = None) -> Estimator:
        """Choose a site's estimator: the ELBO's mapping, the site's own or the guide wrapper's, the default."""
        site = site_info(msg, name, self.num_particles, where, self.objective)
        refuse_pyros_baseline(name, msg["infer"])
        own = own_estimator(name, msg["infer"], site.has_rsample)
        found = resolve(self._mapping, own, site, "pplgrad" in msg["infer"], self.higher_order)
        self._resolved[name] = found
        # Only a wrapped guide can register what is learned, and it knows nothing of the ELBO's argument.
        if "pplgrad" not in msg["infer"] or self._mapping.find(name) is not None:
            self._stateless.add(name)
        return found.estimator

    def _check(self, static: ParticleTrace) -> None:
        refuse_drawn_by_model(self.objective, static.from_prior)
        refuse_unmatched(self._mapping, static.estimators, static.observed, "TraceGrad_ELBO(estimators=...)")
        for mapping in static.mappings:
            refuse_unmatched(mapping, static.estimators, static.observed, "config_estimators")
        self._closed.refuse_unmatched(list(static.estimators))

    @staticmethod
    def _registered(runs: list, params: dict) -> tuple[dict, dict]:
        """Return the parameters and the state that the wrapped guide registered, by (site, key)."""
        learned, states = {}, {}
        for arrays, static, _ in runs:
            for (token, key), name in static.params.items():
                if token in static.tokens:
                    fresh = arrays.fresh_params.get(name)
                    learned[static.tokens[token], key] = (
                        params[name] if fresh is None else jax.tree.map(lambda x: x[0], fresh)
                    )
            for (token, key), name in static.mutables.items():
                if token in static.tokens:
                    states[static.tokens[token], key] = jax.tree.map(lambda x: x[0], arrays.mutable[name])
        return learned, states

    def _host(self, runs: list, parts: list[tuple[Layout, Run]], params: dict, program: Program) -> NumPyroBaselines:
        """Gather what baselines with state, networks or functions need."""
        sites, ancestors, values = {}, {}, {}  # type: ignore[var-annotated]
        for (arrays, static, _), (layout, _) in zip(runs, parts, strict=True):
            sites.update({site.name: site for site in layout.sites})
            ancestors.update(layout.ancestors)
            values.update({name: (value, static.event_dims[name]) for name, value in arrays.values.items()})
        nets, states = self._registered(runs, params)
        if len(runs) > 1:
            values = {}
        dtype = next((cost.dtype for _, run in parts for cost in run.costs), jnp.result_type(float))
        indices = {name: index for name, index in parts[0][1].indices.items()} if len(runs) == 1 else {}
        if self.num_particles == 1:
            indices = {name: index[0] for name, index in indices.items()}
        return NumPyroBaselines(sites, ancestors, values, indices, program, nets, states, dtype)
