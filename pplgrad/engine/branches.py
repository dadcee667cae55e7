"""Branches: the program run again where one site takes another value and what follows is drawn again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from pplgrad.core.alternatives import Alternatives, Values
from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.data_parallel import DataParallel, share
from pplgrad.core.draw import Draw, HostDraw
from pplgrad.core.estimator import BranchTerms
from pplgrad.core.noise import Noise, noise_for
from pplgrad.core.shapes import plate_shape
from pplgrad.core.sites import Run, SiteSpec
from pplgrad.engine.every_draw import at_every_draw
from pplgrad.engine.layout import Layout
from pplgrad.engine.loop_steps import LoopSteps, StepDraw
from pplgrad.engine.pathwise_weights import PathHost
from pplgrad.engine.signals import Signals
from pplgrad.errors import EstimatorError, ProgramError


class BranchHost(PathHost, Protocol):
    """The part of a plug-in that runs branches and keeps the estimators' noise."""

    @property
    def can_differentiate(self) -> bool:
        """Whether branches can be differentiated."""

    @property
    def held_at_once(self) -> int | None:
        """The number of differentiated branches of a particle that may be held at once; None for all, or where the host sees to it."""

    def draw(self, site: str) -> HostDraw:
        """Return the draw of a site."""

    def noise(self, site: str) -> Noise:
        """Return the noise of a site's estimator."""

    def branch_costs(self, values: Mapping[str, Values]) -> Mapping[str, Sequence[Array]]:
        """Return all costs, as constants, in the branches of each site: arrays of shape (particles * m, *batch).

        `values` holds the m alternatives of each site; of a site in a loop those of each step, of which one branch changes one step.
        Costs come in the order of the layout's specifications.
        """

    def value_costs(self, values: Mapping[str, Values]) -> Mapping[str, Sequence[Array]]:
        """Return all costs like `branch_costs`, with their gradient to the values."""

    def differentiated_costs(self, values: Mapping[str, Values]) -> Mapping[str, Sequence[Array]]:
        """Return all costs like `branch_costs`, with their gradient to the parameters."""

    def soft_costs(
        self, values: Mapping[str, Values], temperatures: Mapping[str, Any]
    ) -> Mapping[str, Sequence[Array]]:
        """Return all costs like `branch_costs`, at relaxed values, with their gradient to the values.

        What follows a relaxed site is relaxed at its temperature, or replaced by its probabilities (None).
        """

    def learned(self, site: str, name: str, start: Any) -> Array:
        """Return a number or array that the site's estimator learns, from `start` on."""


def requested_values(
    ops: Ops, layout: Layout, run: Run, host: BranchHost
) -> dict[int, tuple[Draw, Alternatives, LoopSteps | None]]:
    """Return, by the number of the site's group, what each site's estimator asks to be evaluated; and the steps of one in a loop."""
    found = {}
    for number, group in enumerate(layout.site_groups):
        site = layout.sites[group.members[0]]
        if site.estimator.uses_branches:
            scored = _with_score(layout, site)
            _refuse_scored(site, scored)
            noise, score = noise_for(site.name, ops, host.noise), run.scores[group.members[0]]
            mine = host.draw(site.name)
            if 0 in mine.value.shape:
                continue  # A site without elements has no other value, and no gradient.
            steps = LoopSteps.of(ops, site.plates, group.plates, run.particles)
            if steps is not None:
                mine, score = StepDraw(mine, steps), steps.merged(score)
            plates = tuple(plate for plate in group.plates if not plate.time)
            draw = Draw(
                ops,
                mine,
                plates,
                plate_shape(plates),
                noise,
                score,
                partial(host.learned, site.name),
                site.estimator.learned,
                scored is None and host.can_differentiate,
            )
            found[number] = (draw, site.estimator.alternatives(draw), steps)
    return found


def branch_terms(
    ops: Ops,
    layout: Layout,
    run: Run,
    signals: Signals,
    number: int,
    host: BranchHost,
    higher_order: bool = False,
    peers: DataParallel | None = None,
    finite: dict[str, Array] | None = None,
) -> tuple[Array | None, Array | None]:
    """Run the branches of all sites of a run (the one of that number) that ask for them.

    Return the sum of their terms of the surrogate, and the loss that trains what estimators learn, or None where there is neither. Whether a site's
    term is finite is noted in `finite`: a cost may be infinite in a branch alone.
    """
    found = requested_values(ops, layout, run, host)
    draws = {n: draw for n, (draw, _, _) in found.items()}
    asked = {n: alternatives for n, (_, alternatives, _) in found.items()}
    loops = {n: steps for n, (_, _, steps) in found.items() if steps is not None}
    larger = {n: share(peers, layout.site_groups[n].plates) for n in asked}
    seen = _Seen(signals, number, loops, larger)
    values = {
        draws[n].name: seen.in_steps(_constant(ops, a.placed), n)
        for n, a in asked.items()
        if a.points is None and a.placed is not None
    }
    everywhere = {draws[n].name for n in asked if layout.estimator(layout.site_groups[n]).differentiates_all}
    hard, along = _costs_at(ops, host, run, values, everywhere)
    relaxed = _relaxed_costs(ops, host, draws, asked, seen)
    sloped = _sloped_costs(ops, host, run, draws, asked, seen)
    loss = None
    total = at_every_draw(ops, layout, run, along) if along else None
    if finite is not None and total is not None:
        finite.update(dict.fromkeys(along, ops.xp.isfinite(ops.stop_gradient(total))))
    for group, draw in draws.items():
        costs = hard.get(draw.name)
        terms = BranchTerms(
            draw,
            seen.at_draw(group),
            asked[group],
            None if costs is None else seen.in_branches(costs, group),
            *relaxed.get(group, (None, None)),
            None if costs is None else partial(seen.shares, costs, group),
            higher_order,
        )
        if group in sloped:
            costs, along_points, along_draw = sloped[group]
            terms = replace(terms, costs=costs, along_points=along_points, along_draw=along_draw)
        estimator = layout.estimator(layout.site_groups[group])
        term, learning = estimator.branch_surrogate(terms), estimator.loss_of(terms)
        if finite is not None:
            finite[draw.name] = ops.xp.isfinite(ops.stop_gradient(term)) & finite.get(draw.name, True)
        term = larger[group] * term if larger[group] > 1 else term
        total = term if total is None else total + term
        if learning is not None:
            loss = learning if loss is None else loss + learning
    return total, loss


@dataclass(frozen=True)
class _Seen:
    """The signals of a run as the estimators of its branches see them: those of one process, step by step in a loop.

    `larger` says for each group of sites how many times less a cost of one process is.
    """

    signals: Signals
    number: int
    loops: Mapping[int, LoopSteps]
    larger: Mapping[int, int]

    def in_steps(self, values: Values, n: int) -> Values:
        return self.loops[n].branches(values) if n in self.loops else values

    def of_one_process(self, cost: Array, n: int) -> Array:
        return cost / self.larger[n] if self.larger[n] > 1 else cost

    def total(self, costs: Sequence[Array]) -> Array:
        return self.signals.total_at_draw(self.number, costs)

    def shares(self, costs: Sequence[Array], n: int) -> Array:
        found = self.of_one_process(self.signals.shares_in_branches(self.number, costs), n)
        return self.loops[n].in_branches(found) if n in self.loops else found

    def in_branches(self, costs: Sequence[Array], n: int, constant: bool = True) -> Array:
        found = self.of_one_process(self.signals.in_branches(self.number, n, costs, constant), n)
        return self.loops[n].in_branches(found) if n in self.loops else found

    def at_draw(self, n: int) -> Array:
        found = self.of_one_process(self.signals.at_draw(self.number, n)[:, 0], n)
        return self.loops[n].at_draw(found) if n in self.loops else found


def _relaxed_costs(
    ops: Ops, host: BranchHost, draws: Mapping[int, Draw], asked: Mapping[int, Alternatives], seen: _Seen
) -> dict[int, tuple[Array, Array]]:
    """Return the costs at the weights that are asked for, and their derivative, by the number of the site's group."""
    soft = [n for n, a in asked.items() if a.weights is not None]
    if not soft:
        return {}

    def at_weights(points: list[Array]) -> list[Array]:
        placed = {
            draws[n].name: seen.in_steps(Values.of(draws[n].embed_weights(point)), n)
            for n, point in zip(soft, points, strict=True)
        }
        costs = host.soft_costs(placed, {draws[n].name: asked[n].temperature for n in soft})
        return [seen.in_branches(costs[draws[n].name], n, False) for n in soft]

    costs, slopes = ops.value_and_grad(at_weights, [asked[n].weights for n in soft])
    return {n: (cost, _where_possible(draws[n], slope)) for n, cost, slope in zip(soft, costs, slopes, strict=True)}


def _sloped_costs(
    ops: Ops,
    host: BranchHost,
    run: Run,
    draws: Mapping[int, Draw],
    asked: Mapping[int, Alternatives],
    seen: _Seen,
) -> dict[int, tuple[Array, Array, Array]]:
    """Return the costs at values with points, their derivative along the points, and that of the draw's cost along the draw.

    All are constants, by the number of the site's group. At the draw all sites are differentiated at once: what depends on a site is in
    its own cost.
    """
    sloped = [n for n, a in asked.items() if a.points is not None]
    if not sloped:
        return {}
    several = [n for n in sloped if asked[n].count]
    drawn = run if run.drawn is None else replace(run, costs=run.drawn)

    def differentiated(numbers: Mapping[int, slice]) -> tuple[list[Array], list[Array]]:
        def at_points(points: list[Array]) -> list[Array]:
            placed = {}
            for (n, part), point in zip(numbers.items(), points, strict=True):
                values = asked[n].values(point).between(part.start, part.stop)  # type: ignore[operator, misc]
                placed[draws[n].name] = seen.in_steps(values, n)
            costs = host.value_costs(placed)
            return [seen.in_branches(costs[draws[n].name], n, False) for n in numbers]

        return ops.value_and_grad(at_points, [asked[n].points for n in numbers])

    def in_parts(n: int) -> tuple[Array, Array]:
        parts = [differentiated({n: slice(*part)}) for part in chunks(asked[n].count, host.held_at_once)]
        return ops.xp.concat([cost for (cost,), _ in parts], axis=1), sum(slope for _, (slope,) in parts)

    if several and host.held_at_once is None:
        every = differentiated({n: slice(0, asked[n].count) for n in several})
        found = dict(zip(several, zip(*every, strict=True), strict=True))
    else:
        found = {n: in_parts(n) for n in several}
    none = [cost[:0] for cost in drawn.costs]
    slopes = host.path_slopes(drawn, [draws[n].name for n in sloped], lambda costs, _: seen.total(costs))
    result = {}
    for n, (_, slope) in zip(sloped, slopes, strict=True):
        costs, along_points = found[n] if n in found else (seen.in_branches(none, n), asked[n].points)
        along_draw = draws[n].of_elements(seen.of_one_process(slope, n))
        result[n] = (ops.stop_gradient(costs), ops.stop_gradient(along_points), ops.stop_gradient(along_draw))
    return result


def _with_score(layout: Layout, site: SiteSpec) -> SiteSpec | None:
    """Return a site that follows another one and has a score, or branches of its own: a derivative in branches would lack it."""
    for other in layout.sites:
        scored = other.estimator.uses_score or other.estimator.uses_branches
        if other.name != site.name and scored and site.name in layout.ancestors.get(other.name, {}):
            return other
    return None


def _refuse_scored(site: SiteSpec, other: SiteSpec | None) -> None:
    """Refuse a site under an estimator that differentiates branches in any case, if such a site follows it."""
    if other is not None and site.estimator.differentiates_branches:
        raise EstimatorError(
            f"Site '{other.name}' follows site '{site.name}', whose {site.estimator!r} differentiates the program at other values of it, "
            f"where {other.estimator!r} has no derivative; {site.estimator.if_undifferentiable} at '{site.name}'."
        )


def _costs_at(
    ops: Ops, host: BranchHost, run: Run, values: Mapping[str, Values], everywhere: Collection[str]
) -> tuple[dict[str, Sequence[Array]], Mapping[str, Sequence[Array]]]:
    """Return the costs where each site takes its alternatives: no rows for a site of one value, which has no other.

    The second are those of the sites whose costs are differentiated `everywhere`, with their gradient to the parameters.
    """
    several = {name: value for name, value in values.items() if value.count}
    differentiated = {name: value for name, value in several.items() if name in everywhere}
    constant = {name: value for name, value in several.items() if name not in everywhere}
    along = host.differentiated_costs(differentiated) if differentiated else {}
    found: dict[str, Sequence[Array]] = {name: [cost[:0] for cost in run.costs] for name in values}
    found.update(host.branch_costs(constant) if constant else {})
    found.update((name, [ops.stop_gradient(cost) for cost in costs]) for name, costs in along.items())
    return found, along


def _where_possible(draw: Draw, slopes: Array) -> Array:
    """Return slopes with those along impossible categories, where they may be anything, replaced by 0."""
    if draw.is_matrix:
        return slopes  # The logits of a ranking are finite.
    return draw.where_possible(slopes)


def _constant(ops: Ops, values: Values) -> Values:
    elements = values.elements
    if elements is not None:
        elements = replace(elements, values=ops.stop_gradient(elements.values))
    return replace(values, at=lambda numbers: ops.stop_gradient(values.at(numbers)), elements=elements)


def with_other_sites(
    ops: Ops, layout: Layout, site: str, found: Mapping[tuple[str, float], Array], drawn: Sequence[Array]
) -> list[Array]:
    """Return the costs of a branch in the order of the layout, where a site decides which others exist.

    `found` holds them by name and sign, (1, *batch); `drawn` are those of the draw. A site that the branch lacks costs nothing. What
    exists in the branch alone surely depends on the site, and is added to the site's own density, whichever element of it decides.

    Raises:
        ProgramError: the site's elements take other values at once, so that it is not known which of them decides.
    """
    known = {(spec.name, spec.sign) for spec in layout.costs}
    others = [key for key in found if key not in known]
    lacking = [key for key in known if key not in found]
    costs = [
        found.get((spec.name, spec.sign), ops.xp.zeros_like(x)) for spec, x in zip(layout.costs, drawn, strict=True)
    ]
    if not others and not lacking:
        return costs
    own = next((i for i, spec in enumerate(layout.costs) if spec.name == site and spec.sign < 0), None)
    group = next(group for group in layout.site_groups if layout.sites[group.members[0]].name == site)
    if own is None or layout.costs[own].closed or math.prod(group.shape) > 1:
        raise exists_or_not(min([*others, *lacking])[0], f"the value of site '{site}'")
    total = sum((sign * ops.xp.sum(found[name, sign]) for name, sign in others), ops.xp.sum(costs[own]) * 0)
    costs[own] = costs[own] - total / math.prod(costs[own].shape)
    return costs


def exists_or_not(name: str, where: str) -> ProgramError:
    """Return the refusal of a site that not every run of the program has."""
    return ProgramError(
        f"Site '{name}' exists or not depending on {where}, whose estimator runs the program at other values; "
        "use ScoreFunction() there."
    )


def chunks(count: int, at_once: int | None) -> list[tuple[int, int]]:
    """Return the first and the last number (exclusive) of chunks of nearly equal size, of at most `at_once`.

    >>> chunks(10, 4), chunks(3, None)
    ([(0, 4), (4, 8), (8, 10)], [(0, 3)])
    """
    number = 1 if at_once is None else -(-count // at_once)
    size = -(-count // number)
    return [(first, min(first + size, count)) for first in range(0, count, size)]
