"""The mended Bernoulli has the host's values, and the right derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from pplgrad.numpyro._logits import BernoulliLogits, with_stable_logits

LOGITS = [-np.inf, -800.0, -3.0, -1e-300, 0.0, 1e-300, 0.7, 800.0, np.inf]


def both(x, validate=True):
    fn = dist.BernoulliLogits(jnp.asarray(x), validate_args=False)  # Which would refuse infinite ones.
    fn._validate_args = validate
    found = with_stable_logits(fn)
    assert type(found) is BernoulliLogits and type(fn) is dist.BernoulliLogits
    return fn, found


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Out-of-support values")
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("values", [[0, 1], [False, True], [0.0, 1.0], [0.3, 2.0]], ids=str)
def test_values_are_the_hosts(values, validate):
    x, values = jnp.array(LOGITS), jnp.array(values)
    if values[0] == 0.3:
        x = x[1:-1]  # Between certain values the host has no number.
    host, found = both(x, validate)
    wanted, seen = host.log_prob(values[:, None]), found.log_prob(values[:, None])
    assert wanted.shape == seen.shape
    np.testing.assert_allclose(seen, wanted, rtol=1e-15)
    # Compiled it is another program, in which constants meet.
    compiled = jax.jit(lambda x, values: both(x, validate)[1].log_prob(values))
    np.testing.assert_allclose(compiled(x, values[:, None]), wanted, rtol=1e-14)
    summed = jax.jit(jax.grad(lambda x: both(x, validate)[1].log_prob(values[:, None]).sum()))
    p = jax.nn.sigmoid(x)
    if values[0] == 0:
        np.testing.assert_allclose(summed(x), jnp.where(jnp.isinf(x), 0.0, values.sum() - 2 * p), atol=1e-14)


def test_values_that_cannot_be_are_told():
    with pytest.warns(UserWarning, match="Out-of-support values"):
        assert both(0.3)[1].log_prob(2) == -np.inf


def test_numbers_that_are_none_are_not_hidden():
    _, found = both(jnp.array([np.nan, 0.0]))
    assert np.isnan(found.log_prob(jnp.array([0, 1]))).tolist() == [True, False]


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("x", [x for x in LOGITS if np.isfinite(x)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_derivatives(x, value):
    p = 1 / (1 + np.exp(-x)) if x > -700 else 0.0
    log_prob = lambda x: both(x)[1].log_prob(value)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(log_prob))(x), value - p, atol=1e-15)
    np.testing.assert_allclose(jax.jit(jax.hessian(log_prob))(x), -p * (1 - p), atol=1e-15)
    third = jax.jit(jax.grad(jax.hessian(log_prob)))(x)
    np.testing.assert_allclose(third, -p * (1 - p) * (1 - 2 * p), atol=1e-15)
    relaxed = jax.grad(lambda value: both(x, False)[1].log_prob(value))
    assert relaxed(value) == x


@pytest.mark.grid
@pytest.mark.parametrize("x", [-np.inf, np.inf])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_sure_value_has_no_derivative(x, value):
    assert jax.grad(lambda x: both(x)[1].log_prob(value))(x) == 0.0


def test_sums_over_particles_come_before_the_log_odds():
    """The derivative has no array of the particles' size but the product with the value, as one by hand would have."""
    particles, n = 7, 5
    values = jnp.array(np.random.default_rng(0).integers(0, 2, (particles, n)))

    def total(x, weights):
        return (jax.vmap(lambda v: both(x)[1].log_prob(v).sum())(values) * weights).sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(jnp.zeros(n), jnp.ones(particles))
    selects = [e for e in jaxpr.eqns if e.primitive.name == "select_n" and e.outvars[0].aval.shape == (particles, n)]
    assert len(selects) <= 1, jaxpr  # Forward: whether the value is possible.


def test_what_is_inside_others_is_mended_and_what_is_not_is_left():
    x = jnp.array([0.0, 0.3])
    inside = with_stable_logits(dist.Independent(dist.MaskedDistribution(dist.BernoulliLogits(x), True), 1))
    assert type(inside.base_dist.base_dist) is BernoulliLogits
    normal = dist.Normal(0.0, 1.0)
    assert with_stable_logits(normal) is normal
    assert with_stable_logits(dist.BernoulliLogits(0.0)).logits == 0.0

    class Own(dist.BernoulliLogits):
        def log_prob(self, value):
            return 2.0 * super().log_prob(value)

    own = with_stable_logits(Own(x))
    assert type(own) is Own and own.logits[0] == jnp.finfo(float).tiny
