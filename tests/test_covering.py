"""Which cases of an exhaustive grid `make test` runs."""

import itertools

from tests.covering import covering


def test_each_value_of_each_parameter_occurs():
    grid = [(("a", a), ("b", b)) for a, b in itertools.product(range(6), range(4))]
    chosen = [grid[n] for n in sorted(covering(grid))]
    assert {value for case in chosen for value in case} == {value for case in grid for value in case}
    assert len(chosen) == 6


def test_the_values_of_a_short_parameter_share_the_cases():
    grid = [(("script", a), ("library", b)) for a, b in itertools.product(range(10), ("pyro", "numpyro"))]
    chosen = [grid[n] for n in covering(grid)]
    assert sum(("library", "pyro") in case for case in chosen) == 5


def test_pairs_that_are_no_product_are_covered_too():
    pairs = [(("a", 0), ("b", 0)), (("a", 0), ("b", 1)), (("a", 1), ("b", 1))]
    assert covering(pairs) == {0, 2}
