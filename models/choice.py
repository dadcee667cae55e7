"""A choice among a few numbers that should come close to a target: the smallest task on which relaxations are biased.

    z ~ OneHot(softmax(θ)),   reward −(v·z − t)^p,   v evenly in [0, 1]

Halfway between two numbers a relaxed z does better than any choice, so that a relaxation may settle there. At p = 2 the
reward is quadratic in z. Use it with `--objective 'Expectation()'`. A datum is a target t.
"""

import numpy as np

OPTIONS = {
    "numbers": 3,
    "power": 2,
    "targets": 8,
}
DISCRETE = ("z",)


def load(options, seed):
    """Return the targets, one a row, train and test the same."""
    targets = np.linspace(0.1, 0.4, int(options["targets"]))[:, None]
    return targets, targets


def program(ppl, one_hot, array, options, start):
    """Return model and guide, written once for both libraries; the first column of a datum is its target."""
    values = np.linspace(0.0, 1.0, int(options["numbers"]))

    def model(x):
        with ppl.plate("targets", x.shape[0]):
            z = ppl.sample("z", one_hot(logits=array(np.zeros(len(values)))))
            gap = (z * array(values)).sum(-1) - x[:, 0]
            ppl.factor("reward", -(gap ** int(options["power"])))

    def guide(x):
        logits = ppl.param("logits", array(start))
        with ppl.plate("targets", x.shape[0]):
            ppl.sample("z", one_hot(logits=logits))

    return model, guide


def initial(options):
    """Return the first θ: not the fair choice."""
    return np.linspace(-0.2, 0.4, int(options["numbers"]))


def pyro_program(options, train, seed, start=None):
    """Return model and guide for Pyro; `start` holds the first θ, (n,), or (targets, n) with one for each target."""
    import pyro
    import pyro.distributions as dist
    import torch

    def array(a):
        return torch.tensor(a, dtype=torch.get_default_dtype())

    return program(pyro, dist.OneHotCategorical, array, options, initial(options) if start is None else start)


def numpyro_program(options, train, seed, start=None):
    """Return model and guide for NumPyro; `start` holds the first θ, (n,), or (targets, n) with one for each target."""
    import jax.numpy as jnp
    import numpyro

    from pplgrad.numpyro import OneHotCategorical

    start = initial(options) if start is None else start
    return program(numpyro, OneHotCategorical, lambda a: jnp.asarray(a, float), options, start)
