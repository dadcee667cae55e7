"""A program in single precision where JAX computes in double precision, as a learned baseline's network then does."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import DecayingAverage, NeuralBaseline, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.numpyro._array_ops import attach

X = jnp.array([0.3, -0.2, 1.1], jnp.float32)


def model(x):
    c = numpyro.param("c", jnp.float32(0.5))
    with numpyro.plate("data", 3):
        z = numpyro.sample("z", dist.Bernoulli(logits=jnp.float32(0.2)))
        numpyro.sample("x", dist.Normal(c * z, jnp.float32(1.0)), obs=x)


def guide(x):
    a = numpyro.param("a", jnp.float32(0.1))
    with numpyro.plate("data", 3):
        numpyro.sample("z", dist.Bernoulli(logits=a + x))


def test_trains_with_a_network_of_more_precision():
    chosen = config_estimators(guide, {"z": ScoreFunction(DecayingAverage() + NeuralBaseline())})
    svi = SVI(model, chosen, Adam(0.01), TraceGrad_ELBO())
    result = svi.run(jax.random.key(0), 20, X, progress_bar=False)
    assert result.losses.dtype == jnp.float32 and jnp.isfinite(result.losses).all()
    assert result.params["a"].dtype == jnp.float32 and result.params["a"] != jnp.float32(0.1)


def test_a_value_has_the_derivative_of_what_has_more_precision():
    found = jax.grad(lambda t: attach(jnp.float32(2.0), 3.0 * t.astype(float) ** 2))(jnp.float32(1.5))
    assert found.dtype == jnp.float32 and found == 9.0
