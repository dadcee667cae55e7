"""Sigmoid belief network on images: one to three layers of Bernoulli latents, linear or nonlinear.

    z_L ~ Bernoulli(prior),  z_{l-1} | z_l ~ Bernoulli(net_l(z_l)),  x | z_1 ~ Bernoulli(net_0(z_1))

with the guide in the opposite direction, q(z_1 | x) q(z_2 | z_1): the standard benchmark of gradient estimators for
discrete latents (Mnih and Gregor 2014; Dong, Mnih and Tucker 2020, whose nonlinear networks have two hidden layers
of leaky rectifiers between stochastic layers). Data: scikit-learn's 1,797 digits of 8 x 8 pixels, or a local copy of another
set (images.py), binarised.
"""

import numpy as np

OPTIONS = {
    "latents": 200,  # Bernoulli latents in each layer
    "layers": 1,  # stochastic layers: 1 to 3
    "nonlinear": False,  # two hidden layers between stochastic layers
    "hidden": 200,  # units of those hidden layers
    "activation": "tanh",  # of those units: "tanh", or "leaky" (a slope of 0.3 below zero)
    "binarize": "threshold",  # "threshold" once at half intensity, or "dynamic": sampled afresh at every step
    "data": "digits",  # or the path of a local copy of MNIST, Fashion-MNIST or Omniglot
    "held_back": 0,  # the last train images, left out for validation
}
DISCRETE = ("z*",)


def load(options, seed):
    """Return the pixels of the train and the test images, in [0, 1]."""
    import images

    if options["binarize"] not in ("threshold", "dynamic"):
        raise ValueError(f"binarize is 'threshold' or 'dynamic'; got '{options['binarize']}'.")
    if options["layers"] not in (1, 2, 3):
        raise ValueError(f"layers is 1, 2 or 3; got {options['layers']}.")
    if options["activation"] not in ("tanh", "leaky"):
        raise ValueError(f"activation is 'tanh' or 'leaky'; got '{options['activation']}'.")
    train, test = images.load(options["data"], seed, options["held_back"])
    if options["binarize"] == "threshold":
        train, test = (train >= 0.5).astype(float), (test >= 0.5).astype(float)
    return train, test


def prepare(options, batch, rng):
    """Return a batch as the model sees it: binary pixels, sampled by intensity if that is asked for."""
    return (rng.random(batch.shape) < batch).astype(float) if options["binarize"] == "dynamic" else batch


def initial(options, train, seed):
    """Return the initial parameters of all networks as NumPy arrays, the same for both libraries."""
    rng = np.random.default_rng(seed)
    pixels, n, layers = train.shape[1], int(options["latents"]), int(options["layers"])
    between = [int(options["hidden"])] * 2 if options["nonlinear"] else []
    mean = np.clip(train.mean(0), 0.01, 0.99)
    params = {"prior": np.zeros(n)}

    def network(name, sizes, last_bias=None):
        for i, (before, after) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            params[f"{name}_w{i}"] = rng.normal(size=(before, after)) / np.sqrt(before)
            params[f"{name}_b{i}"] = np.zeros(after)
        if last_bias is not None:
            params[f"{name}_b{len(sizes) - 2}"] = last_bias

    network("decode0", [n, *between, pixels], np.log(mean / (1 - mean)))
    network("encode1", [pixels, *between, n])
    for layer in range(1, layers):
        network(f"decode{layer}", [n, *between, n])
        network(f"encode{layer + 1}", [n, *between, n])
    return params


def program(ppl, dist, xp, array, options, train, seed):
    """Return model and guide, written once: the two libraries' primitives have the same names."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    center = array(train.mean(0))
    depth = 3 if options["nonlinear"] else 1
    layers = int(options["layers"])

    def network(name, h):
        for i in range(depth):
            weight = ppl.param(f"{name}_w{i}", start[f"{name}_w{i}"])
            h = h @ weight + ppl.param(f"{name}_b{i}", start[f"{name}_b{i}"])
            if i < depth - 1:
                h = xp.tanh(h) if options["activation"] == "tanh" else xp.maximum(h, 0.3 * h)
        return h

    def bernoulli(logits):
        return dist.Bernoulli(logits=logits).to_event(1)

    def model(x):
        prior = ppl.param("prior", start["prior"])
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample(f"z{layers}", bernoulli(prior))
            for layer in range(layers - 1, 0, -1):
                z = ppl.sample(f"z{layer}", bernoulli(network(f"decode{layer}", 2.0 * z - 1.0)))
            ppl.sample("x", bernoulli(network("decode0", 2.0 * z - 1.0)), obs=x)

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z1", bernoulli(network("encode1", 2.0 * (x - center))))
            for layer in range(2, layers + 1):
                z = ppl.sample(f"z{layer}", bernoulli(network(f"encode{layer}", 2.0 * z - 1.0)))

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
