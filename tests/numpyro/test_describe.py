"""`Auto` picks what a knowing user would, and `describe` says what and why."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import Auto, ConfigurationError, LeaveOneOut, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

KEY = jax.random.key(0)


def draws():
    z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(20))).to_event(1))
    b = numpyro.sample("b", dist.Bernoulli(0.3))
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    n = numpyro.sample("n", dist.Poisson(3.0))
    return z.sum(-1) + b + m + n


def model(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(draws(), 1.0), obs=x)


def guide(x):
    with numpyro.plate("data", len(x)):
        draws()


def column(described, name):
    return [row[name] for row in described.rows]


@pytest.mark.slow
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
    described = objective.describe(KEY, {}, model, guide, jnp.zeros(4))
    assert column(described, "estimator") == wanted and column(described, "evaluations") == evaluations
    assert column(described, "plates") == ["data"] * 4
    assert column(described, "distribution") == ["Bernoulli", "Bernoulli", "Normal", "Poisson"]
    assert "Auto: reparameterized sampler" in str(described)
    jax.jit(lambda x: objective.loss(KEY, {}, model, guide, x))(jnp.zeros(4))


@pytest.mark.slow
def test_reasons_of_the_three_places():
    wrapped = config_estimators(guide, {"b": ScoreFunction()})
    objective = TraceGrad_ELBO(2, estimators={"z": ScoreFunction(LeaveOneOut())})
    described = objective.describe(KEY, {}, model, wrapped, jnp.zeros(4))
    reasons = ["the ELBO's argument", "named by the guide", "the default", "the default"]
    assert column(described, "reason") == reasons
    assert column(described, "baseline") == ["LeaveOneOut()", "none", "none", "LeaveOneOut()"]


def test_refusals():
    with pytest.raises(ConfigurationError, match="budget=-1"):
        Auto(-1)


@pytest.mark.slow
def test_auto_in_a_wrapped_guide_keeps_its_state():
    """With nothing to spend, the default's baselines need the wrapper to register them."""
    svi = SVI(model, config_estimators(guide, {"*": Auto(0)}), Adam(0.01), TraceGrad_ELBO())
    state = svi.init(KEY, jnp.zeros(4))
    state, loss = svi.update(state, jnp.zeros(4))
    assert "z$pplgrad.0.state" in state.mutable_state and jnp.isfinite(loss)
    described = TraceGrad_ELBO().describe(KEY, svi.get_params(state), model, svi.guide, jnp.zeros(4))
    assert described.rows[0]["baseline"] == "DecayingAverage() + NeuralBaseline()"
