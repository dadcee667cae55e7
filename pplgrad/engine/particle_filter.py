"""A particle filter in arrays: its weights, its ancestors, and the surrogate of its estimate of the evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.filtering import FIVO
from pplgrad.core.objectives import log_sum_exp


class Weighed(NamedTuple):
    """The filters after a step: log Ẑ_t, (filters,), the particles' normalised log weights, and log Ẑ_t without each of them, (filters, K)."""

    value: Array
    logs: Array
    without: Array


class Resampled(NamedTuple):
    """The filters before a step: each particle's ancestor and log weight, (filters, K), and the log probability of the ancestors, (filters,)."""

    ancestors: Array
    logs: Array
    score: Array


class Step(NamedTuple):
    """What the surrogate takes of a step.

    `value` is log Ẑ_t, `resampling` the log probability of the ancestors before the step, (filters,); `draws` that of the scored draws
    and `without` the bound without each particle, (filters, K). Steps may be stacked in front.
    """

    value: Array
    resampling: Array
    draws: Array
    without: Array


@dataclass(frozen=True)
class ParticleFilter:
    """`filters` filters of K = `particles` particles each."""

    ops: Ops
    objective: FIVO
    filters: int
    particles: int

    @property
    def uniforms(self) -> tuple[int, int]:
        """The shape of the uniform numbers that the choice of ancestors takes."""
        return self.filters, 1 if self.objective.resampling == "systematic" else self.particles

    def start(self, like: Array) -> Array:
        """Return the normalised log weights of particles that nothing has weighed."""
        return self.ops.constant(np.full((self.filters, self.particles), -math.log(self.particles)), like)

    def weighed(self, logs: Array, increments: Array, scored: bool = True) -> Weighed:
        """Weigh the particles by the log weights of a step, in which draws are `scored` or none is."""
        xp, joint = self.ops.xp, logs + increments
        value = log_sum_exp(xp, joint, 1)
        without = self._without(logs, joint) if scored else xp.zeros_like(self.ops.stop_gradient(joint))
        return Weighed(value, joint - value[:, None], without)

    def resampled(self, logs: Array, uniforms: Array, wanted: Array) -> Resampled:
        """Choose ancestors by their normalised log weights where that is `wanted` and due.

        An ancestor is the first whose cumulative weight is above a position in [0, 1).
        """
        xp, ops, objective = self.ops.xp, self.ops, self.objective
        weights = xp.exp(logs)
        cumulative = xp.cumulative_sum(weights, axis=1)
        own = ops.arange(self.particles, logs)
        positions = uniforms
        if objective.resampling == "systematic":
            positions = (uniforms + ops.constant(np.arange(self.particles), logs)) / self.particles
        ends = ops.stop_gradient(cumulative)
        chosen = xp.sum(xp.astype((positions * ends[:, -1:])[:, :, None] >= ends[:, None, :], own.dtype), axis=2)
        # A position that is rounded up to the end of all belongs to the last particle that has a weight.
        chosen = xp.minimum(chosen, xp.sum(xp.astype(ends < ends[:, -1:], own.dtype), axis=1)[:, None])
        due = wanted & self._due(ops.stop_gradient(weights))
        ancestors = xp.where(due[:, None], chosen, own)
        flat = self.among_all(ancestors)
        taken = ops.take(xp.reshape(logs, (-1,)), flat)
        fresh = self.start(logs)
        if objective.resampling_gradient == "stop-gradient":
            fresh = fresh + taken - ops.stop_gradient(taken)
        score = xp.zeros_like(logs[:, 0])
        if objective.resampling_gradient == "score":
            found = (
                self._systematic_log_prob(cumulative, flat)
                if objective.resampling == "systematic"
                else xp.sum(taken, axis=1)
            )
            score = xp.where(due, found, score)
        return Resampled(ancestors, xp.where(due[:, None], fresh, logs), score)

    def surrogate(self, steps: Step) -> tuple[Array, Array]:
        """Return the objective and its surrogate, averaged over the filters, from all steps, stacked in front.

        The log probability of a choice is multiplied by what follows it, as a constant: the objective from its own step on, less a baseline.
        """
        xp, ops = self.ops.xp, self.ops
        values = ops.stop_gradient(steps.value)
        total, so_far = xp.sum(values, axis=0), xp.cumulative_sum(values, axis=0)
        future, past = total - so_far + values, so_far - values
        summed = xp.sum(steps.value, axis=0)
        summed = summed + xp.sum(steps.resampling * self._centred(future, past, 0), axis=0)
        at_draws = self._centred(future[:, :, None] - steps.without, past, 1)
        summed = summed + xp.sum(steps.draws * at_draws, axis=(0, 2))
        return averaged(ops, total), averaged(ops, summed)

    def among_all(self, ancestors: Array) -> Array:
        """Return the ancestors' numbers among the particles of all filters, (filters, K)."""
        return ancestors + self.particles * self.ops.arange(self.filters, ancestors)[:, None]

    def stacked(self, steps: Sequence[Step]) -> Step:
        """Return steps as one, stacked in front."""
        return Step(*(self.ops.stack(list(parts), 0) for parts in zip(*steps, strict=True)))

    def _due(self, weights: Array) -> Array:
        """Return where particles are resampled, (filters,)."""
        xp, threshold = self.ops.xp, self.objective.threshold
        size = 1 / xp.sum(weights * weights, axis=1)
        return size >= 0 if threshold is None else size < threshold * self.particles

    def _systematic_log_prob(self, cumulative: Array, flat: Array) -> Array:
        """Return the log of the length of the interval of uniform numbers that lead to these ancestors."""
        xp, ops, count = self.ops.xp, self.ops, self.particles
        before = xp.concat([xp.zeros_like(cumulative[:, :1]), cumulative[:, :-1]], axis=1)
        place = ops.constant(np.arange(count), cumulative)
        high, low = (count * ops.take(xp.reshape(ends, (-1,)), flat) - place for ends in (cumulative, before))
        last = xp.min(xp.where(high < 1, high, xp.ones_like(high)), axis=1)
        first = xp.max(xp.where(low > 0, low, xp.zeros_like(low)), axis=1)
        return xp.log(xp.where(last > first, last - first, xp.ones_like(last)))

    def _without(self, logs: Array, joint: Array) -> Array:
        """Return, for each particle, log Ẑ_t of the others alone, a constant that its draw has no part in."""
        xp, ops = self.ops.xp, self.ops
        if self.particles == 1:
            return xp.zeros_like(ops.stop_gradient(joint))
        own = ops.constant(np.eye(self.particles), logs)[None] > 0
        lowest = xp.full_like(logs[:, None, :], -math.inf)
        found = [log_sum_exp(xp, xp.where(own, lowest, ops.stop_gradient(x)[:, None, :]), 2) for x in (joint, logs)]
        # Where all others are impossible there is nothing to compare with.
        alone = xp.isfinite(found[0]) & xp.isfinite(found[1])
        return xp.where(alone, found[0] - xp.where(alone, found[1], xp.zeros_like(found[1])), xp.zeros_like(found[0]))

    @property
    def alone(self) -> bool:
        """Whether there are no other filters to compare with."""
        return self.filters == 1

    def _centred(self, signal: Array, past: Array, known: int) -> Array:
        """Subtract from a signal, (steps, filters, ...), what it may be without the choice that it is the signal of.

        That is the mean of the other filters. A filter alone takes the mean of its steps before the choice for each that is still to come, all but the
        `known` first of them; the mean of n steps is drawn to 0 by the factor n / (n + 1).
        """
        xp, ops = self.ops.xp, self.ops
        single = len(signal.shape) == 2
        if self.alone:
            count = signal.shape[0]
            factor = (count - known - np.arange(count)) / (1 + np.arange(count))
            expected = ops.constant(factor[:, None], past) * past
        else:
            each = signal if single else xp.mean(signal, axis=2)
            expected = (xp.sum(each, axis=1, keepdims=True) - each) / (self.filters - 1)
        return signal - (expected if single else expected[:, :, None])


def averaged(ops: Ops, x: Array) -> Array:
    """Return the mean over the filters."""
    return ops.xp.mean(x)
