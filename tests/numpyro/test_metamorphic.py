"""Metamorphic facts, and the known orders of variances."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from pplgrad import Constant, Expectation, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import HOST, assert_same, exact_gradient, expected_gradient, parameters
from pplgrad.testing.programs import CASES
from tests.covering import mostly
from tests.metamorphic import LINEAR, ORDERS, credited, toy


@pytest.mark.slow
@pytest.mark.parametrize(
    "short", mostly(list(LINEAR)[::4], LINEAR)
)  # Pyro's test has every one, at a tenth of the time.
def test_costs_times_ten(short):
    model, guide = CASES["hierarchy"].build(HOST)
    params = parameters(CASES["hierarchy"])
    estimator, particles = LINEAR[short]
    elbo = TraceGrad_ELBO(particles, estimators={"z*": estimator})

    @jax.jit
    def gradient(scale):
        scaled = [handlers.scale(side, scale) for side in (model, guide)]
        return jax.grad(lambda p: elbo.loss(jax.random.key(0), p, *scaled))(params)

    assert_same(gradient(10.0), {name: 10 * np.asarray(value) for name, value in gradient(1.0).items()})


def test_a_constant_more_in_the_baseline():
    for constant in (0.0, 5.0):
        elbo = TraceGrad_ELBO(estimators={"z*": ScoreFunction(Constant(constant))})
        assert_same(expected_gradient(CASES["hierarchy"], elbo, 1), exact_gradient(CASES["hierarchy"]))


@pytest.mark.slow
@pytest.mark.parametrize("short", ["score", "local", "disarm", "rebar", "muprop", "samples"])
def test_a_plate_in_another_order(short):
    """In distribution: the mean and the variance of each element's gradient move with it."""
    data, a, order = np.array([0.3, -0.6, 1.4]), np.array([0.2, -0.5, 0.9]), np.array([2, 0, 1])

    def model(data):
        with numpyro.plate("data", 3):
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=data)

    def guide(data):
        logits = numpyro.param("a", jnp.zeros(3))
        with numpyro.plate("data", 3):
            numpyro.sample("z", dist.Bernoulli(logits=logits))

    estimator, particles = LINEAR[short]
    elbo = TraceGrad_ELBO(particles, estimators={"z": estimator})
    one = jax.grad(lambda a, key, data: elbo.loss(key, {"a": a}, model, guide, data))
    every = jax.jit(jax.vmap(one, (None, 0, None)))

    def moments(data, a):
        rows = np.asarray(every(jnp.asarray(a), jax.random.split(jax.random.key(0), 20_000), jnp.asarray(data)))
        return rows.mean(0), rows.var(0), rows.std(0) / np.sqrt(len(rows))

    mean, variance, error = moments(data, a)
    moved, spread, chance = moments(data[order], a[order])
    assert np.all(np.abs(moved - mean[order]) < 4.5 * np.sqrt(error[order] ** 2 + chance**2) + 1e-12)
    np.testing.assert_allclose(spread, variance[order], rtol=0.15, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("short", mostly(["loo", "disarm"], ["score", "loo", "disarm", "samples", "muprop"]))
def test_particles_mapped_and_looped(short):
    model, guide = CASES["hierarchy"].build(HOST)
    params = parameters(CASES["hierarchy"])

    def one(vectorized):
        elbo = TraceGrad_ELBO(3, vectorized, estimators={"z*": LINEAR[short][0]})
        return jax.jit(jax.grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide)))(params)

    assert_same(one(False), {name: np.asarray(value) for name, value in one(True).items()})


@pytest.mark.grid(together="known orders")
@pytest.mark.slow
@pytest.mark.parametrize("short", ORDERS)
def test_known_orders(short):
    model, guide = toy(HOST)
    variances = []
    for estimator in ORDERS[short][:2]:
        elbo = TraceGrad_ELBO(ORDERS[short][2], estimators={"z": estimator}, objective=Expectation())
        one = jax.grad(lambda a, key, elbo=elbo: elbo.loss(key, {"a": a}, model, guide))
        keys = jax.random.split(jax.random.key(0), 20_000)
        rows = jax.jit(jax.vmap(one, (None, 0)))(jnp.array([0.2, -0.4, 0.9, 0.1]), keys)
        variances.append(float(rows.var(0).sum()))
    assert variances[0] < variances[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Missing a plate statement")
def test_rao_blackwellised_costs_vary_less():
    variances = []
    for plated in (True, False):
        model, guide = credited(HOST, plated)
        elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()})
        one = jax.grad(lambda a, key, e=elbo, m=model, g=guide: e.loss(key, {"a": a}, m, g))
        keys = jax.random.split(jax.random.key(0), 5_000)
        rows = jax.jit(jax.vmap(one, (None, 0)))(jnp.array([0.2, -0.4, 0.9, 0.1]), keys)
        variances.append(float(rows.var(0).sum()))
    assert 2 * variances[0] < variances[1]
