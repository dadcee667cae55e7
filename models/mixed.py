"""A discrete and a continuous latent for each digit: which class it is, and in what style it is written.

    k ~ Categorical(prior),  s ~ N(0, I),  x | k, s ~ Bernoulli(net(one-hot(k), s))

and the guide q(k | x) q(s | x, k): the class is estimated by the score function, the style by reparameterization.
"""

import numpy as np

OPTIONS = {
    "classes": 10,  # values of the discrete latent
    "style": 2,  # dimensions of the continuous latent
    "hidden": 64,  # tanh units between
}
DISCRETE = ("k",)


def load(options, seed):
    """Return the binary pixels of the train and the test digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images = (load_digits().data >= 8).astype(float)
    train, test = train_test_split(images, test_size=297, random_state=seed)
    return train, test


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    rng = np.random.default_rng(seed)
    pixels, hidden = train.shape[1], int(options["hidden"])
    classes, style = int(options["classes"]), int(options["style"])
    mean = np.clip(train.mean(0), 0.01, 0.99)

    def weight(before, after, scale=1.0):
        return scale * rng.normal(size=(before, after)) / np.sqrt(before)

    return {
        "prior": np.zeros(classes),
        "decode_class": weight(classes, hidden, 2.0),
        "decode_style": weight(style, hidden),
        "decode_hidden": np.zeros(hidden),
        "decode_w": weight(hidden, pixels),
        "decode_b": np.log(mean / (1 - mean)),
        "encode_w": weight(pixels, hidden),
        "encode_b": np.zeros(hidden),
        "class_w": weight(hidden, classes),
        "style_w": weight(hidden, 2 * style, 0.1),
        "style_class": weight(classes, 2 * style, 0.1),
    }


def program(ppl, dist, xp, array, one_hot, options, train, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    classes, style = int(options["classes"]), int(options["style"])
    center = array(train.mean(0))

    def param(name):
        return ppl.param(name, start[name])

    def model(x):
        prior = param("prior")
        with ppl.plate("data", x.shape[0]):
            k = ppl.sample("k", dist.Categorical(logits=prior))
            s = ppl.sample("s", dist.Normal(array(np.zeros(style)), 1.0).to_event(1))
            h = one_hot(k, classes) @ param("decode_class") + s @ param("decode_style") + param("decode_hidden")
            logits = xp.tanh(h) @ param("decode_w") + param("decode_b")
            ppl.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        h = xp.tanh(2.0 * (x - center) @ param("encode_w") + param("encode_b"))
        with ppl.plate("data", x.shape[0]):
            k = ppl.sample("k", dist.Categorical(logits=h @ param("class_w")))
            moments = h @ param("style_w") + one_hot(k, classes) @ param("style_class")
            loc, log_scale = moments[..., :style], moments[..., style:]
            ppl.sample("s", dist.Normal(loc, xp.exp(log_scale - 0.5)).to_event(1))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    def array(a):
        return torch.tensor(a, dtype=torch.float32)

    def one_hot(k, n):
        return torch.nn.functional.one_hot(k, n).to(torch.float32)

    return program(pyro, dist, torch, array, one_hot, options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), jax.nn.one_hot, options, train, seed)
