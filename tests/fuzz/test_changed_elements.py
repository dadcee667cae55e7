"""Random programs whose branches change one element each: what is followed from the draw is what branches give that run."""

import pytest
import torch

from pplgrad import ELBO, LocalExpectation, PplgradError
from pplgrad.pyro._rerun.branches import PyroBranches
from pplgrad.testing.fuzz import in_pyro, random_program
from pplgrad.testing.fuzz.hosts import Skipped
from pplgrad.testing.fuzz.source import build
from pplgrad.testing.fuzz.trials import Trial, attempt, estimators_of
from tests.covering import mostly

STEPS = 4
SEEDS = [seed for seed in range(30) if all(site.family != "uniform" for site in random_program(seed).guide)]


def run(program, particles):
    """Make a few steps of LocalExpectation at every site, with particles and branches in a plate."""
    estimators = {name: LocalExpectation() for name in estimators_of("LocalExpectation()", program, "pyro")}
    elbo = in_pyro._elbo(program, estimators, ELBO(), particles, True)
    in_pyro._sample(program, build(program, "pyro"), elbo, STEPS, 0)


@pytest.mark.slow
def test_pyro(monkeypatch):
    """The costs of every branch are compared. Gradients have other random numbers where sites beside these draw some in their branches."""
    compared = []
    follow = PyroBranches._of_elements

    def both(self, name, values):
        with torch.random.fork_rng():
            found = follow(self, name, values)
        if found is not None:
            with torch.random.fork_rng():
                plain = self._run_all({name: values}, None)[name]
            for spec, one, other in zip(self._layout.costs, found, plain, strict=True):
                torch.testing.assert_close(*torch.broadcast_tensors(one, other), msg=f"{seed} {name} {spec.name}")
            compared.append(seed)
        return found

    monkeypatch.setattr(PyroBranches, "_of_elements", both)
    for seed in SEEDS:
        program, particles = random_program(seed), 1 + seed % 2
        with in_pyro.isolated():
            try:
                run(program, particles)
            except AssertionError:
                raise
            except (PplgradError, Skipped, UserWarning):  # A warning says that rows are run one by one from there on.
                continue
            except Exception:
                assert not in_pyro.runs_without(program, particles, True), seed
    assert len(set(compared)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", mostly(SEEDS[:6], SEEDS[:10]))
def test_numpyro(seed):
    """Against the exact gradient; branches that run (`unfused`) are compared with it as well."""
    for way in ("exact", "unfused"):
        verdict = attempt(Trial(seed, "numpyro", "LocalExpectation()", vectorized=seed % 2 == 0, way=way))
        assert verdict.kind in ("right", "refused", "skipped"), (way, verdict)
