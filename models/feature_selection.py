"""Feature selection: which three of ten measurements of a cell say whether a tumour is malignant?

    z ~ Subset(k),  y ~ Bernoulli(logit = Σ_j z_j w_j x_j + b)

z is one binary vector with k ones, shared by all data. The guide draws it from Subset(k, θ), and w, b are parameters of the model. With
ten measurements and k = 3 there are 120 subsets, so that the posterior given w and b and the bound are sums (`exact`). The data are the
means in scikit-learn's breast cancer data (Street, Wolberg and Mangasarian 1993), standardised.
"""

from itertools import combinations

import numpy as np

OPTIONS = {
    "chosen": 3,  # how many measurements are chosen
}
DISCRETE = ("chosen",)
WHOLE_DATA = True


def load(options, seed):
    """Return measurements and, in the last column, whether the tumour is malignant: three quarters of the tumours, and the others."""
    from sklearn.datasets import load_breast_cancer

    if not 1 <= int(options["chosen"]) <= 10:
        raise ValueError(f"chosen is the number of measurements, from 1 to 10; got {options['chosen']}.")
    data = load_breast_cancer()
    x = data.data[:, :10]
    rows = np.column_stack([(x - x.mean(0)) / x.std(0), 1 - data.target])
    rows = np.random.default_rng(seed).permutation(rows).astype(np.float32)
    train = len(rows) * 3 // 4
    return rows[:train], rows[train:]


def names():
    """Return the names of the measurements."""
    from sklearn.datasets import load_breast_cancer

    return [str(name).removeprefix("mean ") for name in load_breast_cancer().feature_names[:10]]


def subsets(k):
    """Return all binary vectors of ten numbers with k ones."""
    return np.array([np.isin(np.arange(10), chosen) for chosen in combinations(range(10), k)], float)


def exact(params, rows, k):
    """Return the bound in nats, the log evidence given w and b, and the guide's and the posterior's probability of every subset."""
    from scipy.special import logsumexp

    every = subsets(k)
    logits = (every * params["weights"]) @ rows[:, :10].T + params["bias"]
    joint = -np.logaddexp(0, np.where(rows[:, 10] > 0, -logits, logits)).sum(-1) - np.log(len(every))
    guide = every @ params["logits"]
    guide = guide - logsumexp(guide)
    evidence = logsumexp(joint)
    return np.exp(guide) @ (joint - guide), evidence, np.exp(guide), np.exp(joint - evidence)


def program(options, ppl, dist, law, array):
    """Return model and guide, written once for both libraries."""
    k = int(options["chosen"])

    def model(data):
        weights, bias = ppl.param("weights", array(np.zeros(10))), ppl.param("bias", array(0.0))
        chosen = ppl.sample("chosen", law(k, array(np.zeros(10))))
        logits = (chosen * weights * data[:, :10]).sum(-1) + bias
        with ppl.plate("data", len(data)):
            ppl.sample("malignant", dist.Bernoulli(logits=logits), obs=data[:, 10])

    def guide(data):
        ppl.sample("chosen", law(k, ppl.param("logits", array(np.zeros(10)))))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    from pplgrad.pyro import Subset

    return program(options, pyro, dist, Subset, lambda a: torch.tensor(a, dtype=torch.float32))


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from pplgrad.numpyro import Subset

    return program(options, numpyro, dist, Subset, lambda a: jnp.asarray(a, jnp.float32))
