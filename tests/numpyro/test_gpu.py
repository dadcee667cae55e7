"""On a GPU: the gradients that a CPU gives on the same draws, and steps that send nothing to the host and back."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import DecayingAverage, NeuralBaseline, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.testing.in_numpyro import HOST
from pplgrad.testing.programs import CASES
from tests.fitting import CONTINUOUS, DISCRETE, fitting

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:Missing a plate statement", "ignore:Currently, SVI"),
]

LEARNED = ScoreFunction(DecayingAverage() + NeuralBaseline(hidden=(3,)))


def estimate(platform, program, chosen, particles, **options):
    """Return loss and gradient on a device, at the parameters of `SVI.init`."""
    with jax.default_device(jax.devices(platform)[0]):
        model, guide = program()
        guide = config_estimators(guide, chosen)
        elbo = TraceGrad_ELBO(particles, **options)
        svi = SVI(model, guide, Adam(0.01), elbo)
        state = svi.init(jax.random.key(1))
        run = jax.value_and_grad(lambda params: elbo.loss(jax.random.key(2), params, model, guide))
        return jax.device_get(jax.jit(run)(svi.get_params(state)))


def assert_same_on_both(program, chosen, particles=2, **options):
    on_cpu, on_gpu = (estimate(platform, program, chosen, particles, **options) for platform in ("cpu", "gpu"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-11), on_cpu, on_gpu)


def hierarchy():
    return CASES["hierarchy"].build(HOST)


def a_normal():
    def run(name, observed):
        loc = numpyro.param(name, jnp.array([0.3, -0.2]))
        w = numpyro.sample("w", dist.Normal(loc[0], 0.8 + 0.1 * loc[1] ** 2))
        with numpyro.plate("data", 3):
            if observed:
                numpyro.sample("x", dist.Bernoulli(logits=loc[1] + w), obs=jnp.array([0.0, 1.0, 1.0]))

    return lambda: run("p", True), lambda: run("q", False)


@pytest.mark.parametrize(("estimator", "objective"), list(fitting(DISCRETE)))
def test_every_estimator_of_discrete_sites(estimator, objective):
    assert_same_on_both(hierarchy, dict.fromkeys(CASES["hierarchy"].latents, estimator), objective=objective)


@pytest.mark.parametrize(("estimator", "objective"), list(fitting(CONTINUOUS)))
def test_every_estimator_of_continuous_sites(estimator, objective):
    assert_same_on_both(a_normal, {"w": estimator}, objective=objective)


@pytest.mark.parametrize("name", CASES)
def test_every_program(name):
    assert_same_on_both(lambda: CASES[name].build(HOST), dict.fromkeys(CASES[name].latents, LEARNED), 1)


def test_a_step_stays_on_the_device():
    """A compiled step needs nothing from the host once it has begun."""
    model, guide = hierarchy()
    guide = config_estimators(guide, dict.fromkeys(CASES["hierarchy"].latents, LEARNED))
    svi = SVI(model, guide, Adam(0.01), TraceGrad_ELBO(3))
    state = svi.init(jax.random.key(0))
    step = jax.jit(svi.update)
    state, _ = step(state)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, loss = step(state)
    assert np.isfinite(loss)
