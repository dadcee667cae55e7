"""Sites that are summed out beside the hosts' own autoguides of the continuous part: the same as with the sum written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoDelta,
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pplgrad.numpyro import TraceGrad_ELBO

DATA = [-1.2, 0.3, 2.1, 0.7]


def weights_and_locations():
    w = numpyro.sample("w", dist.Dirichlet(jnp.ones(2)))
    with numpyro.plate("components", 2):
        return w, numpyro.sample("locs", dist.Normal(0.0, 3.0))


def summed():
    w, locs = weights_and_locations()
    with numpyro.plate("data", 4):
        k = numpyro.sample("k", dist.Categorical(w), infer={"enumerate": "parallel"})
        numpyro.sample("x", dist.Normal(locs[k], 1.0), obs=jnp.array(DATA))


def by_hand():
    w, locs = weights_and_locations()
    with numpyro.plate("data", 4):
        densities = dist.Normal(locs, 1.0).log_prob(jnp.array(DATA)[:, None])
        numpyro.factor("x", jax.nn.logsumexp(jnp.log(w) + densities, -1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "autoguide",
    [
        pytest.param(AutoBNAFNormal, marks=pytest.mark.exhaustive),  # Compiles for long.
        pytest.param(AutoDelta, marks=pytest.mark.slow),
        pytest.param(AutoDiagonalNormal, marks=pytest.mark.exhaustive),
        pytest.param(AutoLaplaceApproximation, marks=pytest.mark.exhaustive),
        pytest.param(AutoLowRankMultivariateNormal, marks=pytest.mark.exhaustive),
        pytest.param(AutoMultivariateNormal, marks=pytest.mark.slow),
        AutoNormal,
    ],
)
def test_an_autoguide_of_the_continuous_part_is_fitted_as_to_the_sum_by_hand(autoguide):
    """AutoContinuous draws all at an auxiliary site, which the model lacks and NumPyro's own TraceEnum_ELBO looks up there (its issue 2013)."""
    found = []
    for model, elbo in [(summed, TraceGrad_ELBO()), (by_hand, Trace_ELBO())]:
        guide = autoguide(handlers.block(model, hide=["k"]))
        svi = SVI(model, guide, numpyro.optim.Adam(0.01), elbo)
        params = svi.get_params(svi.init(jax.random.PRNGKey(0))) if not found else found[0][0]
        if found:
            svi.init(jax.random.PRNGKey(0))

        def loss(params, elbo=elbo, model=model, guide=guide):
            return elbo.loss(jax.random.PRNGKey(3), params, model, guide)

        found.append((params, *jax.jit(jax.value_and_grad(loss))(params)))
    (_, loss, gradient), (_, expected, its_gradient) = found
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], ravel_pytree(its_gradient)[0], rtol=1e-9, atol=1e-9)
