"""Objectives other than the bound: exact for every estimator, by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pplgrad import ELBO, ConfigurationError, DisARM, Expectation, LocalExpectation, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.objectives import CostWeights
from pplgrad.testing.in_numpyro import assert_same, exact_gradient, expected_gradient, expected_gradient_over_cells
from pplgrad.testing.programs import CASES

OBJECTIVES = {
    "annealed": (ELBO(kl_weight=0.3), CostWeights(1.0, 0.3, 0.3)),
    "likelihood": (ELBO(kl_weight=0.0), CostWeights(1.0, 0.0, 0.0)),
    "entropy": (Expectation(entropy=lambda: jnp.array(0.7)), CostWeights(1.0, 0.0, 0.7)),
}


@pytest.mark.parametrize("name", ["hierarchy", "mixed", "subsampled"])
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation(), DisARM()], ids=["score", "local", "disarm"])
@pytest.mark.parametrize("short", OBJECTIVES)
def test_exact(short, estimator, name):
    objective, weights = OBJECTIVES[short]
    case = CASES[name]
    elbo = TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator), objective=objective)
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    assert_same(over(case, elbo, 1), exact_gradient(case, weights))


def test_the_weight_may_follow_an_argument_under_jit():
    def model(step):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=0.5)

    def guide(step):
        numpyro.sample("z", dist.Normal(1.0, 0.5))

    objective = TraceGrad_ELBO(objective=ELBO(kl_weight=lambda step: jnp.minimum(1.0, step / 10)))
    loss = jax.jit(lambda step: objective.loss(jax.random.key(0), {}, model, guide, step))
    losses = [loss(step) for step in (0.0, 5.0, 10.0)]
    np.testing.assert_allclose(losses[1], (losses[0] + losses[2]) / 2)


def test_refusals():
    with pytest.raises(ConfigurationError, match=r"write an objective, such as Expectation\(\)"):
        TraceGrad_ELBO(objective=Expectation)
    objective = TraceGrad_ELBO(multi_sample_guide=True, objective=Expectation())
    with pytest.raises(ConfigurationError, match="multi_sample_guide=True computes the evidence lower bound alone"):
        objective.loss(jax.random.key(0), {}, lambda: None, lambda: None)
