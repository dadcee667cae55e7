"""Which cases of a test `make test` runs: of a grid, enough that each value of each parameter occurs; of what is slow, as many as the
time allows that its function has. `make test-all` runs all.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest

SECONDS = 0.8
"""What the cases of one test function may take in `make test`; one case is always run."""

SECONDS_FOR_EXACT = 2.0
"""The same, for functions that compare with an enumeration: they are what the others rest on."""

SECONDS_FOR_BROKEN, BROKEN = 4.0, re.compile("mutant|caught|(?<!de)fault")
"""The same, for functions that show that other tests would fail on a broken estimator; two cases are always run."""


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


def spread(cases: Sequence[Iterable[Hashable]], most: int, name: str) -> set[int]:
    """Return the numbers of `most` cases, those first that hold what is not yet held, and else such as lie far apart.

    Where to begin depends on the function's `name`, so that functions with the same parameters do not all run the same case of them.
    """
    held = [set(case) for case in cases]
    begin = zlib.crc32(name.encode()) / 2**32
    # Multiples of the golden section lie evenly between 0 and 1, however many are taken.
    order = sorted(range(len(held)), key=lambda n: (begin + n * 0.618033988749895) % 1)
    chosen: list[int] = []
    seen: set[Hashable] = set()
    while len(chosen) < min(most, len(held)):
        best = max((n for n in order if n not in chosen), key=lambda n: len(held[n] - seen))
        chosen.append(best)
        seen |= held[best]
    return set(chosen)


def too_long(items: Sequence[Any], out: set[int], durations: Mapping[str, float]) -> set[int]:
    """Return the numbers of tests that are not `out` and for which their function has no time; `durations` has seconds of one case."""
    beyond: set[int] = set()
    for name, numbers in by_function(items, out).items():
        test = name.rpartition("::")[2]
        if name not in durations:
            continue
        least = 2 if BROKEN.search(test) else 1
        seconds = SECONDS_FOR_BROKEN if BROKEN.search(test) else SECONDS_FOR_EXACT if "exact" in test else SECONDS
        kept = spread([values(items[n]) for n in numbers], max(least, int(seconds / durations[name])), name)
        beyond |= {number for place, number in enumerate(numbers) if place not in kept}
    return beyond


def mostly(kept: Iterable[str], names: Iterable[Any]) -> list[Any]:
    """Return names as parameters, of which `make test` runs those that are `kept`, and `make test-all` all."""
    chosen = set(kept)
    given = [name if hasattr(name, "marks") else pytest.param(name) for name in names]
    return [
        one if one.values[0] in chosen else pytest.param(*one.values, marks=[*one.marks, pytest.mark.exhaustive])
        for one in given
    ]


def left_out(
    items: Sequence[Any], every: bool, most: int = 0, durations: Mapping[str, float] | None = None
) -> set[int]:
    """Return the numbers of the collected tests that are not run: those that are `exhaustive`, unless `every` one is asked for, and cases of a `grid`.

    Of a grid these are the cases that its mark is `without`, a function of the parameters, and unless `every` one is asked for, those that a cover of the
    others does not need. A grid is one test function, or all those whose marks name the same thing to run `together`. Of the remaining
    cases of a function those are run for which it has time, by the `durations` that were measured, and at `most` so many, if a number is given.
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
    if not every:
        out |= too_long(items, out, durations or {})
    return out | (beyond(items, out, most) if most else set())


def asked(request: Any, parameter: str) -> list[Any]:
    """Return the values of a parameter in the tests of a fixture's module that are run: what it need not make, nobody asks for."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return list(dict.fromkeys(item.callspec.params[parameter] for item in here if parameter in item.callspec.params))


def function_of(item: Any) -> str:
    """Return the name of a test without its parameters."""
    return str(item.nodeid.partition("[")[0])


def by_function(items: Sequence[Any], out: set[int]) -> dict[str, list[int]]:
    """Return the numbers of the tests that are not `out`, by their function."""
    cases = defaultdict(list)
    for number, item in enumerate(items):
        if number not in out:
            cases[function_of(item)].append(number)
    return cases


def beyond(items: Sequence[Any], out: set[int], most: int) -> set[int]:
    """Return the numbers of tests that are not `out` and of which their function has more than it may: evenly spread ones stay."""
    return {
        number
        for numbers in by_function(items, out).values()
        if len(numbers) > most
        for number in set(numbers) - {numbers[len(numbers) * k // most] for k in range(most)}
    }


def values(item: Any) -> list[Hashable]:
    """Return what a case of a grid holds: the values of its parameters, two of which are the same if they print the same.

    Functions that run `together` share the parameters that have one name.
    """
    return [(name, repr(value)) for name, value in (item.callspec.params if hasattr(item, "callspec") else {}).items()]
