"""`Auto` picks what a knowing user would, and `describe` says what and why."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import Auto, ConfigurationError, LeaveOneOut, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO, config_estimators


def draws():
    z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(20))).to_event(1))
    b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    n = pyro.sample("n", dist.Poisson(torch.tensor(3.0)))
    return z.sum(-1) + b + m + n


def model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(draws(), 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        draws()


def column(described, name):
    return [row[name] for row in described.rows]


@pytest.mark.parametrize(
    ("budget", "wanted", "evaluations"),
    [
        (0, ["ScoreFunction()", "ScoreFunction()", "Reparam()", "ScoreFunction()"], [0, 0, 0, 0]),
        (2, ["DisARM()", "LocalExpectation()", "Reparam()", "CountDifference()"], [1, 1, 0, 1]),
        (20, ["LocalExpectation()", "LocalExpectation()", "Reparam()", "CountDifference()"], [20, 1, 0, 1]),
    ],
)
def test_auto(budget, wanted, evaluations):
    objective = TraceGrad_ELBO(estimators={"*": Auto(budget)})
    pyro.set_rng_seed(0)
    state = torch.get_rng_state()
    described = objective.describe(model, guide, torch.zeros(4))
    assert column(described, "estimator") == wanted and column(described, "evaluations") == evaluations
    assert column(described, "plates") == ["data"] * 4
    assert column(described, "distribution") == ["Bernoulli", "Bernoulli", "Normal", "Poisson"]
    assert not list(pyro.get_param_store().keys()) and torch.equal(state, torch.get_rng_state())
    assert "Auto: reparameterized sampler" in str(described)
    objective.loss_and_grads(model, guide, torch.zeros(4))


def test_reasons_of_the_three_places():
    wrapped = config_estimators(guide, {"b": ScoreFunction()})
    objective = TraceGrad_ELBO(2, estimators={"z": ScoreFunction(LeaveOneOut())})
    described = objective.describe(model, wrapped, torch.zeros(4))
    reasons = ["the ELBO's argument", "named by the guide", "the default", "the default"]
    assert column(described, "reason") == reasons
    assert column(described, "baseline") == ["LeaveOneOut()", "none", "none", "LeaveOneOut()"]


def test_refusals():
    with pytest.raises(ConfigurationError, match="budget=-1"):
        Auto(-1)
