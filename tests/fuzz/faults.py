"""Faults that this library once had, and the trials of random programs that showed them: put back, they must be found again.

`put_back` breaks what mended the fault; where it is None, the mended code has no single place to break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pplgrad.engine import dependencies, layout, program
from pplgrad.testing.fuzz.trials import Trial


@dataclass(frozen=True)
class Fault:
    """A fault, and the trials that show it."""

    trials: tuple[Trial, ...]
    put_back: Callable[[Any], None] | None = None


def _kept(state: str, seed: int = 2) -> Fault:
    return Fault((Trial(seed, "pyro", way="kept", flavours=(f"state:{state}",)),))


def _detour(way: str) -> Fault:
    return Fault(tuple(Trial(seed, "pyro", flavours=(f"detour:{way}",)) for seed in (0, 1)))


def a_path_that_leaves_a_plate_and_comes_back(patch: Any) -> None:
    """A site between two that stands outside of the first one's plate is passed through element by element."""
    plain = dependencies.through
    patch.setattr(dependencies, "through", lambda read, site, left: plain(read, site, frozenset()))


def elements_mixed_inside_a_plate(patch: Any) -> None:
    """What reads other elements of its own plate is taken to read its own."""
    patch.setattr(program.Read, "mixes", lambda self, plate: False)


def only_direct_dependencies(patch: Any) -> None:
    """A cost is charged to the sites that it reads, and not to those which decide what it reads."""
    patch.setattr(layout, "cost_dependencies", lambda sites, costs, closed: [dict(cost.reads) for cost in costs])


FAULTS: dict[str, Fault] = {}
