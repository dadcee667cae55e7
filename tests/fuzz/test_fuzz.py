"""The fuzzer: its oracle is right, its programs run in both libraries, faults that are put back are found, and today's code has none."""

import numpy as np
import pytest

from pplgrad.core.objectives import ELBO, Expectation
from pplgrad.testing.fuzz import FLAVOURS, exact, random_program, source
from pplgrad.testing.fuzz.__main__ import main
from pplgrad.testing.fuzz.shrink import shrunk
from pplgrad.testing.fuzz.trials import Trial, attempt, trials
from tests.fuzz.faults import FAULTS

QUICK = ("a plate entered again (pyro)", "mixed in a plate (pyro)", "around: legacy", "stale: namespace")
PUT_BACK = [name for name, fault in FAULTS.items() if fault.put_back is not None]
WRONG = ("wrong", "crashed")


@pytest.mark.parametrize("seed", range(12))
def test_the_oracles_derivative_is_that_of_its_loss(seed):
    """A central difference is as good as its step allows."""
    program = random_program(seed)
    for objective in (ELBO(), Expectation(entropy=0.3)):
        _, gradient = exact(program, objective, particles=1)
        for name, start in program.params.items():
            moved = [{**program.params, name: start + sign * 1e-5 * np.eye(start.size)[0]} for sign in (1, -1)]
            up, down = (exact(_with(program, params), objective)[0] for params in moved)
            assert gradient[name].ravel()[0] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-5)


def _with(program, params):
    from dataclasses import replace

    return replace(program, params=params)


def test_a_seed_says_everything():
    for seed in range(5):
        assert source(random_program(seed), "pyro") == source(random_program(seed), "pyro")
    assert random_program(3).features() == random_program(3).features()


def test_every_flavour_is_drawn():
    found = set().union(*(random_program(seed).features() for seed in range(200)))
    assert {
        "detour",
        "opaque",
        "chain",
        "reentered",
        "subsampled",
        "masked",
        "scaled",
        "uniform",
        "gather",
        "lookup",
    } <= found
    assert {"whole", "flip", "shift", "sums", "mix", "switch", "choose", "more", "factor", "categorical"} <= found
    assert set(FLAVOURS) == {
        "whole",
        "state",
        "detour",
        "opaque",
        "impossible",
        "python",
        "moved",
        "mixing",
        "chain",
        "return",
        "mixture",
    }


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_gone(name):
    _assert_gone(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in QUICK])
def test_every_fault_is_gone(name):
    _assert_gone(name)


def _assert_gone(name):
    for trial in FAULTS[name].trials:
        verdict = attempt(trial)
        assert verdict.kind not in WRONG, f"{trial.command}: {verdict.detail}"


@pytest.mark.parametrize(
    "name", [n if n.endswith("(pyro)") else pytest.param(n, marks=pytest.mark.slow) for n in PUT_BACK]
)
def test_a_fault_that_is_put_back_is_found(name, monkeypatch):
    fault = FAULTS[name]
    assert fault.put_back is not None
    fault.put_back(monkeypatch)
    assert any(attempt(trial).kind == "wrong" for trial in fault.trials)


SEEDS = range(300, 304)


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("library", ["pyro", "numpyro"])
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_wrong(seed, library):
    """A fixed few dozen of what `make fuzz` tries; whatever is not right is refused."""
    program = random_program(seed)
    for trial in trials(seed, (library,)):
        verdict = attempt(trial, program)
        assert verdict.kind != "wrong", f"{trial.command}: {verdict.detail}"


@pytest.mark.parametrize("library", ["pyro", "numpyro"])
@pytest.mark.parametrize("seed", [3, 17])
def test_a_few_programs(seed, library):
    assert attempt(Trial(seed, library, flavours=("python",))).kind in ("right", "refused")


def test_a_wrong_program_is_made_smaller():
    program = random_program(8)
    small = shrunk(program, lambda other: any(site.family == "factor" or site.data is not None for site in other.model))
    assert len(small.model) == 2 and len(small.guide) == 1


def test_the_command_line(capsys):
    assert main(["--seed", "3", "--library", "pyro", "--flavours", "return"]) == 0
    out = capsys.readouterr().out
    assert "def model():" in out and "# right" in out
