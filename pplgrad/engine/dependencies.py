"""From what each draw and each cost reads directly to what it depends on through other draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pplgrad.engine.program import AFTER, BEFORE, EVERY, SAME, CostSpec, Dependencies, SiteSpec


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


def close(reads: Dependencies, closed: Mapping[str, dict[str, int]]) -> dict[str, int]:
    """Return all sites that something depends on, given what it reads and what those sites depend on."""
    result: dict[str, int] = dict(reads)
    for name, flags in reads.items():
        for upstream, upstream_flags in closed.get(name, {}).items():
            through = EVERY if flags == EVERY else compose(flags, upstream_flags)
            result[upstream] = result.get(upstream, 0) | through
    return result


def site_dependencies(sites: Sequence[SiteSpec]) -> dict[str, dict[str, int]]:
    """Return, for each site, every site that its draw depends on (its ancestors, and never only itself).

    The sites come in the order in which the guide drew them, so that one pass closes the relation. A scanned
    site may read itself at earlier steps, and scanned sites may read each other across steps, which is why the
    pass is repeated until nothing changes.
    """
    closed: dict[str, dict[str, int]] = {site.name: dict(site.reads) for site in sites}
    cyclic = any(plate.time for site in sites for plate in site.plates)
    while True:
        changed = False
        for site in sites:
            grown = close(closed[site.name] if cyclic else site.reads, closed)
            if grown != closed[site.name]:
                closed[site.name] = grown
                changed = True
        if not cyclic or not changed:
            return closed


def cost_dependencies(costs: Sequence[CostSpec], closed: Mapping[str, dict[str, int]]) -> list[dict[str, int]]:
    """Return, for each cost, every site whose draw it depends on, with the flags of the dependency."""
    return [close(cost.reads, closed) for cost in costs]
