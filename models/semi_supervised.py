"""An autoencoder of digits with few labels: where a label is missing it is summed out, and the style is sampled.

    y ~ uniform over ten digits,  s ~ N(0, I),  b ~ Bernoulli(1/2) each,  x | y, s, b ~ Bernoulli(net(one-hot(y), s, b))

A row is a label (−1 where it is missing) and the pixels. A row with a label adds log p(x, y | s, b) to the bound, one without
log Σ_y p(x, y | s, b): `obs_mask` says which. The guide draws the style alone, its numbers s by reparameterization and its strokes b by any estimator of
Bernoulli sites: q(s | x) q(b | x). It has no classifier; the posterior of the label is that of the model.
"""

import numpy as np

OPTIONS = {
    "labels": 50,  # how many train rows have one
    "copies": 10,  # how often such a row is in the train data, so that the few are heard
    "style": 8,  # numbers s
    "strokes": 8,  # bits b
    "hidden": 64,  # tanh units between
}
DISCRETE = ("strokes",)
CLASSES = 10


def split(seed):
    """Return binary pixels with their labels before them, of 1,500 train and 297 test digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.column_stack([digits.target, digits.data >= 8]).astype(float)
    return train_test_split(rows, test_size=297, random_state=seed, stratify=digits.target)


def load(options, seed):
    """Return train rows of which the given number keeps its label, as many of each digit as can be, and test rows without labels."""
    train, test = (rows.copy() for rows in split(seed))
    labels = int(options["labels"])
    if not CLASSES <= labels <= len(train):
        raise ValueError(f"labels is {CLASSES} to {len(train)}; got {labels}.")
    if int(options["copies"]) < 1:
        raise ValueError(f"copies is at least 1; got {options['copies']}.")
    # The first of each digit, then the second of each, and so on.
    turn = np.array([np.sum(train[:i, 0] == y) for i, y in enumerate(train[:, 0])])
    order = np.argsort(turn, kind="stable")
    train[order[labels:], 0] = -1
    test[:, 0] = -1
    return np.concatenate([train, *[train[order[:labels]]] * (int(options["copies"]) - 1)]), test


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    rng = np.random.default_rng(seed)
    pixels, hidden = train.shape[1] - 1, int(options["hidden"])
    style, strokes = int(options["style"]), int(options["strokes"])
    mean = np.clip(train[:, 1:].mean(0), 0.01, 0.99)

    def weight(before, after, scale=1.0):
        return scale * rng.normal(size=(before, after)) / np.sqrt(before)

    return {
        # As large as the effect of the style, or the style explains the digit as well.
        "decode_class": weight(CLASSES, hidden, 4.0),
        "decode_style": weight(style, hidden),
        "decode_strokes": weight(strokes, hidden),
        "decode_hidden": np.zeros(hidden),
        "decode_w": weight(hidden, pixels),
        "decode_b": np.log(mean / (1 - mean)),
        "encode_w": weight(pixels, hidden),
        "encode_b": np.zeros(hidden),
        "style_w": weight(hidden, 2 * style, 0.1),
        "strokes_w": weight(hidden, strokes, 0.1),
    }


def encoded(params, center, pixels, xp=np):
    """Return what the guide computes of the pixels: mean and log scale of s, and logits of b."""
    h = xp.tanh(2.0 * (pixels - center) @ params["encode_w"] + params["encode_b"])
    moments = h @ params["style_w"]
    half = moments.shape[-1] // 2
    return moments[..., :half], moments[..., half:] - 0.5, h @ params["strokes_w"]


def decoded(params, y, s, b, xp=np):
    """Return the logits of the pixels."""
    h = params["decode_class"][y] + s @ params["decode_style"] + b @ params["decode_strokes"] + params["decode_hidden"]
    return xp.tanh(h) @ params["decode_w"] + params["decode_b"]


def label_probabilities(params, center, pixels, rng, draws=50):
    """Return p(y | x) of each image and digit, Σ over draws of (s, b) from the guide of p(x, y, s, b) / q(s, b | x), normalised."""
    from scipy.special import expit, log_softmax, logsumexp

    params = {name: value.astype(float) for name, value in params.items()}
    loc, log_scale, logits = encoded(params, center, pixels)
    noise = rng.normal(size=(draws, *loc.shape))
    s = loc + np.exp(log_scale) * noise
    b = (rng.random((draws, *logits.shape)) < expit(logits)).astype(float)
    # The densities of p over q, up to a constant: p(b) is uniform.
    weight = (0.5 * noise**2 + log_scale - 0.5 * s**2).sum(-1) + np.logaddexp(0, np.where(b > 0, -logits, logits)).sum(
        -1
    )
    log_p = []
    for y in range(CLASSES):
        x = decoded(params, y, s, b)
        log_p.append(weight - np.logaddexp(0, np.where(pixels > 0, -x, x)).sum(-1))
    return np.exp(log_softmax(logsumexp(log_p, 1).T, -1))


def program(ppl, dist, xp, array, index, options, train, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    style, strokes = int(options["style"]), int(options["strokes"])
    center = array(train[:, 1:].mean(0))

    def params(*beginnings):
        return {name: ppl.param(name, value) for name, value in start.items() if name.startswith(beginnings)}

    def model(x):
        decoder, label = params("decode"), index(x[:, 0])
        with ppl.plate("data", x.shape[0]):
            y = ppl.sample(
                "y",
                dist.Categorical(logits=array(np.zeros(CLASSES))),
                obs=label * (label >= 0),
                obs_mask=label >= 0,
                infer={"enumerate": "parallel"},
            )
            s = ppl.sample("style", dist.Normal(array(np.zeros(style)), 1.0).to_event(1))
            b = ppl.sample("strokes", dist.Bernoulli(logits=array(np.zeros(strokes))).to_event(1))
            ppl.sample("x", dist.Bernoulli(logits=decoded(decoder, y, s, b, xp)).to_event(1), obs=x[:, 1:])

    def guide(x):
        loc, log_scale, logits = encoded(params("encode", "style", "strokes"), center, x[:, 1:], xp)
        with ppl.plate("data", x.shape[0]):
            ppl.sample("style", dist.Normal(loc, xp.exp(log_scale)).to_event(1))
            ppl.sample("strokes", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import config_enumerate

    def array(a):
        return torch.tensor(a, dtype=torch.get_default_dtype())

    model, guide = program(pyro, dist, torch, array, torch.Tensor.long, options, train, seed)
    # With `obs_mask` Pyro drops a site's own `infer`.
    return config_enumerate(model, "parallel"), guide


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, dist, jnp, jnp.asarray, lambda x: x.astype(int), options, train, seed)
