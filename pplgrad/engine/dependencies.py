"""From what each draw and each cost reads directly to what it depends on through other draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from pplgrad.core.plates import AFTER, BEFORE, EVERY, OWN, SAME, Dependencies, Plate, Read
from pplgrad.core.sites import CostSpec, SiteSpec

Closed = Mapping[str, Mapping[str, Read]]
"""For each site the sites that its draw depends on, however far up, and in which way."""


def compose(first: int, second: int) -> int:
    """Return the flags of a dependency that goes through two others, one after the other.

    >>> compose(AFTER, SAME) == AFTER, compose(AFTER, AFTER) == AFTER, compose(AFTER, BEFORE) == EVERY
    (True, True, True)
    """
    if not first or not second:
        return 0
    flags = 0
    for a in (SAME, AFTER, BEFORE):
        for b in (SAME, AFTER, BEFORE):
            if first & a and second & b:
                flags |= b if a == SAME else a if b == SAME or a == b else EVERY
    return flags


@lru_cache(maxsize=1 << 12)  # A long chain has millions of dependencies of a few kinds: equal ones are one object.
def through(read: Read, site: Read, left: frozenset[str]) -> Read:
    """Return how something depends on a draw by way of a site that it reads, whose own draw depends on it as `site` says.

    `left` names the plates of the draw in which the site between does not stand: there the path leaves the plate, and when it
    comes back every element has met every other.
    """
    if read is OWN and not left and site.steps == EVERY:
        return site  # By far the most frequent, in long chains.
    steps = EVERY if read.steps == EVERY else compose(read.steps, site.steps)
    across = None if read.across is None or site.across is None else read.across | site.across | left
    return Read(steps, across)


def close(reads: Dependencies, closed: Closed, plates: Mapping[str, frozenset[Plate]]) -> dict[str, Read]:
    """Return all sites that something depends on, given what it reads and what those sites depend on.

    `plates` are those of each site.
    """
    result: dict[str, Read] = dict(reads)
    for name, read in reads.items():
        for upstream, site in closed.get(name, {}).items():
            found = through(read, site, _left(plates[upstream], plates[name]))
            before = result.get(upstream)
            result[upstream] = found if before is None else before if before is found else before.joined(found)
    return result


_NONE: frozenset[str] = frozenset()


def _left(draw: frozenset[Plate], between: frozenset[Plate]) -> frozenset[str]:
    """Return the names of the plates of a draw in which the site between does not stand."""
    return _NONE if draw <= between else frozenset(plate.name for plate in draw - between)


def plates_of(sites: Sequence[SiteSpec]) -> dict[str, frozenset[Plate]]:
    """Return the plates of each site that are no time axis, whose dependencies the flags tell apart."""
    return {site.name: frozenset(plate for plate in site.plates if not plate.time) for site in sites}


def site_dependencies(sites: Sequence[SiteSpec]) -> dict[str, dict[str, Read]]:
    """Return, for each site, every site that its draw depends on (its ancestors, and never only itself).

    The sites come in the order in which the guide drew them, so that one pass closes the relation. A scanned
    site may read itself at earlier steps, and scanned sites may read each other across steps, which is why the
    pass is repeated until nothing changes.
    """
    closed: dict[str, dict[str, Read]] = {site.name: dict(site.reads) for site in sites}
    cyclic = any(plate.time for site in sites for plate in site.plates)
    plates = plates_of(sites)
    while True:
        changed = False
        for site in sites:
            grown = close(closed[site.name] if cyclic else site.reads, closed, plates)
            if grown != closed[site.name]:
                closed[site.name] = grown
                changed = True
        if not cyclic or not changed:
            return closed


def cost_dependencies(sites: Sequence[SiteSpec], costs: Sequence[CostSpec], closed: Closed) -> list[dict[str, Read]]:
    """Return, for each cost, every site whose draw it depends on, with the way of the dependency."""
    plates = plates_of(sites)
    known: dict[frozenset, dict[str, Read]] = {}  # The costs of a site in guide and model often read the same.
    found = []
    for cost in costs:
        reads = frozenset(cost.reads.items())
        if reads not in known:
            known[reads] = close(cost.reads, closed, plates)
        found.append(known[reads])
    return found
