"""Which cases of a test `make test` runs."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.covering import SECONDS, SECONDS_FOR_BROKEN, SECONDS_FOR_EXACT, covering, left_out, spread
from tests.durations import Recorder, recorded

ROOT = Path(__file__).parents[1]


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


def test_a_function_has_time_for_so_many_cases():
    names = ["one", "test_exact", "test_mutant_is_caught", "fast", "test_faults_are_caught"]
    items = [case for name in names for case in cases(f"file.py::{name}", a=range(10))]
    taken = (SECONDS / 2, 1, SECONDS_FOR_BROKEN / 3, 0.01, 9)
    durations = {f"file.py::{name}": seconds for name, seconds in zip(names, taken, strict=True)}
    found = [name.partition("[")[0].rpartition("::")[2] for name in run(items, False, 0, durations)]
    assert {name: found.count(name) for name in names} == {
        "one": 2,
        "test_exact": int(SECONDS_FOR_EXACT),
        "test_mutant_is_caught": 3,
        "fast": 10,
        "test_faults_are_caught": 2,
    }
    assert len(run(items, True, 0, durations)) == len(items)


def test_of_what_takes_long_one_case_is_run_and_not_the_same_of_every_function():
    items = [case for n in range(40) for case in cases(f"file.py::f{n}", library=("pyro", "numpyro"))]
    found = run(items, False, 0, {f"file.py::f{n}": 100.0 for n in range(40)})
    assert len({name.partition("[")[0] for name in found}) == len(found) == 40
    assert 10 <= sum("numpyro" in name for name in found) <= 30


def test_few_cases_hold_much_and_lie_far_apart():
    grid = [(("a", a), ("b", b)) for a, b in itertools.product(range(6), range(4))]
    chosen = [grid[n] for n in spread(grid, 4, "name")]
    assert {b for _, (_, b) in chosen} == set(range(4)) and len({a for (_, a), _ in chosen}) == 4
    line = sorted(spread([(("a", a),) for a in range(20)], 4, "name"))
    assert min(b - a for a, b in itertools.pairwise(line)) >= 3
    assert spread(grid, 100, "name") == set(range(24))


def test_durations_are_means_over_cases_and_those_of_what_did_not_run_stay(tmp_path):
    path = tmp_path / "durations.json"
    path.write_text(json.dumps({"f.py::gone": 3.0, "f.py::one": 7.0}))
    recorder = Recorder(path)
    for node, seconds in (("f.py::one[a]", 1.0), ("f.py::one[a]", 0.5), ("f.py::one[b]", 2.5), ("f.py::one_case", 9.0)):
        recorder.pytest_runtest_logreport(SimpleNamespace(nodeid=node, duration=seconds))
    recorder.pytest_runtest_logreport(SimpleNamespace(nodeid="f.py::fast[a]", duration=0.01))
    recorder.pytest_sessionfinish()
    assert recorded(path) == {"f.py::gone": 3.0, "f.py::one": 2.0}


def test_what_is_recorded_exists():
    """A function that has another name now would run all of its cases."""
    texts = {name: (ROOT / name).read_text() for name in {name.partition("::")[0] for name in recorded()}}
    gone = [name for name in recorded() if f"def {name.rpartition('::')[2]}(" not in texts[name.partition("::")[0]]]
    assert not gone
