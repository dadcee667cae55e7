"""The static half of the surrogate: which costs are summed for which site, found once for a program's structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.core.plates import AFTER, BEFORE, EVERY, SAME, Plate, Read
from pplgrad.core.shapes import Shape, plate_shape
from pplgrad.core.sites import CostSpec, SiteSpec
from pplgrad.engine.closed_forms import refuse_lossy
from pplgrad.engine.dependencies import cost_dependencies, site_dependencies
from pplgrad.engine.joint_sums import JointSum, joint_sums
from pplgrad.engine.sums import Sums
from pplgrad.engine.weight_plates import weight_plates

if TYPE_CHECKING:
    from pplgrad.core.estimator import Estimator


@dataclass(frozen=True)
class SiteGroup:
    """Sites that share their plates and their estimator, handled as one array of shape (particles, n, *shape)."""

    members: tuple[int, ...]
    plates: tuple[Plate, ...]
    shape: Shape


@dataclass(frozen=True)
class CostGroup:
    """Costs that share their plates, handled as one array of shape (parts, particles, *shape).

    A part holds the costs that depend on the same scored sites in the same way, as their numbers in `members`. Parts that
    depend on the most sites come first, which is the order in which the rewards-to-go of a chain add them up.
    """

    members: tuple[int, ...]
    plates: tuple[Plate, ...]
    shape: Shape
    signs: np.ndarray
    parts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Link:
    """How the costs of one group reach the sites of another, along the time axis where they share one.

    `sums[flag]` says which of the group's parts each site's sum holds, and how they are added up.
    `summed` are the axes (negative, in the cost's own shape) that the site's plates do not have, or along which these costs
    depend on other elements of the draw than their own; `time_dim` is the shared time axis, or None.
    """

    costs: int
    summed: tuple[int, ...]
    time_dim: int | None
    sums: dict[int, Sums]


@dataclass
class Layout:
    """Everything about a program's structure that the surrogate needs, and no array."""

    sites: Sequence[SiteSpec]
    costs: Sequence[CostSpec]
    site_groups: list[SiteGroup] = field(default_factory=list)
    cost_groups: list[CostGroup] = field(default_factory=list)
    links: list[list[Link]] = field(default_factory=list)
    ancestors: dict[str, dict[str, Read]] = field(default_factory=dict)
    joint_sums: list[JointSum] = field(default_factory=list)
    weight_plates: tuple[Plate, ...] | None = None

    @property
    def weight_shape(self) -> Shape:
        """Return the shape of the importance weights."""
        return plate_shape(self.weight_plates or ())

    def estimator(self, group: SiteGroup) -> Estimator:
        """Return the estimator of a group's sites."""
        return self.sites[group.members[0]].estimator

    def follows_sum(self, site: str) -> bool:
        """Return whether a site's draw depends on one that is summed over."""
        return not self._summed.isdisjoint(self.ancestors.get(site, ()))

    @cached_property
    def _summed(self) -> frozenset[str]:
        return frozenset(self.sites[i].name for joint in self.joint_sums for i in joint.sites)

    @classmethod
    def build(cls, sites: Sequence[SiteSpec], costs: Sequence[CostSpec], objective: Objective | None = None) -> Layout:
        """Group sites and costs by their plates, close the dependencies and lay out the sums."""
        closed = site_dependencies(sites)
        depends = cost_dependencies(sites, costs, closed)
        refuse_lossy(costs, depends)
        layout = cls(sites, costs, ancestors=closed)
        if isinstance(objective, MultiSample):
            layout.weight_plates = weight_plates(sites, costs, depends, objective)
        layout.joint_sums = joint_sums(sites, costs, depends, lambda site: _separable(site, costs, depends))
        scored = [i for i, site in enumerate(sites) if _has_score_term(site.estimator)]

        def key(i: int) -> tuple[tuple[Plate, ...], object]:
            return sites[i].plates, (sites[i].estimator.group_key, layout.follows_sum(sites[i].name))

        for plates, _, members in _grouped(scored, key):
            layout.site_groups.append(SiteGroup(members, plates, plate_shape(plates)))
        for i, site in enumerate(sites):
            if site.estimator.uses_branches:
                plates = layout.weight_plates
                if plates is None:
                    plates = (*_separable(site, costs, depends), *(p for p in site.plates if p.time))
                layout.site_groups.append(SiteGroup((i,), plates, plate_shape(plates)))
        for plates, _, members in _grouped(range(len(costs)), lambda i: (costs[i].plates, None)):
            signs = np.array([costs[i].sign for i in members])
            parts = _parts(
                [depends[i] for i in members], {sites[i].name for g in layout.site_groups for i in g.members}
            )
            layout.cost_groups.append(CostGroup(members, plates, plate_shape(plates), signs, parts))
        for group in layout.site_groups:
            names = [sites[i].name for i in group.members]
            layout.links.append(
                [link for k, cost in enumerate(layout.cost_groups) for link in _links(k, cost, group, names, depends)]
            )
        return layout


def _has_score_term(estimator: Estimator) -> bool:
    return estimator.uses_score and not (estimator.uses_branches or estimator.enumerates)


def _separable(site: SiteSpec, costs: Sequence[CostSpec], depends: list[dict[str, Read]]) -> tuple[Plate, ...]:
    """Return the plates of which every cost downstream depends on its own elements: only these can take other values at once.

    Where a cost couples the elements of a plate, what one of them costs depends on the values of the others.
    """
    downstream = [(cost, reads[site.name]) for cost, reads in zip(costs, depends, strict=True) if site.name in reads]
    return tuple(
        p
        for p in site.plates
        if not p.time and all(p in cost.plates and not read.mixes(p) for cost, read in downstream)
    )


def _grouped(indices, key):  # type: ignore[no-untyped-def]
    groups: dict = {}
    for i in indices:
        plates, extra = key(i)
        groups.setdefault((frozenset(plates), extra), (plates, extra, []))[2].append(i)
    return [(plates, extra, tuple(members)) for plates, extra, members in groups.values()]


def _links(
    index: int, costs: CostGroup, sites: SiteGroup, names: list[str], depends: list[dict[str, Read]]
) -> list[Link]:
    """Return the links from a group of costs to a group of sites: one for each set of plates that the sums go over."""
    time = next((p for p in sites.plates if p.time and p in costs.plates), None)
    shared = [p for p in costs.plates if p in sites.plates and not p.time]
    outside = tuple(p.dim for p in costs.plates if p not in sites.plates)
    rows = {name: row for row, name in enumerate(names)}
    included: dict[tuple[int, ...], dict[int, np.ndarray]] = {}
    for column, part in enumerate(costs.parts):
        for name, read in depends[costs.members[part[0]]].items():
            if name not in rows:
                continue
            summed = (*outside, *(p.dim for p in shared if read.mixes(p)))
            for flag in (SAME, AFTER, BEFORE) if time is not None else (EVERY,):
                if read.steps and (time is None or read.steps & flag):
                    sums = included.setdefault(summed, {})
                    if flag not in sums:
                        sums[flag] = np.zeros((len(names), len(costs.parts)), dtype=bool)
                    sums[flag][rows[name], column] = True
    dim = time.dim if time is not None else None
    return [
        Link(index, summed, dim, {flag: Sums.of(matrix) for flag, matrix in sums.items()})
        for summed, sums in included.items()
    ]


def _parts(depends: Sequence[dict[str, Read]], scored: set[str]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the costs that depend on the same scored sites in the same way, most sites first."""
    parts: dict[frozenset, list[int]] = {}
    for number, reads in enumerate(depends):
        key = frozenset((name, read) for name, read in reads.items() if name in scored and read.steps)
        parts.setdefault(key, []).append(number)
    return tuple(tuple(parts[key]) for key in sorted(parts, key=len, reverse=True))
