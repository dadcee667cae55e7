"""`assess_fit` in NumPyro enumerates the latents' values by a compiled run of the model, and by a plain one where that lists too little."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pplgrad.numpyro import assess_fit
from tests import assessed
from tests.assessed import X

FEW = {"samples": 100, "replicates": 0}


def test_the_model_is_compiled_once_for_all_values():
    host = assessed.in_numpyro()
    model, guide = assessed.local(host)
    runs = []

    def counted(x):
        runs.append(x)
        return model(x)

    found = assess_fit(
        counted, guide, (jnp.asarray(X[:3]),), plates=(), **FEW
    )  # Three elements of six values: 216 in all.
    np.testing.assert_allclose(found.evidence.exact, assessed.local_evidence(X[:3]).sum() + assessed.BESIDE, atol=1e-9)
    assert len(runs) < 50


def test_values_that_a_compiled_run_does_not_list_are_listed_by_a_plain_one():
    def z():
        return numpyro.sample("z", dist.Binomial(jnp.array([1, 2]).sum() - 1, 0.4))

    def model(x):
        numpyro.sample("x", dist.Normal(1.0 * z(), 1.0), obs=x)

    found = assess_fit(model, lambda x: z(), (jnp.array(0.4),), **FEW)
    likelihood = np.exp(assessed.normal(0.4, np.arange(3.0)))
    np.testing.assert_allclose(found.evidence.exact, np.log(np.dot([0.36, 0.48, 0.16], likelihood)), atol=1e-9)
