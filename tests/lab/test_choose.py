"""Choosing by measurement: where the answer is known in closed form, in time, and honestly unsure."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from pplgrad import (
    ARM,
    ConfigurationError,
    DisARM,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    Reparam,
    ScoreFunction,
)
from pplgrad.core.site_info import SiteInfo
from pplgrad.diagnostics import choosing
from pplgrad.diagnostics.choosing import candidates, choose
from pplgrad.lab.cli import main

SBN = Path(__file__).parents[2] / "models" / "sbn.py"
# What a draw of each candidate costs, in seconds, and its standard deviation; the product of the latter's square with the former decides:
# one has less variance than the best, and one takes less time.
KNOWN = {ARM(): (0.02, 0.4), DisARM(): (0.002, 1.0), LocalExpectation(): (0.004, 0.5), ScoreFunction(): (0.001, 9.0)}


@pytest.fixture
def clock(monkeypatch):
    """A clock that choosing reads and that draws alone move: what is measured does not depend on the machine, and takes no time."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(choosing, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def toy(clock):
    """Return what returns draws of two sites' gradients whose variances and times add up."""

    def draws_of(estimators):
        spread = np.array([KNOWN[e][1] for e in estimators.values()])
        seconds = sum(KNOWN[e][0] for e in estimators.values())

        def draws(count, seed):
            rng = np.random.default_rng(seed)
            for _ in range(0, count, 10):
                # Times vary, as on any machine.
                clock.seconds += 10 * seconds * rng.lognormal(sigma=0.1)
                yield spread * rng.normal(size=(10, len(estimators)))

        return draws

    return draws_of


def cost(estimators):
    return sum(KNOWN[e][1] ** 2 for e in estimators) * sum(KNOWN[e][0] for e in estimators)


@pytest.mark.slow
def test_the_known_best_is_chosen(clock):
    found = choose(toy(clock), {"a": list(KNOWN)}, 60.0)
    assert found.estimators == {"a": LocalExpectation()} and found.confidence > 0.9
    assert found.code == 'guide = config_estimators(guide, {"a": LocalExpectation()})'
    both = choose(toy(clock), {"a": list(KNOWN), "b": list(KNOWN)}, 80.0)
    best = min(itertools.product(KNOWN, repeat=2), key=cost)
    assert cost(both.estimators.values()) <= 1.1 * cost(best)


@pytest.mark.slow
def test_two_alike_are_not_told_apart_with_certainty(clock):
    found = choose(lambda e: toy(clock)({"a": ARM()}), {"a": [ARM(), DisARM()]}, 20.0)
    assert found.confidence < 0.999 and 1 <= found.gain < 1.3


@pytest.mark.slow
def test_it_ends_in_time_and_says_what_it_did_not_measure(clock):
    found = choose(toy(clock), {"a": list(KNOWN)}, 0.05)
    assert 0.05 < clock.seconds < 2
    assert [row["note"] for row in found.table].count("not measured: out of time") == 2
    assert json.loads(json.dumps(found.to_dict()))["estimators"] and found.unmeasured == 2
    assert "time ran out before the other 2, give more seconds" in str(found)


def test_what_fails_is_left_out_with_its_reason():
    def broken(estimators):
        if estimators["a"] == ARM():
            return lambda count, seed: iter([np.full((count, 1), np.nan)])
        raise ConfigurationError("it does not fit")

    with pytest.raises(ConfigurationError, match="No candidate can be measured: .*not finite.*it does not fit"):
        choose(broken, {"a": [ARM(), DisARM()]}, 1.0)


def test_candidates_are_those_that_fit_and_are_unbiased():
    binary = SiteInfo("z", "Bernoulli", False, True, 2, categories=2, relaxable=True)
    normal = SiteInfo("w", "Normal", True, False, 2)
    found = candidates({"z": binary, "w": normal}, None)
    assert DisARM() in found["z"] and ScoreFunction(LeaveOneOut()) in found["z"] and DisARM() not in found["w"]
    assert Reparam() in found["w"] and all(e.declaration.unbiased for e in found["z"])
    with pytest.raises(ConfigurationError, match="is biased, and choosing compares variances"):
        candidates({"z": binary}, [GumbelSoftmax()])
    with pytest.raises(ConfigurationError, match="No candidate fits site 'w'"):
        candidates({"w": normal}, [DisARM()])
    with pytest.raises(ConfigurationError, match="give the time"):
        choose(None, {}, 0.0)


@pytest.mark.slow
def test_on_the_command_line():
    words = [x for word in ("DisARM()", "score", "score+loo") for x in ("--estimator", word)]
    given = ["choose", str(SBN), "--set", "latents=10", "--seconds", "2", *words]
    result = CliRunner().invoke(main, [*given, "--json", "--train", "3"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert [row["backend"] for row in found] == ["pyro", "numpyro"]
    for row in found:
        # On a busy machine the time may be over before all are measured, which is told.
        measured = [line["estimators"] for line in row["table"] if line["draws"]]
        assert row["unmeasured"] == 3 - len(measured)
        assert row["estimators"]["z1"] in ("DisARM()", "ScoreFunction(LeaveOneOut())") or len(measured) == 1
