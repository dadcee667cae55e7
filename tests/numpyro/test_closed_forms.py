"""Divergences and entropies in closed form: exact by enumeration, like the host's where it has them, refused elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import TraceMeanField_ELBO

from pplgrad import IWAE, EstimatorError, Expectation, GumbelSoftmax, Reparam
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import (
    HOST,
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    parameters,
)
from pplgrad.testing.programs import CASES
from tests.closed import ESTIMATORS, REFUSED, pairs


@pytest.mark.parametrize(("name", "kinds", "short"), pairs())
def test_exact(name, kinds, short):
    case, estimator = CASES[name], ESTIMATORS[short]
    elbo = TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator), closed_form=kinds)
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    assert_same(over(case, elbo, 1), exact_gradient(case))


def continuous():
    def model():
        with numpyro.plate("data", 2):
            x = numpyro.sample("x", dist.Normal(0.3, 1.0))
            with numpyro.handlers.mask(mask=jnp.array([True, False])):
                y = numpyro.sample("y", dist.Gamma(2.0, 1.0).to_event(0))
            numpyro.sample("obs", dist.Normal(x * y, 0.7), obs=jnp.array([0.4, -1.1]))

    def guide():
        p = numpyro.param("p", jnp.array([0.3, -0.2, 0.4, 0.1]))
        with numpyro.plate("data", 2):
            numpyro.sample("x", dist.Normal(p[0], jnp.exp(p[1])))
            numpyro.sample("y", dist.Gamma(jnp.exp(p[2]), jnp.exp(p[3])))

    return model, guide


@pytest.mark.slow
def test_like_the_mean_field_elbo():
    def model():
        with numpyro.plate("data", 4, subsample_size=2):
            x = numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
            numpyro.sample("obs", dist.Normal(x.sum(-1), 0.7), obs=jnp.array([0.4, -1.1]))

    def guide():
        p = numpyro.param("p", jnp.array([0.3, -0.2]))
        with numpyro.plate("data", 4, subsample_size=2):
            numpyro.sample("x", dist.Normal(p[0] * jnp.ones(3), jnp.exp(p[1])).to_event(1))

    def gradient(elbo):
        return jax.value_and_grad(lambda p: elbo.loss(jax.random.key(3), {"p": p}, model, guide))(
            jnp.array([0.3, -0.2])
        )

    found, wanted = gradient(TraceGrad_ELBO(closed_form={"x": "kl"})), gradient(TraceMeanField_ELBO())
    jax.tree.map(np.testing.assert_allclose, found, wanted)


def test_entropy_of_a_normal():
    def model():
        numpyro.factor("f", 2.0 * numpyro.sample("x", dist.Normal(0.0, 1.0)))

    def guide():
        numpyro.sample("x", dist.Normal(0.5, jnp.exp(numpyro.param("s", 0.1))), infer={"closed_form": "entropy"})

    elbo = TraceGrad_ELBO(objective=Expectation(entropy=0.5))
    gradients = [
        jax.grad(lambda s, k=k: elbo.loss(jax.random.key(k), {"s": s}, model, guide) + 2 * path(s, k))(0.1)
        for k in range(3)
    ]
    np.testing.assert_allclose(gradients, -0.5)


def path(s, k):
    noise = jax.random.normal(jax.random.split(jax.random.split(jax.random.key(k))[1])[1])
    return jnp.exp(s) * noise


@pytest.mark.slow
def test_a_relaxed_site_may_have_it():
    def model():
        numpyro.factor("f", 3.0 * numpyro.sample("z", dist.Bernoulli(0.4)))

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.3)))

    def gradient(**given):
        elbo = TraceGrad_ELBO(estimators={"z": GumbelSoftmax(0.5)}, **given)
        return jax.grad(lambda a: elbo.loss(jax.random.key(1), {"a": a}, model, guide))(0.3)

    def divergence(a):
        q = jax.nn.sigmoid(a)
        return q * jnp.log(q / 0.4) + (1 - q) * jnp.log((1 - q) / 0.6)

    plain = gradient(objective=Expectation())
    np.testing.assert_allclose(gradient(closed_form={"z": "kl"}), plain + jax.grad(divergence)(0.3))


@pytest.mark.parametrize(("name", "kinds", "kind", "words"), REFUSED)
def test_refusals(name, kinds, kind, words):
    model, guide = CASES[name].build(HOST)
    with pytest.raises(kind, match=words):
        TraceGrad_ELBO(closed_form=kinds).loss(jax.random.key(0), parameters(CASES[name]), model, guide)


def test_what_has_none_is_refused():
    model, guide = continuous()
    params = {"p": jnp.array([0.3, -0.2, 0.4, 0.1])}

    def loss(**given):
        return TraceGrad_ELBO(**given).loss(jax.random.key(0), params, model, guide)

    loss(closed_form={"x": "kl", "y": "entropy"})
    with pytest.raises(EstimatorError, match="'y' has no closed form here .guide and model are masked differently"):
        loss(closed_form={"y": "kl"})
    with pytest.raises(EstimatorError, match="weighs the densities of site 'x' differently"):
        loss(closed_form={"x": "kl"}, objective=Expectation(entropy=1.0))
    with pytest.raises(EstimatorError, match="choose one of the two"):
        loss(closed_form={"x": "kl"}, estimators={"x": Reparam(sticking_the_landing=True)})
    with pytest.raises(EstimatorError, match="no meaning under IWAE"):
        loss(closed_form={"x": "kl"}, objective=IWAE())
