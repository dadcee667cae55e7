"""NumPyro's own option of a site in the guide, infer={"enumerate": ...}."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pplgrad import ConfigurationError, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

X = np.array([0.3, -1.1, 2.0])


def model():
    with numpyro.plate("data", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=X)


def guide(**infer):
    def run():
        b = numpyro.param("b", jnp.array([0.2, -0.5, 0.1]))
        with numpyro.plate("data", 3):
            numpyro.sample("z", dist.Bernoulli(logits=b), infer=infer)

    return run


def exact(b):
    """Return the ELBO, summed over the values of each site."""
    total = 0.0
    for z in (0.0, 1.0):
        log_q = dist.Bernoulli(logits=b).log_prob(z)
        total += jnp.exp(log_q) * (dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(X) - log_q)
    return total.sum()


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda guide: guide, config_estimators], ids=["plain", "wrapped"])
def test_an_enumerated_site_of_the_guide_is_summed_over(wrap):
    b, asking = jnp.array([0.2, -0.5, 0.1]), wrap(guide(enumerate="parallel"))
    elbo = TraceGrad_ELBO()
    assert [row["estimator"] for row in elbo.describe(jax.random.key(0), {"b": b}, model, asking).rows] == [
        "Enumerate()"
    ]
    found = jax.jit(jax.grad(lambda b: elbo.loss(jax.random.key(0), {"b": b}, model, asking)))(b)
    np.testing.assert_allclose(found, -jax.jit(jax.grad(exact))(b), atol=1e-9)


def test_several_enumerated_samples_are_refused_with_what_stands_for_them():
    asking = guide(enumerate="parallel", num_samples=7)
    with pytest.raises(ConfigurationError, match=r"'z'.*ScoreFunction\(samples=7\)"):
        TraceGrad_ELBO().loss(jax.random.key(0), {"b": jnp.zeros(3)}, model, asking)


def test_the_estimators_argument_goes_before():
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()})
    rows = elbo.describe(jax.random.key(0), {"b": jnp.zeros(3)}, model, guide(enumerate="parallel")).rows
    assert rows[0]["estimator"] == "ScoreFunction()"


@pytest.mark.parametrize(
    ("key", "meant"), [("estimater", "estimator"), ("enumarate", "enumerate"), ("closed_from", "closed_form")]
)
def test_a_misspelt_option_is_refused(key, meant):
    with pytest.raises(ConfigurationError, match=f"'z'.*'{key}'.*did you mean '{meant}'"):
        TraceGrad_ELBO().loss(jax.random.key(0), {"b": jnp.zeros(3)}, model, guide(**{key: "parallel"}))


def test_notes_of_the_users_own_are_let_alone():
    TraceGrad_ELBO().loss(jax.random.key(0), {"b": jnp.zeros(3)}, model, guide(colour="red"))


def test_pyros_baselines_are_refused():
    with pytest.raises(ConfigurationError, match="'z'.*an option of Pyro's.*DecayingAverage"):
        TraceGrad_ELBO().loss(
            jax.random.key(0), {"b": jnp.zeros(3)}, model, guide(baseline={"use_decaying_avg_baseline": True})
        )


@pytest.mark.parametrize("where", ["model", "guide"])
def test_config_kl_is_the_divergence_in_closed_form(where):
    from numpyro.contrib.funsor import config_kl

    def normal():
        numpyro.sample("z", dist.Normal(0.3, 2.0))

    def around():
        numpyro.sample("z", dist.Normal(numpyro.param("m", 0.5), 1.0))

    programs = (config_kl(normal), around) if where == "model" else (normal, config_kl(around))
    found = TraceGrad_ELBO().loss(jax.random.key(0), {"m": jnp.array(0.5)}, *programs)
    np.testing.assert_allclose(found, dist.kl_divergence(dist.Normal(0.5, 1.0), dist.Normal(0.3, 2.0)), atol=1e-7)
