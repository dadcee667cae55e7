"""Costs that are averaged exactly over the joint values of the sites under `Enumerate`, given all other draws.

A cost depends on some of these sites. With their probabilities, Σ_z q(z) f(z) stands in the place of f: in the value, in its gradient,
and in the downstream costs of sites whose own draw is not changed by z. What is summed over together are the largest sets of sites that
some cost depends on; a cost that depends on fewer of them takes the rows where the others keep their draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from pplgrad.core.alternatives import Values
from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.draw import Draw, HostDraw
from pplgrad.core.noise import Noise, noise_for
from pplgrad.core.plates import Plate
from pplgrad.core.shapes import aligned, plate_shape, to_shape
from pplgrad.core.sites import CostSpec, Run, SiteSpec
from pplgrad.errors import EstimatorError, listed

Request = Mapping[str, Values]
"""The category numbers that each site of a sum takes in its rows, (particles, rows, *B, *N): all sites have as many rows."""


class JointRows(NamedTuple):
    """What the rows of a sum give, with their gradient: arrays of shape (particles, rows, *batch).

    `costs` are all costs, in the layout's order. `scores` is, for each site of the sum, log q of its value in the row, neither scaled nor
    masked; that of an impossible value is bounded (`array_ops.bounded`), and the row runs at another value.
    """

    costs: Sequence[Array]
    scores: Mapping[str, Array]


def places_of(requests: Sequence[Request]) -> list[tuple[int, int]]:
    """Return the first row of each sum, and the row after its last, where the rows of all sums stand one behind the other."""
    ends = list(accumulate((next(iter(request.values())).count for request in requests), initial=0))
    return list(pairwise(ends))


def another_number(site: str) -> EstimatorError:
    """Return the error for a site that takes another number of values where other sites have other values."""
    return EstimatorError(
        f"Enumerate() at site '{site}' needs a number of values that does not depend on other sites, and it has another at other "
        "values of the sites that it follows; use ScoreFunction() there."
    )


class JointHost(Protocol):
    """The part of a plug-in that runs the program at joint values of several sites."""

    def draw(self, site: str) -> HostDraw:
        """Return the draw of a site."""

    def noise(self, site: str) -> Noise:
        """Return the noise of a site's estimator."""

    def joint_rows(self, requests: Sequence[Request]) -> Sequence[JointRows]:
        """Run the program at the joint values of each sum. Sites of other sums keep their draw, or are drawn again where they follow."""


@dataclass(frozen=True)
class JointSum:
    """Sites that are summed over together, in the guide's order, and the costs that are averaged over them.

    `plates` are, for each site, those whose elements change at once. `costs` says of each cost (by its number) on which of the sites it
    depends, by their places in `sites`.
    """

    sites: tuple[int, ...]
    plates: tuple[tuple[Plate, ...], ...]
    costs: Mapping[int, tuple[int, ...]]


def joint_sums(
    sites: Sequence[SiteSpec], costs: Sequence[CostSpec], read: Sequence[Mapping[str, Any]], separable: Any
) -> list[JointSum]:
    """Return the sums of a program, given what each cost depends on, and a function that returns a site's separable plates."""
    numbers = {site.name: i for i, site in enumerate(sites) if site.estimator.enumerates}
    if not numbers:
        return []
    wanted = [frozenset(numbers[name] for name in reads if name in numbers) for reads in read]
    largest: list[frozenset[int]] = []
    for candidate in sorted(set(wanted), key=lambda found: (-len(found), sorted(found))):
        if candidate and not any(candidate <= other for other in largest):
            largest.append(candidate)
    plates = {i: separable(sites[i]) for i in numbers.values()}
    found = []
    taken: set[int] = set()
    for members in sorted(largest, key=sorted):
        order = tuple(sorted(members))
        mine = {k: w for k, w in enumerate(wanted) if w and w <= members and k not in taken}
        taken.update(mine)
        places = {k: tuple(order.index(i) for i in sorted(w)) for k, w in mine.items()}
        found.append(JointSum(order, tuple(plates[i] for i in order), places))
    return found


@dataclass(frozen=True)
class _Sum:
    """A sum in one run: the draws of its sites, and how many values each of them takes."""

    joint: JointSum
    names: tuple[str, ...]
    draws: tuple[Draw, ...]
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.sizes)

    def request(self) -> Request:
        """Return the category numbers in all rows but the first, in which every site keeps its draw."""
        behind = [math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes))]
        return {
            name: _shifted(draw, step, size)
            for name, draw, step, size in zip(self.names, self.draws, behind, self.sizes, strict=True)
        }


def _shifted(draw: Draw, step: int, size: int) -> Values:
    """Return a draw's category numbers moved by the digits of each row's number."""
    xp, categories = draw.ops.xp, draw.log_probs.shape[-1]

    def at(numbers: Array) -> Array:
        elements = draw.index.shape[-1]
        value = (numbers + 1) // step % size
        digits = [value // categories**i % categories for i in range(elements)]
        shifts = xp.stack(digits, axis=-1)
        shifts = xp.reshape(shifts, (1, shifts.shape[0], *(1,) * (len(draw.index.shape) - 2), elements))
        return draw.numbered((draw.index[:, None] + shifts) % categories)

    return Values(-1, at)


def evaluations(ops: Ops, joints: Sequence[JointSum], sites: Sequence[SiteSpec], run: Run, host: JointHost) -> dict:
    """Return how many evaluations the sums of a run need, by the name of each sum's last site."""
    counts: dict[str, int] = {}
    for found in _sums(ops, joints, sites, run, host):
        counts[found.names[-1]] = counts.get(found.names[-1], 0) + found.rows - 1
    return counts


def _sums(ops: Ops, joints: Sequence[JointSum], sites: Sequence[SiteSpec], run: Run, host: JointHost) -> list[_Sum]:
    found = []
    for joint in joints:
        members = [sites[i] for i in joint.sites]
        draws = tuple(
            _draw(ops, run, host, i, sites[i], plates) for i, plates in zip(joint.sites, joint.plates, strict=True)
        )
        sizes = tuple(draw.log_probs.shape[-1] ** draw.index.shape[-1] for draw in draws)
        _refuse_large(members, draws, math.prod(sizes))
        found.append(_Sum(joint, tuple(site.name for site in members), draws, sizes))
    return found


def _draw(ops: Ops, run: Run, host: JointHost, number: int, site: SiteSpec, plates: Sequence[Plate]) -> Draw:
    noise = noise_for(site.name, ops, host.noise)
    return Draw(
        ops, host.draw(site.name), plates, plate_shape(plates), noise, run.scores[number], _nothing, lambda *_: {}
    )


def _nothing(name: str, start: Any) -> Array:
    raise TypeError("A site that is summed over learns nothing.")


def _refuse_large(sites: Sequence[SiteSpec], draws: Sequence[Draw], rows: int) -> None:
    limit = min(site.estimator.limit for site in sites)  # type: ignore[attr-defined]
    if rows <= limit:
        return
    parts = [
        f"{draw.log_probs.shape[-1]} values" + (f" of {n} elements" if (n := draw.index.shape[-1]) > 1 else "")
        for draw in draws
    ]
    names = [site.name for site in sites]
    where = f"site '{names[0]}'" if len(names) == 1 else f"sites {listed(names)}, which meet in one log density"
    # Of many sites the first few tell what is meant.
    shown = ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")
    size = f"{rows:,}" if rows < 10**15 else f"10^{int(math.log10(rows))} or more"
    raise EstimatorError(
        f"Enumerate(limit={limit}) would sum over {size} joint values at {where} ({shown}); use LocalExpectation() or ScoreFunction() "
        f"at {'it' if len(names) == 1 else 'some of them'}, or raise the limit."
    )


def summed(
    ops: Ops,
    joints: Sequence[JointSum],
    sites: Sequence[SiteSpec],
    run: Run,
    host: JointHost,
    held: Sequence[bool],
    finite: dict[str, Array],
) -> Run:
    """Return a run whose costs are averaged over the sites under `Enumerate`; `drawn` holds those of the draw.

    `held` says of each cost whether it counts as a constant. Whether the average at a sum's sites is finite is noted in `finite`.
    """
    every = _sums(ops, joints, sites, run, host)
    several = [one for one in every if one.rows > 1]
    requests = [{name: replace(x, count=one.rows - 1) for name, x in one.request().items()} for one in several]
    answers = dict(zip(map(id, several), host.joint_rows(requests) if requests else (), strict=True))
    costs = list(run.costs)
    for one in every:
        averages = _Averages(ops, run, one, answers.get(id(one)))
        for number, places in one.joint.costs.items():
            costs[number] = averages.of(number, places, held[number])
            fine = ops.xp.all(ops.xp.isfinite(ops.stop_gradient(costs[number])))
            name = one.names[places[-1]]
            finite[name] = fine & finite[name] if name in finite else fine
    return replace(run, costs=costs, drawn=run.costs)


class _Averages:
    """The averages of costs over one sum. Rows are laid out with an axis for each site: (particles, *sizes, *batch)."""

    def __init__(self, ops: Ops, run: Run, found: _Sum, rows: JointRows | None) -> None:
        self._ops = ops
        self._run = run
        self._sum = found
        self._rows = rows
        self._weights: dict[tuple[int, ...], Array] = {}

    def of(self, number: int, places: tuple[int, ...], held: bool) -> Array:
        """Return Σ_z q(z) f(z) for a cost that depends on the sites at these places: (particles, *batch)."""
        xp, lead = self._ops.xp, 1 + len(places)
        cost = self._table(self._run.costs[number], None if self._rows is None else self._rows.costs[number], places)
        if held:
            cost = self._ops.stop_gradient(cost)
        weights = self._weight(places)
        ndim = max(len(cost.shape), len(weights.shape)) - lead
        product = xp.exp(aligned(self._ops, weights, lead, ndim)) * aligned(self._ops, cost, lead, ndim)
        return xp.sum(product, axis=tuple(range(1, lead)))

    def _weight(self, places: tuple[int, ...]) -> Array:
        """Return Σ log q of the sites at these places, (particles, *sizes, *plates)."""
        if places not in self._weights:
            lead, found = 1 + len(places), []
            for place in places:
                name, shape = self._sum.names[place], plate_shape(self._sum.joint.plates[place])
                at_draw = to_shape(self._ops, self._run.scores[self._sum.joint.sites[place]], shape)
                rows = None if self._rows is None else self._reduced(self._rows.scores[name], shape)
                found.append(self._table(at_draw, rows, places))
            ndim = max(len(x.shape) for x in found) - lead
            found = [aligned(self._ops, x, lead, ndim) for x in found]
            self._weights[places] = sum(found[1:], found[0])
        return self._weights[places]

    def _reduced(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Sum log densities, (particles, rows, *batch), over what is no plate of the shape."""
        xp = self._ops.xp
        flat = to_shape(self._ops, xp.reshape(x, (-1, *x.shape[2:])), shape)
        return xp.reshape(flat, (*x.shape[:2], *flat.shape[1:]))

    def _table(self, at_draw: Array, rows: Array | None, places: tuple[int, ...]) -> Array:
        """Join the draw's array and those of the rows, and leave out the rows in which sites at other places move."""
        xp, sizes = self._ops.xp, self._sum.sizes
        table = at_draw[:, None]
        if rows is not None:
            ndim = max(len(at_draw.shape) - 1, len(rows.shape) - 2)
            table, rows = aligned(self._ops, table, 2, ndim), aligned(self._ops, rows, 2, ndim)
            batch = np.broadcast_shapes(tuple(table.shape[2:]), tuple(rows.shape[2:]))
            parts = [xp.broadcast_to(x, (*x.shape[:2], *batch)) for x in (table, rows)]
            table = xp.concat(parts, axis=1)
        table = xp.reshape(table, (table.shape[0], *sizes, *table.shape[2:]))
        return table[(slice(None), *(slice(None) if i in places else 0 for i in range(len(sizes))))]
