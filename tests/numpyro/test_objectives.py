"""Objectives other than the bound: exact for every estimator, by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pplgrad import ELBO, ConfigurationError, DisARM, Expectation, LocalExpectation, Reparam, ScoreFunction
from pplgrad.core.objectives import CostWeights
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import assert_same, exact_gradient, expected_gradient, expected_gradient_over_cells
from pplgrad.testing.programs import CASES

OBJECTIVES = {
    "annealed": (ELBO(kl_weight=0.3), CostWeights(1.0, 0.3, 0.3)),
    "likelihood": (ELBO(kl_weight=0.0), CostWeights(1.0, 0.0, 0.0)),
    "entropy": (Expectation(entropy=lambda: jnp.array(0.7)), CostWeights(1.0, 0.0, 0.7)),
}


# The entropy's three weights differ, and none of the others shows more of a program.
@pytest.mark.parametrize(
    ("short", "name"),
    [*((short, "hierarchy") for short in OBJECTIVES), ("entropy", "mixed"), ("entropy", "subsampled")],
)
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation(), DisARM()], ids=["score", "local", "disarm"])
@pytest.mark.slow
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


def landing(params, key, estimator):
    """Return the gradient for a guide over a conjugate model whose posterior is N(0.25, 1/2)."""

    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=0.5)

    def guide():
        loc, scale = numpyro.param("m", 0.0), jnp.exp(numpyro.param("s", 0.0))
        numpyro.sample(
            "z", dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(loc, scale))
        )

    objective = TraceGrad_ELBO(estimators={"z": estimator})
    return jax.grad(lambda p: objective.loss(key, p, model, guide))(params)


@pytest.mark.slow
def test_sticking_the_landing():
    """No variance at the posterior; the same mean elsewhere."""
    at, off = {"m": 0.25, "s": -0.5 * np.log(2.0)}, {"m": -0.4, "s": 0.3}
    keys = jax.random.split(jax.random.key(0), 20_000)
    plain, stuck = (jax.jit(jax.vmap(lambda k, e=e: landing(off, k, e)))(keys) for e in (Reparam(), Reparam(True)))
    for name in off:
        spread = np.sqrt((plain[name].var() + stuck[name].var()) / len(keys))
        assert abs(plain[name].mean() - stuck[name].mean()) < 4.5 * spread
    assert all(np.abs(g).max() < 1e-12 for g in jax.vmap(lambda k: landing(at, k, Reparam(True)))(keys).values())
    assert jax.vmap(lambda k: landing(at, k, Reparam()))(keys)["s"].std() > 0.1
