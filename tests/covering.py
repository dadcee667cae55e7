"""Which cases of a grid `make test` runs: enough that each value of each parameter occurs. `make test-all` runs all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest


def covering(cases: Sequence[Iterable[Hashable]]) -> set[int]:
    """Return the numbers of cases that together hold everything that any case holds: greedily.

    Of the cases that add as much, the first whose values were taken least often is taken, so that a parameter with few values is not covered
    by one of them alone. The choice depends on nothing but the cases: the processes of pytest-xdist agree.
    """
    held = [set(case) for case in cases]
    missing: set[Hashable] = set().union(*held)
    taken: Counter[Hashable] = Counter()
    chosen: set[int] = set()
    while missing:
        best = max(range(len(held)), key=lambda n: (len(held[n] & missing), -sum(taken[x] for x in held[n]), -n))
        chosen.add(best)
        missing -= held[best]
        taken.update(held[best])
    return chosen


def mostly(kept: Iterable[str], names: Iterable[Any]) -> list[Any]:
    """Return names as parameters, of which `make test` runs those that are `kept`, and `make test-all` all."""
    chosen = set(kept)
    given = [name if hasattr(name, "marks") else pytest.param(name) for name in names]
    return [
        one if one.values[0] in chosen else pytest.param(*one.values, marks=[*one.marks, pytest.mark.exhaustive])
        for one in given
    ]


def left_out(items: Sequence[Any], every: bool, most: int = 0) -> set[int]:
    """Return the numbers of the collected tests that are not run: those that are `exhaustive`, unless `every` one is asked for, and cases of a `grid`.

    Of a grid these are the cases that its mark is `without`, a function of the parameters, and unless `every` one is asked for, those that a cover of the
    others does not need. A grid is one test function, or all those whose marks name the same thing to run `together`. If a number is given, at
    `most` so many of the remaining cases of each function are run.
    """
    grids, out = defaultdict(list), set()
    for number, item in enumerate(items):
        if item.get_closest_marker("exhaustive") is not None and not every:
            out.add(number)
            continue
        mark = item.get_closest_marker("grid")
        if mark is None:
            continue
        if "without" in mark.kwargs and mark.kwargs["without"](**item.callspec.params):
            out.add(number)
        else:
            grids[mark.kwargs.get("together", function_of(item))].append(number)
    for numbers in () if every else grids.values():
        kept = covering([[function_of(items[n]), *values(items[n])] for n in numbers])
        out |= {number for place, number in enumerate(numbers) if place not in kept}
    return out | (beyond(items, out, most) if most else set())


def function_of(item: Any) -> str:
    """Return the name of a test without its parameters."""
    return str(item.nodeid.partition("[")[0])


def beyond(items: Sequence[Any], out: set[int], most: int) -> set[int]:
    """Return the numbers of tests that are not `out` and of which their function has more than it may: evenly spread ones stay."""
    cases = defaultdict(list)
    for number, item in enumerate(items):
        if number not in out:
            cases[function_of(item)].append(number)
    return {
        number
        for numbers in cases.values()
        if len(numbers) > most
        for number in set(numbers) - {numbers[len(numbers) * k // most] for k in range(most)}
    }


def values(item: Any) -> list[Hashable]:
    """Return what a case of a grid holds: the values of its parameters, two of which are the same if they print the same.

    Functions that run `together` share the parameters that have one name.
    """
    return [(name, repr(value)) for name, value in (item.callspec.params if hasattr(item, "callspec") else {}).items()]
