"""A normal draw and its squared distance from a target: the smallest program on which estimators differ.

    x_i ~ N(μ, σ²),   reward −(x_i − c_i)²,   E = −(d_i² + σ²)  with  d_i = μ − c_i

Use it with `--objective 'Expectation()'`; under the ELBO a wide normal prior is added. A datum is one target c.
"""

import numpy as np

OPTIONS = {
    "targets": 20,
    "spread": 2.0,  # the targets lie evenly in [-spread, spread]
    "mu": 0.5,
    "sigma": 1.0,
}
DISCRETE = ("x",)


def load(options, seed):
    """Return the targets, train and test the same, one a row."""
    spread = float(options["spread"])
    targets = np.linspace(-spread, spread, int(options["targets"]))[:, None]
    return targets, targets


def program(ppl, dist, xp, array, start):
    """Return model and guide, written once for both libraries."""

    def model(c):
        with ppl.plate("targets", c.shape[0]):
            x = ppl.sample("x", dist.Normal(array(0.0), 10.0))
            ppl.factor("reward", -((x - c[:, 0]) ** 2))

    def guide(c):
        mu, log_sigma = (ppl.param(name, array(value)) for name, value in start.items())
        with ppl.plate("targets", c.shape[0]):
            ppl.sample("x", dist.Normal(mu, xp.exp(log_sigma)))

    return model, guide


def initial(options):
    """Return the first μ and log σ."""
    return {"mu": np.array(float(options["mu"])), "log_sigma": np.log(float(options["sigma"]))}


def pyro_program(options, train, seed, start=None):
    """Return model and guide for Pyro; `start` holds the first `mu` and `log_sigma`, numbers or one for each target."""
    import pyro
    import pyro.distributions as dist
    import torch

    def array(a):
        return torch.tensor(a, dtype=torch.get_default_dtype())

    return program(pyro, dist, torch, array, start or initial(options))


def numpyro_program(options, train, seed, start=None):
    """Return model and guide for NumPyro; `start` holds the first `mu` and `log_sigma`, numbers or one for each target."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, float), start or initial(options))
