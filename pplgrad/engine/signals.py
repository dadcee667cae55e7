"""What a site's estimator weighs: the site's downstream cost, or the bound of several particles that its element is in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.objectives import DensityShares, MultiSample
from pplgrad.core.off_policy import OffPolicy
from pplgrad.core.shapes import to_shape
from pplgrad.core.sites import Run
from pplgrad.core.weights import Weights
from pplgrad.engine.downstream import downstream, joined_costs, stacked_costs, stacked_scores
from pplgrad.engine.layout import Layout
from pplgrad.errors import ProgramError


class Signals(Protocol):
    """The signals of all sites in all runs; `run` and `group` are their numbers."""

    replicates: int
    """The number of values of the objective that are averaged."""
    value: Array
    """The objective, with the gradient that flows through the costs."""
    surrogate: Array
    """What the terms of the sites are added to: the value itself, unless the objective says otherwise."""

    def at_draw(self, run: int, group: int) -> Array:
        """Return the signal of a group's sites, a constant of shape (particles, n, *plates)."""

    def in_branches(self, run: int, group: int, costs: Sequence[Array], constant: bool) -> Array:
        """Return the signal in branches, (particles, m, *plates), from all costs in them: (particles * m, *batch)."""

    def total_at_draw(self, run: int, costs: Sequence[Array]) -> Array:
        """Return the sum of the signals of all particles, from all costs of the draw, with their gradient: one number.

        Each particle's own costs are differentiated, with those of the others as constants.
        """

    def shares_in_branches(self, run: int, costs: Sequence[Array]) -> Array:
        """Return the particle's own share of the importance weights in its branches, (particles, m, *plates)."""

    def weights_of(self, run: int, group: int) -> Weights | None:
        """Return the importance weights as the group's elements see them; None without several particles in one bound."""


class Downstream:
    """The signals of an objective that is a sum of costs: those that depend on the site, in its own plates."""

    def __init__(self, ops: Ops, runs: Sequence[tuple[Layout, Run]], higher_order: bool = False) -> None:
        self._ops = ops
        self._layouts = [layout for layout, _ in runs]
        self._stacks: list[list[Array]] = []
        self._drawn: list[list[Array]] = []
        total = None
        for layout, run in runs:
            costs = _own_density_held(ops, layout, run, scores_too=not higher_order)
            stacks = [joined_costs(ops, costs, group) for group in layout.cost_groups]
            self._stacks.append(stacks)
            drawn = run.drawn
            self._drawn.append(stacks if drawn is None else [joined_costs(ops, drawn, g) for g in layout.cost_groups])
            if higher_order:
                stacks = _weighed_by_scores(ops, layout, run, stacks)
            for stack in stacks:
                part = ops.xp.sum(stack)
                total = part if total is None else total + part
        if total is None:
            total = ops.xp.zeros(())  # A program without a site.
        self.replicates = sum(run.particles for _, run in runs)
        self.value = self.surrogate = total / self.replicates

    def at_draw(self, run: int, group: int) -> Array:
        """Return the downstream costs: averages over what is summed over, unless the draw follows it, or is set against branches.

        Of a draw that follows, the summed rows have others in its place. Branches keep what does not follow, and so must the draw.
        """
        layout = self._layouts[run]
        names = [layout.sites[i].name for i in layout.site_groups[group].members]
        at_draw = layout.estimator(layout.site_groups[group]).uses_branches or layout.follows_sum(names[0])
        return downstream(self._ops, layout, group, (self._drawn if at_draw else self._stacks)[run])

    def in_branches(self, run: int, group: int, costs: Sequence[Array], constant: bool) -> Array:
        """Return the downstream cost in each branch."""
        layout = self._layouts[run]
        stacks = [joined_costs(self._ops, list(costs), members) for members in layout.cost_groups]
        found = downstream(self._ops, layout, group, stacks, constant)[:, 0]
        return self._ops.xp.reshape(found, (self._stacks[run][0].shape[1], -1, *found.shape[1:]))

    def total_at_draw(self, run: int, costs: Sequence[Array]) -> Array:
        """Return the sum of all costs."""
        parts = [spec.sign * self._ops.xp.sum(x) for spec, x in zip(self._layouts[run].costs, costs, strict=True)]
        return sum(parts[1:], parts[0])

    def shares_in_branches(self, run: int, costs: Sequence[Array]) -> Array:
        """Particles are only averaged: nothing is shared."""
        raise TypeError("An objective that is a sum of costs has no importance weights.")

    def weights_of(self, run: int, group: int) -> Weights | None:
        """Return None: particles are only averaged."""
        return None


class Bounds:
    """The signals of an objective that combines the importance weights of several particles."""

    def __init__(
        self,
        ops: Ops,
        runs: Sequence[tuple[Layout, Run]],
        objective: MultiSample,
        higher_order: bool = False,
        log_normalizer: Array | None = None,
    ) -> None:
        xp = ops.xp
        self._ops = ops
        self._objective = objective
        self._layouts = [layout for layout, _ in runs]
        self._starts = np.cumsum([0, *(run.particles for _, run in runs)])
        total = int(self._starts[-1])
        layout = self._layouts[0]
        if any(other.weight_plates != layout.weight_plates for other in self._layouts):
            raise ProgramError(
                f"The particles of the program stand in different plates, so that {objective!r} cannot combine their weights; "
                "give every particle the same plates, or use the ELBO."
            )
        self._scale = _scale_outside(layout)
        costs = [_own_density_held(ops, layout, run, scores_too=False) for layout, run in runs]
        if isinstance(objective, OffPolicy):
            for other in self._layouts:
                _refuse_subsampled(other, objective)
            costs = [_model_held(ops, *pair) for pair in zip(self._layouts, costs, strict=True)]
        self._particles = [run.particles for _, run in runs]
        sums = [self._summed(i, x) for i, x in enumerate(costs)]
        logs = xp.concat([x for x, _ in sums], axis=0) if len(sums) > 1 else sums[0][0]
        count = objective.combined(total)
        self.replicates = total // count
        logs = xp.reshape(logs, (self.replicates, count, *logs.shape[1:]))
        self._logs = ops.stop_gradient(logs)
        if isinstance(objective, OffPolicy):
            # What no draw changes has no part in a variance, and nothing is beside the whole program.
            apart = objective.discrepancy(xp, logs, 1, log_normalizer)
            self.value = self.surrogate = -self._scale * xp.sum(apart) / self.replicates
            return
        beside = sum((x for _, x in sums[1:]), sums[0][1]) / total
        bounds = objective.bound(xp, logs, 1)
        if higher_order:
            scores = [_joint_score(ops, layout, run) for layout, run in runs]
            joint = xp.concat(scores, axis=0) if len(scores) > 1 else scores[0]
            bounds = bounds * xp.exp(xp.sum(xp.reshape(joint, logs.shape), axis=1))
        self.value = self.surrogate = self._scale * xp.sum(bounds) / self.replicates + beside
        followed = objective.density_shares(xp, self._logs, 1)
        if followed is not None:
            self.surrogate = self._scale * self._followed(runs, costs, logs, followed) / self.replicates + beside

    def _followed(
        self, runs: Sequence[tuple[Layout, Run]], costs: Sequence[list[Array]], logs: Array, shares: DensityShares
    ) -> Array:
        """Return the sum of the particles' log densities with their shares in an estimate that is no derivative of a bound."""
        ops, xp = self._ops, self._ops.xp

        def joined(parts: Sequence[Array]) -> Array:
            return xp.reshape(xp.concat(list(parts), axis=0) if len(parts) > 1 else parts[0], logs.shape)

        # A particle without a weight has no share, and log p = −∞, of which 0 times is NaN.
        weighs = xp.isfinite(self._logs)

        def weighed(sums: Sequence[Array]) -> Array:
            x = joined(sums)
            return xp.where(weighs, x, xp.zeros_like(x))

        log_w = xp.where(weighs, logs, xp.zeros_like(logs))
        log_p = weighed([self._summed(i, x, guide=0.0)[0] for i, x in enumerate(costs)])
        total = xp.sum(shares.model * log_p + shares.guide * (log_p - log_w))
        if shares.weight is not None and any(run.weights_alone for _, run in runs):
            held = [_own_density_held(ops, layout, run, scores_too=True) for layout, run in runs]
            log_w = weighed([self._summed(i, x)[0] for i, x in enumerate(held)])
            total = total + xp.sum(shares.weight * (log_p - log_w))
        if shares.draws is not None:
            total = total + xp.sum(shares.draws * joined([_joint_score(ops, layout, run) for layout, run in runs]))
        return total

    def _summed(self, run: int, costs: Sequence[Array], guide: float = -1.0) -> tuple[Array, Array]:
        """Return the unscaled log weights, (particles, *plates), and the sum of all that no draw changes and no plate has.

        The guide's log densities count with the sign and weight `guide`.
        """
        ops, layout = self._ops, self._layouts[run]
        shape = layout.weight_shape
        if not costs:
            return ops.xp.zeros((self._particles[run], *shape)), ops.xp.zeros(())
        total = beside = ops.constant(np.zeros(()), costs[0])
        for group in layout.cost_groups:
            signs = np.where(group.signs < 0, -guide * group.signs, group.signs)
            stack = stacked_costs(ops, list(costs), group)
            summed = ops.contract(ops.constant(signs[None], stack), stack)[0]
            if all(plate in group.plates for plate in layout.weight_plates or ()):
                total = total + to_shape(ops, summed, shape) / self._scale
            else:
                beside = beside + ops.xp.sum(summed)
        particles = costs[0].shape[0]
        return ops.xp.broadcast_to(total, (particles, *shape)), beside

    def weights_of(self, run: int, group: int) -> Weights:
        """Return the weights, placed as the group needs them."""
        rows = np.arange(self._starts[run], self._starts[run + 1])
        shape = self._layouts[run].site_groups[group].shape
        return Weights(self._ops, self._objective, self._logs, self._scale, rows, shape)

    def at_draw(self, run: int, group: int) -> Array:
        """Return the bound of each element, for every particle in it."""
        weights, sites = self.weights_of(run, group), self._layouts[run].site_groups[group]
        found = self._scale * self._objective.bound(self._ops.xp, self._logs, 1)
        every = self._ops.xp.broadcast_to(found[:, None], self._logs.shape)
        placed = weights.at_sites(every)
        return self._ops.xp.broadcast_to(placed, (placed.shape[0], len(sites.members), *sites.shape))

    def in_branches(self, run: int, group: int, costs: Sequence[Array], constant: bool) -> Array:
        """Return the bound with the particle's own weight replaced by that of the branch."""
        found, others = self._in_branches(run, costs, constant)
        return self._scale * self._objective.bound(self._ops.xp, self._set_in(others, found, run), 1)

    def total_at_draw(self, run: int, costs: Sequence[Array]) -> Array:
        """Return the sum of the bounds in which each particle is, once for each particle."""
        return self._ops.xp.sum(self.in_branches(run, 0, costs, False))

    def shares_in_branches(self, run: int, costs: Sequence[Array]) -> Array:
        """Return the particle's own share of the weights in its branches, (particles, m, *plates)."""
        xp = self._ops.xp
        found, others = self._in_branches(run, costs, True)
        every = self._objective.shares(xp, self._set_in(others, found, run), 1)
        return self._scale * xp.sum(xp.where(self._mine(run, len(found.shape)), every, xp.zeros_like(every)), axis=1)

    def share_rates(self, run: int) -> tuple[Array, Array]:
        """Return each particle's share of the weights, and how fast it grows with its log weight: (particles, *plates)."""
        shares = self._objective.shares(self._ops.xp, self._logs, 1)
        rates = self._objective.power * shares * (1 - shares)
        rows = slice(int(self._starts[run]), int(self._starts[run + 1]))
        shape = (-1, *self._logs.shape[2:])
        return tuple(self._scale * self._ops.xp.reshape(x, shape)[rows] for x in (shares, rates))  # type: ignore[return-value]

    def log_weights(self, run: int, costs: Sequence[Array]) -> Array:
        """Return the unscaled log weights that costs amount to: (particles, *plates)."""
        return self._summed(run, costs)[0]

    def _in_branches(self, run: int, costs: Sequence[Array], constant: bool) -> tuple[Array, Array]:
        """Return the log weights in branches, (particles, m, *plates), and all of each particle's bound, (particles, K, ...)."""
        found, _ = self._summed(run, costs)
        particles = int(self._starts[run + 1] - self._starts[run])
        found = self._ops.xp.reshape(found, (particles, -1, *found.shape[1:]))
        bounds = np.arange(self._starts[run], self._starts[run + 1]) // self._logs.shape[1]
        others = self._ops.xp.stack([self._logs[int(i)] for i in bounds], axis=0)
        return self._ops.stop_gradient(found) if constant else found, others

    def _mine(self, run: int, ndim: int) -> Array:
        """Return, for each particle of a run, where it stands in its bound: (particles, K, 1, ...)."""
        count = self._logs.shape[1]
        place = np.arange(self._starts[run], self._starts[run + 1]) % count
        mine = (place[:, None] == np.arange(count)).reshape(len(place), count, *(1,) * (ndim - 1))
        return self._ops.constant(mine, self._logs) > 0

    def _set_in(self, others: Array, found: Array, run: int) -> Array:
        """Return the log weights (particles, K, m, *plates) with each particle's own replaced."""
        return self._ops.xp.where(self._mine(run, len(found.shape)), found[:, None], others[:, :, None])


def _scale_outside(layout: Layout) -> float:
    """Return what subsampled plates multiply a bound by."""
    return math.prod(plate.full_size / plate.size for plate in layout.weight_plates or ())


def _refuse_subsampled(layout: Layout, objective: OffPolicy) -> None:
    """Refuse a cost in a subsampled plate whose elements have no term of their own: a square of a minibatch is not that of the data."""
    chosen = layout.weight_plates or ()
    for cost in layout.costs:
        if not all(plate in cost.plates for plate in chosen):
            continue
        for plate in cost.plates:
            if plate not in chosen and plate.size != plate.full_size:
                raise ProgramError(
                    f"Site '{cost.name}' stands in the subsampled plate '{plate.name}', whose elements {objective!r} squares as a whole, so "
                    "that a minibatch would bias the gradient; run all of the plate, or use LogVariance() with all latent sites in the plate."
                )


def _model_held(ops: Ops, layout: Layout, costs: Sequence[Array]) -> list[Array]:
    """Return the costs with the model's densities as constants."""
    return [ops.stop_gradient(x) if cost.sign > 0 else x for cost, x in zip(layout.costs, costs, strict=True)]


def _own_density_held(ops: Ops, layout: Layout, run: Run, scores_too: bool) -> list[Array]:
    """Return the costs without the gradient that the guide's densities are not to carry; `scores_too` says that they are summed.

    A site that follows its path alone (sticking the landing) has no gradient through its density's parameters. In a sum of
    costs the density of a site with a score term has none at all, since E[∇ log q] = 0 given the parents; that of its scale and weight stays.
    """
    estimators = {site.name: site.estimator for site in layout.sites}
    costs = list(run.costs)
    averaged = {number for joint in layout.joint_sums for number in joint.costs} if run.drawn is not None else set()
    for number, cost in enumerate(layout.costs):
        if cost.sign > 0 or cost.name not in estimators or cost.closed or number in averaged:
            continue
        if scores_too and estimators[cost.name].uses_score:
            alone = run.weights_alone.get(cost.name)
            costs[number] = ops.stop_gradient(costs[number]) if alone is None else alone
        elif cost.name in run.through and (scores_too or not estimators[cost.name].follows_mixture):
            through = run.through[cost.name]
            costs[number] = costs[number] - through + ops.stop_gradient(through)
    return costs


def _weighed_by_scores(ops: Ops, layout: Layout, run: Run, stacks: list[Array]) -> list[Array]:
    """Return the costs times exp(Σ log q − Σ log q as a constant) over the scored draws that each depends on.

    The factor is one, and its derivatives of every order are those that the distribution of the draws brings in
    (Foerster et al., 2018). What a cost depends on is the transpose of what a site's downstream cost sums.
    """
    if not layout.site_groups:
        return stacks
    scores = []
    for group in layout.site_groups:
        log_q = stacked_scores(ops, run.scores, group)
        scores.append(log_q - ops.stop_gradient(log_q))

    def summed(costs: list[Array]) -> list[Array]:
        return [downstream(ops, layout, number, costs, False) for number in range(len(layout.site_groups))]

    back = ops.transposed(summed, [ops.stop_gradient(stack) for stack in stacks], scores)
    return [stack * ops.xp.exp(log_q) for stack, log_q in zip(stacks, back, strict=True)]


def _joint_score(ops: Ops, layout: Layout, run: Run) -> Array:
    """Return Σ log q − Σ log q as a constant over all scored draws, (particles, *plates of the weights)."""
    shape = (run.particles, *layout.weight_shape)
    total = ops.constant(np.zeros(shape), run.costs[0]) if run.costs else ops.xp.zeros(shape)
    for site, score in zip(layout.sites, run.scores, strict=True):
        if site.estimator.uses_score:
            total = total + to_shape(ops, score - ops.stop_gradient(score), layout.weight_shape)
    return total
