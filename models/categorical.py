"""A categorical autoencoder of images: many categorical latents, each a one-hot vector, under two nonlinear networks.

    k_d ~ Categorical(prior_d) for d = 1, ..., D,  x | k ~ Bernoulli(net(k)),  q(k | x) = prod_d Categorical(net(x)_d)

The benchmark of Dong, Mnih and Tucker (2021): 200 and 200 leaky rectifiers (a slope of 0.3 below zero) in each network. Data:
scikit-learn's digits of 8 x 8 pixels, or a local copy of another set (images.py), binarised.
"""

import numpy as np

OPTIONS = {
    "variables": 32,  # categorical latents of a datum
    "categories": 16,  # values of each
    "hidden": 200,  # units of each of the two hidden layers
    "binarize": "dynamic",  # sampled afresh at every step, or "threshold" once at half intensity
    "data": "digits",  # or the path of a local copy of MNIST, Fashion-MNIST or Omniglot
    "held_back": 0,  # the last train images, left out for validation
}
DISCRETE = ("k",)


def load(options, seed):
    """Return the pixels of the train and the test images, in [0, 1]."""
    import images

    if options["binarize"] not in ("threshold", "dynamic"):
        raise ValueError(f"binarize is 'threshold' or 'dynamic'; got '{options['binarize']}'.")
    train, test = images.load(options["data"], seed, options["held_back"])
    if options["binarize"] == "threshold":
        train, test = (train >= 0.5).astype(float), (test >= 0.5).astype(float)
    return train, test


def prepare(options, batch, rng):
    """Return a batch as the model sees it: binary pixels, sampled by intensity if that is asked for."""
    return (rng.random(batch.shape) < batch).astype(float) if options["binarize"] == "dynamic" else batch


def initial(options, train, seed):
    """Return the initial parameters of both networks as NumPy arrays, the same for both libraries."""
    rng = np.random.default_rng(seed)
    pixels, total, hidden = train.shape[1], options["variables"] * options["categories"], options["hidden"]
    mean = np.clip(train.mean(0), 0.001, 0.999)
    params = {"prior": np.zeros((options["variables"], options["categories"]))}
    for name, sizes in (("encode", [pixels, hidden, hidden, total]), ("decode", [total, hidden, hidden, pixels])):
        for i, (before, after) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            params[f"{name}_w{i}"] = rng.normal(size=(before, after)) / np.sqrt(before)
            params[f"{name}_b{i}"] = np.zeros(after)
    params["decode_b2"] = np.log(mean / (1 - mean))
    return params


def program(ppl, dist, one_hot, xp, array, options, train, seed):
    """Return model and guide, written once: the two libraries' primitives have the same names."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    center = array(train.mean(0))
    shape = (options["variables"], options["categories"])

    def network(name, h):
        for i in range(3):
            h = h @ ppl.param(f"{name}_w{i}", start[f"{name}_w{i}"]) + ppl.param(f"{name}_b{i}", start[f"{name}_b{i}"])
            h = h if i == 2 else xp.maximum(h, 0.3 * h)
        return h

    def model(x):
        prior = ppl.param("prior", start["prior"])
        with ppl.plate("data", x.shape[0]):
            k = ppl.sample("k", one_hot(prior).to_event(1))
            flat = k.reshape(k.shape[:-2] + (shape[0] * shape[1],))
            ppl.sample("x", dist.Bernoulli(logits=network("decode", flat)).to_event(1), obs=x)

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            logits = network("encode", x - center)
            ppl.sample("k", one_hot(logits.reshape(logits.shape[:-1] + shape)).to_event(1))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    def one_hot(logits):
        return dist.OneHotCategorical(logits=logits)

    return program(pyro, dist, one_hot, torch, lambda a: torch.tensor(a, dtype=torch.float32), options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro, which has no one-hot distribution of its own."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from pplgrad.numpyro import OneHotCategorical

    def one_hot(logits):
        return OneHotCategorical(logits=logits)

    return program(numpyro, dist, one_hot, jnp, lambda a: jnp.asarray(a, jnp.float32), options, train, seed)
