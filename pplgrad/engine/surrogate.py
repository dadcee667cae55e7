"""The surrogate: one scalar whose gradient is the estimate, put together from the layout and the arrays of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.baseline import Baseline
from pplgrad.core.data_parallel import DataParallel, share
from pplgrad.core.estimator import BaselineHost, BaselineValue, Estimator, GroupTerms
from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.core.plates import Plate
from pplgrad.core.shapes import to_shape
from pplgrad.core.sites import CostSpec, Run
from pplgrad.core.weights import Weights
from pplgrad.engine.baseline_evaluation import Costs
from pplgrad.engine.branches import BranchHost, branch_terms
from pplgrad.engine.downstream import stacked_scores
from pplgrad.engine.every_draw import refuse_differentiated
from pplgrad.engine.joint_sums import JointHost, summed
from pplgrad.engine.layout import Layout, SiteGroup
from pplgrad.engine.pathwise_weights import PathHost, path_terms
from pplgrad.engine.records import Record, learned_scalars
from pplgrad.engine.signals import Bounds, Downstream, Signals
from pplgrad.errors import EstimatorError


class Rerun(BranchHost, PathHost, JointHost, Protocol):
    """The part of a plug-in that runs a program again."""


@dataclass
class Estimate:
    """What one evaluation of the objective yields.

    `value` is the objective (to be maximised), `surrogate` the scalar whose gradient estimates the objective's,
    `baseline_loss` the regression loss of learned baselines (to be minimised, None without any), `states` the
    new state of each stateful baseline by (site, key), `record` what a watch wants to know, `finite` whether the term of each site
    with branches is finite, `first_only` why a second derivative would be wrong, or None. Values are averages over particles.
    """

    value: Array
    surrogate: Array
    baseline_loss: Array | None
    states: dict[tuple[str, str], Mapping[str, Array]] = field(default_factory=dict)
    record: Record | None = None
    finite: dict[str, Array] = field(default_factory=dict)
    first_only: str | None = None

    def guarded_surrogate(self, ops: Ops) -> Array:
        """Return the surrogate, which refuses a second derivative that would be wrong: for whoever may ask for one."""
        return self.surrogate if self.first_only is None else ops.first_order_only(self.surrogate, self.first_only)


@dataclass
class SiteGroupRun:
    """The arrays of a group of sites over all particles, ready for their estimator.

    Costs are those of one process with all of the data: `share` times less than here.
    """

    names: tuple[str, ...]
    plates: tuple[Plate, ...]
    estimator: Estimator
    log_prob: Array
    downstream: Array
    indices: Mapping[str, Array]
    score_squared: Sequence[Callable[[], Array] | None]
    weights: Weights | None = None
    share: int = 1


def estimate(
    ops: Ops,
    runs: Sequence[tuple[Layout, Run]],
    host: BaselineHost | None,
    branches: Sequence[Rerun] = (),
    objective: Objective | None = None,
    higher_order: bool = False,
    record: Record | None = None,
    peers: DataParallel | None = None,
    log_normalizer: Array | None = None,
) -> Estimate:
    """Return the objective's value and surrogate from the runs of all particles.

    One run with several particles (vectorized) or several with one each (looped); looped particles may differ in
    structure. `host` holds state, networks and functions of baselines, and may be None where no baseline has any;
    `branches` runs each run again at other values, and may be empty where no site asks for any. With `higher_order`
    derivatives of every order are right; without, a second one is refused where it would not be. What is to be record of the
    sites goes into `record`. `peers` are the processes that the data is split over, whose gradients are averaged. `log_normalizer` is the
    number that an objective learns.
    """
    signals: Signals
    finite: dict[str, Array] = {}
    for layout, _ in runs:
        refuse_differentiated(layout, objective)
    if isinstance(objective, MultiSample):
        signals = Bounds(ops, runs, objective, higher_order, log_normalizer)
    else:
        runs = [
            averaged(ops, *run, branches[i], higher_order, finite) if branches else run for i, run in enumerate(runs)
        ]
        signals = Downstream(ops, runs, higher_order)
    result = Estimate(ops.stop_gradient(signals.value), signals.surrogate, None, finite=finite, record=record)
    if not (isinstance(objective, MultiSample) and objective.draws_are_constant):
        _add_sites(ops, runs, host, branches, signals, higher_order, result, peers)
    if record is not None:
        for (layout, _), rerun in zip(runs, branches, strict=True):
            for site in layout.sites:
                starts = learned_scalars(site.estimator)
                record.learned[site.name] = {name: rerun.learned(site.name, name, x) for name, x in starts.items()}
    result.first_only = None if higher_order else _only_first(runs, objective)
    return result


def averaged(
    ops: Ops, layout: Layout, run: Run, host: JointHost, higher_order: bool, finite: dict[str, Array]
) -> tuple[Layout, Run]:
    """Return a run whose costs are averaged over the sites under `Enumerate`, if there are any."""
    if not layout.joint_sums:
        return layout, run
    estimators = {site.name: site.estimator for site in layout.sites}
    if higher_order:
        for name, estimator in estimators.items():
            if estimator.uses_score and not estimator.enumerates and layout.follows_sum(name):
                raise EstimatorError(
                    f"{estimator!r} at site '{name}', which follows a site under Enumerate(), is right for first derivatives alone, and the "
                    "ELBO has higher_order=True; use ScoreFunction() or LocalExpectation() in the place of Enumerate()."
                )

    def held(cost: CostSpec) -> bool:
        """Return whether a density has no gradient in an average: E[∇ log q] = 0 for a draw that is scored."""
        estimator = estimators.get(cost.name)
        if higher_order or cost.sign > 0 or cost.closed or estimator is None or cost.name in run.weights_alone:
            return False
        return estimator.uses_score and not estimator.enumerates

    constant = [held(cost) for cost in layout.costs]
    return layout, summed(ops, layout.joint_sums, layout.sites, run, host, constant, finite)


def _only_first(runs: Sequence[tuple[Layout, Run]], objective: Objective | None) -> str | None:
    """Return why a second derivative would be wrong, or None."""
    if isinstance(objective, MultiSample) and objective.draws_are_constant and any(layout.sites for layout, _ in runs):
        return (
            f"A second derivative was asked for, and {objective!r} takes its draws for constants, so that it has first ones alone; use ELBO() "
            "with higher_order=True."
        )
    for layout, _ in runs:
        for site in layout.sites:
            scored = site.estimator.uses_score and not site.estimator.enumerates
            if scored or site.estimator.declaration.derivatives is not None:
                return (
                    f"A second derivative was asked for (create_graph=True, or jax.grad of a gradient), and the surrogate of "
                    f"{site.estimator!r} at site '{site.name}' is right for first ones alone; pass higher_order=True to "
                    "TraceGrad_ELBO, with ScoreFunction(), LocalExpectation() or Reparam() at all sites."
                )
    return None


def _add_sites(
    ops: Ops,
    runs: Sequence[tuple[Layout, Run]],
    host: BaselineHost | None,
    branches: Sequence[Rerun],
    signals: Signals,
    higher_order: bool,
    result: Estimate,
    peers: DataParallel | None,
) -> None:
    """Add the terms of all sites to the estimate."""
    groups: list[list[SiteGroupRun]] = []
    for number, (layout, run) in enumerate(runs):
        plain = [i for i, group in enumerate(layout.site_groups) if not layout.estimator(group).uses_branches]
        groups.append([_group_run(ops, layout, run, i, signals, number, peers) for i in plain])
        if len(plain) < len(layout.site_groups):
            term, loss = branch_terms(
                ops, layout, run, signals, number, branches[number], higher_order, peers, result.finite
            )
            _add(result, term, loss, signals.replicates)
        if isinstance(signals, Bounds) and branches:
            _add(result, path_terms(ops, layout, run, signals, number, branches[number]), None, signals.replicates)
    for group in _merged(ops, groups):
        _add_group(ops, group, host, signals.replicates, higher_order, result, peers)


def _add(result: Estimate, term: Array | None, loss: Array | None, replicates: int) -> None:
    """Add terms to the surrogate and to the loss of what is learned."""
    if term is not None:
        result.surrogate = result.surrogate + term / replicates
    if loss is not None:
        loss = loss / replicates
        result.baseline_loss = loss if result.baseline_loss is None else result.baseline_loss + loss


def _group_run(
    ops: Ops, layout: Layout, run: Run, index: int, signals: Signals, number: int, peers: DataParallel | None
) -> SiteGroupRun:
    group = layout.site_groups[index]
    larger, weights = share(peers, group.plates), signals.weights_of(number, index)
    names = tuple(layout.sites[i].name for i in group.members)
    return SiteGroupRun(
        names=names,
        plates=group.plates,
        estimator=layout.estimator(group),
        log_prob=stacked_scores(ops, run.scores, group),
        downstream=signals.at_draw(number, index) / larger if larger > 1 else signals.at_draw(number, index),
        indices=run.indices,
        score_squared=[_score_squared(ops, run, name, group) for name in names],
        weights=weights if weights is None else replace(weights, scale=weights.scale / larger),
        share=larger,
    )


def _score_squared(ops: Ops, run: Run, name: str, group: SiteGroup) -> Callable[[], Array] | None:
    compute = run.score_squared.get(name)
    return None if compute is None else lambda: to_shape(ops, compute(), group.shape)


def _merged(ops: Ops, groups: list[list[SiteGroupRun]]) -> list[SiteGroupRun]:
    """Join the groups of looped particles along the particle axis, site by site where their structures differ."""
    if len(groups) == 1:
        return groups[0]
    layouts = {tuple((g.names, g.plates, tuple(g.log_prob.shape)) for g in run) for run in groups}
    if len(layouts) == 1:
        return [_joined(ops, list(column)) for column in zip(*groups, strict=True)]
    by_site: dict = {}
    for run in groups:
        for group in run:
            for i, name in enumerate(group.names):
                single = SiteGroupRun(
                    (name,),
                    group.plates,
                    group.estimator,
                    group.log_prob[:, i : i + 1],
                    group.downstream[:, i : i + 1],
                    group.indices,
                    group.score_squared[i : i + 1],
                    group.weights,
                    group.share,
                )
                by_site.setdefault((name, group.plates), []).append(single)
    return [_joined(ops, members) for members in by_site.values()]


def _joined(ops: Ops, members: list[SiteGroupRun]) -> SiteGroupRun:
    xp, first = ops.xp, members[0]
    squares: list[Callable[[], Array] | None] = []
    for i in range(len(first.names)):
        parts = [m.score_squared[i] for m in members]
        squares.append(None if None in parts else lambda p=parts: xp.concat([f() for f in p], axis=0))  # type: ignore
    indices = {
        name: xp.concat([_per_particle(ops, m, name) for m in members], axis=0)
        for name in first.indices
        if all(name in m.indices and m.indices[name].shape[-1] == first.indices[name].shape[-1] for m in members)
    }
    return SiteGroupRun(
        first.names,
        first.plates,
        first.estimator,
        xp.concat([m.log_prob for m in members], axis=0),
        xp.concat([m.downstream for m in members], axis=0),
        indices,
        squares,
        _all_rows([m.weights for m in members]),
        first.share,
    )


def _all_rows(members: Sequence[Weights | None]) -> Weights | None:
    """Return the weights at the rows of all members."""
    known = [weights for weights in members if weights is not None]
    return replace(known[0], rows=np.concatenate([weights.rows for weights in known])) if known else None


def _per_particle(ops: Ops, member: SiteGroupRun, name: str) -> Array:
    index = member.indices[name]
    if len(index.shape) == 2:
        return index
    return ops.xp.broadcast_to(index[None], (member.log_prob.shape[0], index.shape[0]))


def _add_group(
    ops: Ops,
    group: SiteGroupRun,
    host: BaselineHost | None,
    replicates: int,
    higher_order: bool,
    result: Estimate,
    peers: DataParallel | None,
) -> None:
    """Add one group's score terms, baseline losses and new states to the estimate."""

    costs = Costs(
        ops, group.names, group.plates, group.indices, group.score_squared, host, peers, result.record, result.states
    )

    def evaluate(baseline: Baseline) -> BaselineValue:
        return costs.without(baseline, group.downstream)

    terms = GroupTerms(
        group.names, group.plates, group.log_prob, group.downstream, ops, evaluate, group.weights, higher_order
    )
    term, loss = group.estimator.surrogate(terms)
    if group.share > 1:
        term, loss = group.share * term, None if loss is None else group.share * loss
    _add(result, term, loss, replicates)
