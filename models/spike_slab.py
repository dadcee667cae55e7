"""Spike-and-slab regression: which measurements enter, and with what weights, on the diabetes data.

    gamma_j ~ Bernoulli(rate),  w_j ~ N(0, slab²),  y_i | gamma, w ~ N(Σ_j x_ij gamma_j w_j, σ²)

The guide draws the inclusions one after the other, q(gamma_j | gamma_1, …, gamma_{j−1}), and then the weights: from their
exact posterior given the inclusions, which is normal ("conditional"), or each from a learned normal if it is included and
from the prior if not ("paired": Titsias and Lázaro-Gredilla 2011). The weights are shared by all data, so that every step
sees the whole train set. With ten measurements the posterior of the inclusions is a sum over 1,024 subsets.
"""

import numpy as np

OPTIONS = {
    "features": 10,  # the first so many columns of the data
    "rate": 0.5,  # prior probability of inclusion
    "slab": 0.5,  # prior standard deviation of an included weight; everything is standardised
    "sigma": 0.7,  # standard deviation of the noise
    "weights": "conditional",  # or "paired": how the guide draws the weights
}
DISCRETE = ("gamma_*",)
WHOLE_DATA = True


def load(options, seed):
    """Return standardised measurements with the standardised response as the last column, split into train and test."""
    from sklearn.model_selection import train_test_split

    if options["weights"] not in ("conditional", "paired"):
        raise ValueError(f"weights is 'conditional' or 'paired'; got '{options['weights']}'.")
    return train_test_split(standardised(options), test_size=0.2, random_state=seed)


def standardised(options):
    """Return all rows of the data, each column with mean 0 and standard deviation 1."""
    from sklearn.datasets import load_diabetes

    count = int(options["features"])
    measured, response = load_diabetes(return_X_y=True, scaled=False)
    if not 1 <= count <= measured.shape[1]:
        raise ValueError(f"features is 1 to {measured.shape[1]}; got {count}.")
    data = np.column_stack([measured[:, :count], response])
    return (data - data.mean(0)) / data.std(0)


def subsets(count):
    """Return all inclusions as rows of zeros and ones."""
    return (np.arange(2**count)[:, None] >> np.arange(count)) % 2


def exact_log_joint(options, data):
    """Return log p(y, gamma) of every subset, in the order of `subsets`: the weights are summed out in closed form."""
    x, y = data[:, :-1], data[:, -1]
    n, d = x.shape
    sigma, slab, rate = (float(options[name]) for name in ("sigma", "slab", "rate"))
    gamma = subsets(d)
    precision = np.eye(d) / slab**2 + gamma[:, :, None] * gamma[:, None, :] * (x.T @ x) / sigma**2
    pull = gamma * (x.T @ y) / sigma**2
    fit = 0.5 * np.sum(pull * np.linalg.solve(precision, pull[..., None])[..., 0], -1)
    volume = -0.5 * np.linalg.slogdet(precision)[1] - d * np.log(slab)
    noise = -0.5 * n * np.log(2 * np.pi * sigma**2) - 0.5 * (y @ y) / sigma**2
    prior = gamma @ np.full(d, np.log(rate)) + (1 - gamma) @ np.full(d, np.log1p(-rate))
    return fit + volume + noise + prior


def guide_log_prob(params):
    """Return the guide's log q(gamma) of every subset, from its parameters by name."""
    gamma = subsets(len(params["logits"]))
    logits = params["logits"] + gamma @ np.tril(params["links"], -1).T
    return np.sum(gamma * logits - np.logaddexp(0, logits), -1)


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    d = train.shape[1] - 1
    start = {"logits": np.full(d, 0.1), "links": np.zeros((d, d))}
    if options["weights"] == "paired":
        start |= {"loc": np.zeros(d), "log_scale": np.full(d, -2.0)}
    return start


def program(ppl, dist, xp, array, options, train, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    d = train.shape[1] - 1
    sigma, slab, rate = (float(options[name]) for name in ("sigma", "slab", "rate"))

    def param(name):
        return ppl.param(name, start[name])

    def model(data):
        x, y = data[:, :-1], data[:, -1]
        gamma = xp.stack([ppl.sample(f"gamma_{j}", dist.Bernoulli(array(rate))) for j in range(d)], -1)
        w = ppl.sample("w", dist.Normal(array(np.zeros(d)), slab).to_event(1))
        with ppl.plate("data", len(data)):
            ppl.sample("y", dist.Normal((x * gamma * w).sum(-1), sigma), obs=y)

    def guide(data):
        logits, links = param("logits"), param("links")
        drawn = [ppl.sample("gamma_0", dist.Bernoulli(logits=logits[0]))]
        for j in range(1, d):
            logit = logits[j] + (links[j, :j] * xp.stack(drawn, -1)).sum(-1)
            drawn.append(ppl.sample(f"gamma_{j}", dist.Bernoulli(logits=logit)))
        ppl.sample("w", weights(data, 1.0 * xp.stack(drawn, -1)))

    def weights(data, gamma):
        if options["weights"] == "paired":
            scale = gamma * xp.exp(param("log_scale")) + (1 - gamma) * slab
            return dist.Normal(gamma * param("loc"), scale).to_event(1)
        x, y = data[:, :-1], data[:, -1]
        precision = array(np.eye(d)) / slab**2 + gamma[..., :, None] * gamma[..., None, :] * (x.T @ x) / sigma**2
        loc = xp.linalg.solve(precision, (gamma * (x.T @ y) / sigma**2)[..., None])[..., 0]
        return dist.MultivariateNormal(loc, precision_matrix=precision)

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
