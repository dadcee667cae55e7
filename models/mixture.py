"""A Gaussian mixture whose assignments and means are both latent, on the iris or the wine measurements.

    means ~ N(0, 3² I),  k_i ~ Categorical(prior),  x_i | k_i, means ~ N(means[k_i], σ² I)

and the guide q(means) Π q(k_i | x_i): the assignments are estimated by the score function, the means by
reparameterization. The means are shared by all data, so that every step sees the whole train set.
"""

import numpy as np

OPTIONS = {
    "components": 3,
    "data": "iris",  # "iris" or "wine", standardised
    "sigma": 0.6,  # standard deviation within a component
}
DISCRETE = ("k",)
WHOLE_DATA = True


def load(options, seed):
    """Return the standardised measurements, split into train and test."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    if options["data"] not in ("iris", "wine"):
        raise ValueError(f"data is 'iris' or 'wine'; got '{options['data']}'.")
    data = getattr(datasets, f"load_{options['data']}")().data
    train, test = train_test_split(data, test_size=0.2, random_state=seed)
    center, spread = train.mean(0), train.std(0)
    return (train - center) / spread, (test - center) / spread


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries: means at random data."""
    rng = np.random.default_rng(seed)
    n, d = int(options["components"]), train.shape[1]
    return {
        "prior": np.zeros(n),
        "means_loc": train[rng.choice(len(train), n, replace=False)],
        "means_log_scale": np.full((n, d), -2.0),
        "assign_w": 0.1 * rng.normal(size=(d, n)),
        "assign_b": np.zeros(n),
    }


def program(ppl, dist, xp, array, options, train, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    n, d = int(options["components"]), train.shape[1]

    def param(name):
        return ppl.param(name, start[name])

    def model(x):
        means = ppl.sample("means", dist.Normal(array(np.zeros((n, d))), 3.0).to_event(2))
        prior = param("prior")
        with ppl.plate("data", x.shape[0]):
            k = ppl.sample("k", dist.Categorical(logits=prior))
            # A vectorized particle dimension stands left of the means' own two.
            if means.ndim == 2:
                loc = means[k]
            else:
                loc = (means * (k[..., None, None] == xp.arange(n)[:, None])).sum(-2)
            ppl.sample("x", dist.Normal(loc, float(options["sigma"])).to_event(1), obs=x)

    def guide(x):
        ppl.sample("means", dist.Normal(param("means_loc"), xp.exp(param("means_log_scale"))).to_event(2))
        with ppl.plate("data", x.shape[0]):
            ppl.sample("k", dist.Categorical(logits=x @ param("assign_w") + param("assign_b")))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    return program(pyro, dist, torch, lambda a: torch.tensor(a, dtype=torch.float32), options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), options, train, seed)
