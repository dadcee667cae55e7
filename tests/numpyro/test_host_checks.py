"""What NumPyro's own ELBOs accept and refuse, this one does: programs without a site, shapes, plates, warnings."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI

from pplgrad import ELBO, IWAE, Expectation, Renyi
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators


def nothing():
    pass


def observed():
    numpyro.sample("x", dist.Normal(numpyro.param("m", jnp.array(0.5)), 1.0), obs=jnp.array(1.0))


@pytest.mark.parametrize("objective", [ELBO(), Expectation(), IWAE(), Renyi(0.5)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
def test_a_program_without_a_site_has_loss_0(objective, particles, vectorized):
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, objective=objective)
    for guide in (nothing, config_estimators(nothing, {})):
        result = SVI(nothing, guide, numpyro.optim.Adam(0.1), elbo).run(jax.random.key(0), 3, progress_bar=False)
        assert (result.losses == 0).all()
        assert elbo.describe(jax.random.key(0), {}, nothing, guide).rows == []
        elbo.diagnose(jax.random.key(0), {}, nothing, guide)


@pytest.mark.parametrize("objective", [ELBO(), Expectation(), IWAE(), Renyi(0.5)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
def test_a_guide_without_a_site_has_the_loss_of_the_data(objective, particles, vectorized):
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, objective=objective)
    run = jax.value_and_grad(lambda params: elbo.loss(jax.random.key(0), params, observed, nothing))
    loss, gradient = run({"m": jnp.array(0.5)})
    assert loss == pytest.approx(-dist.Normal(0.5, 1.0).log_prob(1.0), rel=1e-5)
    assert gradient["m"] == pytest.approx(-0.5)
