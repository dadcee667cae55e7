"""Hard attention: one look at one of nine places, only one of which shows a whole digit; the others show halves of digits.

    place ~ Categorical(attention(coarse view)),  label | place ~ Categorical(net(window at place))

The attention sees every place at 2 x 2 pixels, the network sees one window at 8 x 8. Model and guide draw the place from the same
density, so that its terms cancel, and the ELBO is E[log p(label | place)]. With `attention="soft"` nothing is drawn: the network's
hidden units are averaged over all places by the same attention, which evaluates it nine times. Data: scikit-learn's digits.
"""

import numpy as np

OPTIONS = {
    "attention": "hard",  # or "soft"
    "hidden": 32,  # units of the network of a window
    "scorer": 16,  # units of the attention
}
DISCRETE = ("place",)
PLACES = 9


def load(options, seed):
    """Return scenes: the pixels of nine windows, and the label as the last number."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if options["attention"] not in ("hard", "soft"):
        raise ValueError(f"attention is 'hard' or 'soft'; got '{options['attention']}'.")
    digits = load_digits()
    x, test_x, y, test_y = train_test_split(digits.data / 16, digits.target, test_size=297, random_state=seed)
    rng = np.random.default_rng(seed)
    return scenes(x, y, x, rng), scenes(test_x, test_y, test_x, rng)


def scenes(images, labels, others, rng):
    """Return a scene for each image: it stands at a random place, and a half of one of the others at every other place."""
    windows = others[rng.integers(len(others), size=(len(images), PLACES))].reshape(-1, PLACES, 8, 8).copy()
    half, rows = rng.integers(2, size=(2, *windows.shape[:2]))
    index = np.arange(8)
    hidden = (index[None, None] < 4) == half[..., None].astype(bool)
    # A half: the rows or the columns of one side are empty.
    windows *= ~np.where(rows[..., None, None] == 1, hidden[..., :, None], hidden[..., None, :])
    place = rng.integers(PLACES, size=len(images))
    windows[np.arange(len(images)), place] = images.reshape(-1, 8, 8)
    return np.concatenate([windows.reshape(len(images), -1), labels[:, None]], axis=1)


def initial(options, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    rng = np.random.default_rng(seed)
    hidden, scorer = int(options["hidden"]), int(options["scorer"])
    return {
        "look_w0": rng.normal(size=(4, scorer)) / 2,
        "look_b0": np.zeros(scorer),
        "look_w1": np.zeros((scorer, 1)),
        "see_w0": rng.normal(size=(64, hidden)) / 8,
        "see_b0": np.zeros(hidden),
        "see_w1": 0.1 * rng.normal(size=(hidden, 10)),
        "see_b1": np.zeros(10),
    }


def split(scenes):
    """Return the windows (..., places, 64) and the labels of scenes."""
    return scenes[..., :-1].reshape((*scenes.shape[:-1], PLACES, 64)), scenes[..., -1]


def whole(windows):
    """Return the place of the whole digit: the one window with ink in the halves of all four sides."""
    ink = windows.reshape((*windows.shape[:-1], 8, 8))
    halves = [ink[..., :4, :], ink[..., 4:, :], ink[..., :4], ink[..., 4:]]
    return np.argmax(np.min([half.sum((-2, -1)) for half in halves], 0), -1)


def attention(params, xp, windows):
    """Return the logits of the places, from the means of each window's quarters."""
    quarters = windows.reshape((*windows.shape[:-1], 2, 4, 2, 4)).mean((-3, -1))
    coarse = quarters.reshape((*windows.shape[:-1], 4))
    return (xp.tanh(4 * coarse @ params["look_w0"] + params["look_b0"]) @ params["look_w1"])[..., 0]


def features(params, xp, window):
    """Return the hidden units of the network at windows: its evaluations."""
    return xp.tanh(window @ params["see_w0"] + params["see_b0"])


def labels_of(params, features):
    """Return the logits of the labels."""
    return features @ params["see_w1"] + params["see_b1"]


def program(ppl, dist, xp, array, one_hot, integers, options, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, seed).items()}

    def drawn(params, windows):
        return ppl.sample("place", dist.Categorical(logits=attention(params, xp, windows)))

    def model(scenes):
        params = {name: ppl.param(name, value) for name, value in start.items()}
        windows, labels = split(scenes)
        with ppl.plate("data", scenes.shape[0]):
            if options["attention"] == "hard":
                weights = one_hot(drawn(params, windows), PLACES)
                seen = features(params, xp, (weights[..., None] * windows).sum(-2))
            else:
                weights = xp.exp(attention(params, xp, windows))
                weights = weights / weights.sum(-1)[..., None]
                seen = (weights[..., None] * features(params, xp, windows)).sum(-2)
            ppl.sample("label", dist.Categorical(logits=labels_of(params, seen)), obs=integers(labels))

    def guide(scenes):
        params = {name: ppl.param(name, start[name]) for name in ("look_w0", "look_b0", "look_w1")}
        if options["attention"] == "hard":
            with ppl.plate("data", scenes.shape[0]):
                drawn(params, split(scenes)[0])

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

    return program(pyro, dist, torch, array, one_hot, lambda a: a.long(), options, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def array(a):
        return jnp.asarray(a, jnp.float32)

    return program(numpyro, dist, jnp, array, jax.nn.one_hot, lambda a: a.astype(int), options, seed)
