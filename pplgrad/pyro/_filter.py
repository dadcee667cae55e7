"""A particle filter through a program's `pyro.markov` loop, by running the program again as far as each step.

Python holds the state of a program between two steps, so that nothing can resample it. In the run for step t the sites of the steps before take
the values that the particle's ancestors have drawn, with their gradient, and the program brings itself into the state that follows from them.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pplgrad.configuration import EstimatorMapping, collect_mappings
from pplgrad.core.estimator import Estimator
from pplgrad.core.filtering import FIVO
from pplgrad.core.program import Program
from pplgrad.engine.filter_checks import (
    are_scored,
    changed_when_replayed,
    impossible_bound,
    no_loop,
    refuse_after,
    refuse_held,
    refuse_other_steps,
    refuse_subsampled,
)
from pplgrad.engine.particle_filter import ParticleFilter, Step
from pplgrad.errors import ProgramError
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._compat import markov_step
from pplgrad.pyro._distributions import unmasked
from pplgrad.pyro._tracing.handlers import Resolve, SiteMessenger
from pplgrad.pyro._tracing.host_checks import PARTICLES, broadcasting, check_programs, check_shape
from pplgrad.pyro._tracing.particle_trace import cost_of, log_prob, with_particles

LOOP = "pyro.markov loop"


class _Reached(BaseException):
    """Ends the run of a program at the step after the one that it runs for. No program catches it by `except Exception`."""


@dataclass
class Met:
    """What a run has met: its sites by name with the step of each, and its parameters."""

    sites: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    params: set[str] = field(default_factory=set)
    ended: bool = True

    def trace(self) -> Trace:
        """Return the sites as Pyro's own checks take them."""
        found = Trace()
        for name, site in self.sites.items():
            found.add_node(name, **site)
        return found

    def at(self, step: int) -> list[Any]:
        """Return the sites of a step, those before the loop with the first."""
        return [site for name, site in self.sites.items() if self.steps[name] == step]


class _UntilStep(Messenger):
    """Stands around a program: gives the sites of earlier steps their values, and ends the run after a step."""

    def __init__(self, side: str, objective: FIVO, step: int, given: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._side, self._objective, self._step, self._given = side, objective, step, given
        self._loop: Any = None
        self._now = 0
        self.met = Met()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["name"] != PARTICLES:
                drawn = msg["fn"].subsample_size
                size = msg["fn"].size
                refuse_subsampled(msg["name"], size, size if drawn is None else drawn, self._objective)
            return
        if _is_deterministic(msg):
            return
        loop, number = markov_step()
        if loop is None:
            refuse_after(self._side, [msg["name"]] if self._loop is not None else [], self._objective)
        else:
            refuse_after(self._side, [msg["name"]] if self._loop not in (None, loop) else [], self._objective)
            self._loop = loop
        if number > self._step:
            raise _Reached
        self._now = number
        if not msg["is_observed"] and msg["name"] in self._given:
            msg["value"], msg["done"] = self._given[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not (site_is_subsample(msg) or _is_deterministic(msg)):
            if msg["name"] in self.met.sites:
                raise ProgramError(
                    f"The {self._side} has several sites named '{msg['name']}'; give the sites of each step names of their own, such as "
                    f'f"{msg["name"]}_{{t}}".'
                )
            self.met.sites[msg["name"]], self.met.steps[msg["name"]] = msg.copy(), self._now

    def _pyro_post_param(self, msg: Any) -> None:
        self.met.params.add(msg["name"])

    @property
    def looped(self) -> bool:
        """Whether a site stood in a loop."""
        return self._loop is not None


@dataclass
class Filtered:
    """A program whose particles run together, in a plate at dimension −depth (depth 0: one particle without a plate)."""

    program: Program
    objective: FIVO
    resolve: Resolve
    particles: int
    depth: int
    estimators: dict[str, Estimator] = field(default_factory=dict)
    mappings: list[EstimatorMapping] = field(default_factory=list)
    observed: list[str] = field(default_factory=list)
    _axes: dict[str, int] = field(default_factory=dict)
    _rounding: float = 0.0

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the objective and its surrogate."""
        count = self.objective.combined(self.particles)
        found = ParticleFilter(OPS, self.objective, self.particles // count, count)
        steps: list[Step] = []
        values: dict[str, torch.Tensor] = {}
        # Σ log w of each particle's path, to be found again when its sites are given their values.
        paths: torch.Tensor | None = None
        logs: torch.Tensor | None = None
        number, empty = 0, 0
        while True:
            score = None
            if logs is not None:
                assert paths is not None
                moved = found.resampled(logs, uniforms(found.uniforms, logs), torch.ones_like(logs[:, 0]) > 0)
                flat = found.among_all(moved.ancestors).reshape(-1)
                values = self._descended(values, flat)
                logs, score, paths = moved.logs, moved.score, paths[flat]
            guide, model = self._met(number, values)
            if logs is None and not (guide.at(number) or model.at(number)):
                number, empty = number + 1, empty + 1
                continue
            increment, draws = self._weighed(guide.at(number), model.at(number), logs)
            increment, draws = (x.reshape(found.filters, count) for x in (increment, draws))
            logs = found.start(increment) if logs is None else logs
            weighed = found.weighed(logs, increment, are_scored(self.objective, self.estimators))
            steps.append(
                Step(weighed.value, torch.zeros_like(weighed.value) if score is None else score, draws, weighed.without)
            )
            logs = weighed.logs
            flat_increment = increment.detach().reshape(-1)
            paths = flat_increment if paths is None else paths + flat_increment
            for name, site in guide.sites.items():
                if not site["is_observed"]:
                    values[name], self._axes[name] = site["value"], -self.depth - site["fn"].event_dim
            if guide.ended and model.ended:
                break
            number += 1
        self._refuse(guide, model, number, values, paths)
        value, surrogate = found.surrogate(found.stacked(steps))
        if not math.isfinite(float(value)):
            raise impossible_bound(
                [empty + i for i, step in enumerate(steps) if not bool(torch.isfinite(step.value).all())]
            )
        message = (
            f"A second derivative was asked for, and the surrogate of {self.objective!r} is right for first ones alone; use ELBO() with "
            "higher_order=True."
        )
        return value, OPS.first_order_only(surrogate, message)

    def _met(self, number: int, values: dict[str, torch.Tensor]) -> tuple[Met, Met]:
        """Run guide and model as far as a step, the sites before it at `values`."""
        guide = self._until("guide", number, values)
        latents = {name: site["value"] for name, site in guide.sites.items() if not site["is_observed"]}
        model = self._until("model", number, latents)
        where = "in the first step or before the loop" if number == 0 else f"in step {number} (counted from 0)"
        drawn = [s["name"] for s in guide.at(number) if not (s["is_observed"] or s["infer"].get("is_auxiliary"))]
        refuse_other_steps(drawn, [s["name"] for s in model.at(number) if not s["is_observed"]], where, self.objective)
        return guide, model

    def _until(self, side: str, number: int, given: dict[str, torch.Tensor]) -> Met:
        """Run one of the two programs as far as a step."""
        args, kwargs = self.program.args, self.program.kwargs
        run = self.program.guide if side == "guide" else self.program.model
        until = _UntilStep(side, self.objective, number, given)
        outer: Any = SiteMessenger(self.resolve, None, args, dict(kwargs)) if side == "guide" else nullcontext()
        try:
            with (
                collect_mappings() as mappings,
                broadcasting(self.depth - 1, looped=False) if self.depth else nullcontext(),
                outer,
                until,
            ):
                run(*args, **kwargs)
        except _Reached:
            until.met.ended = False
        if not until.looped:
            raise no_loop(side, self.objective, LOOP)
        if side == "guide":
            self.estimators.update(outer.estimators)
            self.mappings += [m for m in mappings if not any(m is known for known in self.mappings)]
        self.observed += [name for name, site in until.met.sites.items() if site["is_observed"]]
        return until.met

    def _weighed(
        self, drawn: list[Any], met: list[Any], like: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Σ log p − Σ log q of sites, and the log density of the draws that have a score, (particles,).

        In a step without sites both are zeros of the type of `like`.
        """
        if not (drawn or met):
            assert like is not None
            return like.new_zeros(self.particles), like.new_zeros(self.particles)
        costs = [self._by_particle(site, cost_of(site["name"], site)) for site in met]
        scores = []
        for site in drawn:
            cost = self._by_particle(site, cost_of(site["name"], site))
            scored = not site["is_observed"] and self.estimators[site["name"]].uses_score
            if scored and self.objective.resampling_gradient == "stop-gradient":
                cost = cost.detach()
            elif scored:
                scores.append(self._by_particle(site, log_prob(site["name"], site, unmasked(site["fn"]))))
            costs.append(-cost)
        increment = sum(costs[1:], costs[0])
        return increment, sum(scores, torch.zeros_like(increment.detach()))

    def _by_particle(self, site: Any, x: torch.Tensor) -> torch.Tensor:
        if is_validation_enabled():
            check_shape(site, x, self.depth or math.inf)
        self._rounding = max(self._rounding, torch.finfo(x.dtype).eps)
        if not self.depth:
            return x.sum()[None]
        return with_particles(site, x, self.particles, self.depth).reshape(self.particles, -1).sum(1)

    def _descended(self, values: dict[str, torch.Tensor], flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the values of the particles' ancestors."""
        if not self.depth:
            return values
        return {name: value.index_select(self._axes[name], flat) for name, value in values.items()}

    def _refuse(
        self, guide: Met, model: Met, last: int, values: dict[str, torch.Tensor], paths: torch.Tensor | None
    ) -> None:
        """Refuse what the last run shows, which has met every site, and a program that is another one at the same values.

        The program runs once more with half of the particles, each twice and in another place, which changes what is read of another
        particle, or of all of them, whether or not particles were resampled.
        """
        refuse_held(self.objective, guide.params - model.params, self.estimators)
        check_programs(model.trace(), guide.trace(), self.depth or math.inf)
        with torch.no_grad():
            if self.depth and paths is not None:
                places = self.particles - 1 - torch.arange(self.particles, device=paths.device) // 2
                values, paths = self._descended(values, places), paths[places]
                guide, model = self._met(last, values)
            again, _ = self._weighed(list(guide.sites.values()), list(model.sites.values()))
        close = 1e4 * self._rounding
        if paths is not None and not torch.allclose(
            again, paths.to(again.dtype), close, close * (1 + last), equal_nan=True
        ):
            raise changed_when_replayed(self.objective)


def _is_deterministic(msg: Any) -> bool:
    """Return whether a site is one of `pyro.deterministic`, which has no density."""
    return bool(msg["infer"].get("_deterministic"))


def uniforms(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Return the uniform numbers that ancestors are chosen by."""
    return torch.rand(shape, dtype=like.dtype, device=like.device)
