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
        run = jax.value_and_grad(lambda p: elbo.loss(jax.random.key(3), {"p": p}, model, guide))
        return jax.jit(run)(jnp.array([0.3, -0.2]))

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
        return jax.jit(jax.grad(lambda a: elbo.loss(jax.random.key(1), {"a": a}, model, guide)))(0.3)

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


ENTROPIES = {
    "Laplace": (lambda loc, s: dist.Laplace(loc, jnp.exp(s)), lambda s: 1 + jnp.log(2.0) + s),
    "MultivariateNormal": (
        lambda loc, s: dist.MultivariateNormal(
            jnp.stack([loc, -loc], -1), scale_tril=jnp.exp(s) * jnp.array([[1.0, 0.0], [0.3, 0.5]])
        ),
        lambda s: 1 + jnp.log(2 * jnp.pi) + jnp.log(0.5) + 2 * s,
    ),
    "one law": (lambda loc, s: dist.Laplace(0.0, jnp.exp(s)), lambda s: 1 + jnp.log(2.0) + s),
    "event": (
        lambda loc, s: dist.Laplace(loc[:, None] * jnp.ones(2), jnp.exp(s)).to_event(1),
        lambda s: 2 * (1 + jnp.log(2.0) + s),
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("law", ENTROPIES)
def test_one_scale_for_many_locations_counts_for_each(law, masked):
    """NumPyro's entropy has the shape of the scale, the plate has that of the locations."""
    make, entropy = ENTROPIES[law]
    keep = jnp.array([True, False, True, True])

    def guide():
        loc, s = numpyro.param("loc", jnp.array([0.3, -0.2, 0.5, 0.1])), numpyro.param("s", 0.2)
        with numpyro.plate("data", 4):
            numpyro.sample("x", make(loc, s).mask(keep) if masked else make(loc, s))

    def model():
        with numpyro.plate("data", 4):
            numpyro.sample("x", make(jnp.zeros(4), 0.0).mask(False))

    elbo = TraceGrad_ELBO(closed_form={"x": "entropy"})
    params = {"loc": jnp.array([0.3, -0.2, 0.5, 0.1]), "s": jnp.array(0.2)}
    found = jax.jit(jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide)))(params)
    loss, slope = jax.value_and_grad(lambda s: -(3 if masked else 4) * entropy(s))(0.2)
    np.testing.assert_allclose(found[0], loss)
    np.testing.assert_allclose(found[1]["s"], slope)
    np.testing.assert_allclose(found[1]["loc"], 0.0, atol=1e-12)


def divergence(q, p, jit):
    """Return the loss of a program that is one site, and its derivative at 0.3."""

    def guide():
        numpyro.sample("z", q(numpyro.param("a", 0.3)))

    elbo = TraceGrad_ELBO(closed_form={"z": "kl"})
    both = jax.value_and_grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, lambda: numpyro.sample("z", p()), guide))
    return (jax.jit(both) if jit else both)(jnp.array(0.3))


def test_a_series_that_is_cut_off_is_no_closed_form():
    with pytest.raises(EstimatorError, match="of Kumaraswamy from Beta at site 'z' .* is a series that it cuts off"):
        divergence(lambda a: dist.Kumaraswamy(jnp.exp(a), 0.7), lambda: dist.Beta(2.0, 3.0), False)
    with pytest.raises(EstimatorError, match="is a series that it cuts off"):
        divergence(
            lambda a: dist.Kumaraswamy(jnp.exp(a) * jnp.ones(2), 0.7).to_event(1),
            lambda: dist.Beta(2.0, 3.0).expand([2]).to_event(1),
            True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_as_many_values_are_not_the_same_values(jit):
    def binomial(a):
        return dist.Binomial(3, logits=a)

    def wanted(a):
        log_q = dist.Binomial(3, logits=a).log_prob(jnp.arange(4))
        return (jnp.exp(log_q) * (log_q + jnp.log(4.0))).sum()

    for low in (1, -1):
        with pytest.raises(
            EstimatorError, match="of Binomial from DiscreteUniform at site 'z' has no closed form here"
        ):
            divergence(binomial, lambda: dist.DiscreteUniform(low, low + 3), jit)
    found = divergence(binomial, lambda: dist.DiscreteUniform(0, 3), jit)
    np.testing.assert_allclose(found, jax.value_and_grad(wanted)(0.3))
