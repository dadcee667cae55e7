"""Which cases of an exhaustive grid `make test` runs."""

import itertools
from types import SimpleNamespace

import pytest

from tests.covering import covering, left_out


def test_each_value_of_each_parameter_occurs():
    grid = [(("a", a), ("b", b)) for a, b in itertools.product(range(6), range(4))]
    chosen = [grid[n] for n in sorted(covering(grid))]
    assert {value for case in chosen for value in case} == {value for case in grid for value in case}
    assert len(chosen) == 6


def test_the_values_of_a_short_parameter_share_the_cases():
    grid = [(("script", a), ("library", b)) for a, b in itertools.product(range(10), ("pyro", "numpyro"))]
    chosen = [grid[n] for n in covering(grid)]
    assert sum(("library", "pyro") in case for case in chosen) == 5


@pytest.mark.slow
def test_pairs_that_are_no_product_are_covered_too():
    pairs = [(("a", 0), ("b", 0)), (("a", 0), ("b", 1)), (("a", 1), ("b", 1))]
    assert covering(pairs) == {0, 2}


def cases(function, *marks, **params):
    """Return what pytest would collect of one test function."""
    closest = {mark.name: mark for mark in marks}
    return [
        SimpleNamespace(
            nodeid=f"{function}[{chosen}]",
            callspec=SimpleNamespace(params=dict(zip(params, chosen, strict=True))),
            get_closest_marker=closest.get,
        )
        for chosen in itertools.product(*params.values())
    ]


def run(items, *given):
    out = left_out(items, *given)
    return [item.nodeid for n, item in enumerate(items) if n not in out]


def test_functions_together_run_each_program_once_and_each_function_with_all_that_is_its_own():
    mark = pytest.mark.grid(together="programs").mark
    items = [
        *cases("one", mark, name=range(6)),
        *cases("two", mark, name=range(6), how=(True, False)),
        *cases("other", pytest.mark.grid.mark, name=range(6)),
    ]
    found = [name for name in run(items, False) if not name.startswith("other")]
    assert len(found) == 6
    assert {name.partition("[")[2].strip("](),").split(",")[0] for name in found} == set("012345")
    assert {"True", "False"} == {name.split(", ")[1].strip(")]") for name in found if name.startswith("two")}
    assert any(name.startswith("one") for name in found)
    assert sum(name.startswith("other") for name in run(items, False)) == 6
    assert len(run(items, True)) == len(items)


def test_at_most_so_many_cases_of_each_function():
    items = [
        *cases("one", a=range(7)),
        *cases("two", a=range(2)),
        *cases("gone", pytest.mark.exhaustive.mark, a=range(2)),
    ]
    assert run(items, False, 2) == ["one[(0,)]", "one[(3,)]", "two[(0,)]", "two[(1,)]"]
