"""Estimators that run branches at a site that decides whether others exist."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import REBAR, EstimatorError, LocalExpectation, ProgramError, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO, config_estimators
from pplgrad.pyro._rerun import branches
from pplgrad.testing.in_pyro import HOST, array, gradient
from tests.deciding import PARAMS, PROGRAMS, exact


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def steps(name, estimators, count):
    """Yield the gradients of so many steps."""
    model, guide = PROGRAMS[name][0](HOST)
    guide, objective = config_estimators(guide, estimators), TraceGrad_ELBO()
    for _ in range(count):
        objective.loss_and_grads(model, guide)
        yield gradient()
        for parameter in pyro.get_param_store().values():
            parameter.unconstrained().grad = None


def error(count=12):
    """Return how far a step with a local expectation is from the exact gradient to the guide's parameters, at worst."""
    wanted = exact("observed")["a"]
    return max(np.abs(found["a"] - wanted).max() for found in steps("observed", {"z": LocalExpectation()}, count))


def test_exact_whatever_is_drawn():
    assert error() < 1e-9


def with_the_drawn_ones(ops, layout, site, found, drawn):
    known = {(spec.name, spec.sign): x for spec, x in zip(layout.costs, drawn, strict=True)}
    return [found.get(key, x) for key, x in known.items()]


def against_the_others(ops, layout, site, found, drawn):
    costs = plain(ops, layout, site, found, drawn)
    own = next(i for i, spec in enumerate(layout.costs) if spec.name == site and spec.sign < 0)
    costs[own] = 2 * found[site, -1.0] - costs[own]
    return costs


plain = branches.with_other_sites


@pytest.mark.parametrize("broken", [with_the_drawn_ones, against_the_others])
def test_mutant_is_caught(broken, monkeypatch):
    """Costs of the draw that the branch lacks, or costs with the wrong sign."""
    monkeypatch.setattr(branches, "with_other_sites", broken)
    assert error() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "at_z",
    [LocalExpectation(), pytest.param(ScoreFunction(samples=2), marks=pytest.mark.exhaustive)],
    ids=["local", "samples"],
)
def test_unbiased(at_z):
    """The elements of a plate decide together; what exists or not is drawn in the guide, and decides itself."""
    rows = [found for found in steps("latent", {"z": at_z, "[wv]": LocalExpectation()}, 400)]
    for name, wanted in exact("latent").items():
        every = np.stack([found[name] for found in rows])
        assert np.all(np.abs(every.mean(0) - wanted) < 4.5 * every.std(0) / np.sqrt(len(rows)) + 1e-12)


def test_relaxed_values_are_refused():
    with pytest.raises((ProgramError, EstimatorError), match="exists or not depending|control flow|'z'"):
        list(steps("latent", {"z": REBAR(learn=False), "[wv]": ScoreFunction()}, 8))


def test_elements_that_change_at_once_are_refused():
    """The draw lacks what all elements of a plate together would bring about: no sum of the draw's shows that they are coupled."""

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(PARAMS["a"][:2]))))

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(array(0.4)))
        if z.detach().numpy().sum() == 2:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))

    objective = TraceGrad_ELBO(estimators={"z": LocalExpectation()})
    with pytest.raises(ProgramError, match="'x' exists or not depending on the value of site 'z'"):
        for _ in range(20):
            objective.loss_and_grads(model, guide)
