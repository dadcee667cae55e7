"""A hidden Markov model of letters: its states find out by themselves which letters are vowels.

    z_1 ~ Categorical(start),  z_t | z_{t−1} ~ Categorical(change[z_{t−1}]),  x_t | z_t ~ Categorical(emit[z_t])

The chain is discrete; in NumPyro it runs in `scan`, in Pyro in a Python loop. A datum is a piece of text from the descriptions that come with
scikit-learn's data sets (BSD licence), in 27 letters with the space. The guide's chain q(z_t | z_{t−1}, x) is the
posterior's, by backward messages at the model's present parameters ("exact"), or learned from z_{t−1} and the letters at t − 1, t and t + 1
("learned").
"""

import re

import numpy as np

OPTIONS = {
    "states": 2,
    "length": 20,  # letters in a piece of text
    "pieces": 400,
    "guide": "learned",  # or "exact"
}
DISCRETE = ("z*",)
LETTERS = " abcdefghijklmnopqrstuvwxyz"


def load(options, seed):
    """Return pieces of text as numbers of letters, three quarters of them to train on."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    if options["guide"] not in ("exact", "learned"):
        raise ValueError(f"guide is 'exact' or 'learned'; got '{options['guide']}'.")
    length, pieces = int(options["length"]), int(options["pieces"])
    text = " ".join(
        getattr(datasets, f"load_{name}")().DESCR for name in ("breast_cancer", "diabetes", "wine", "iris", "digits")
    )
    letters = re.sub("[^a-z]+", " ", re.sub(r":\w+:|[_*|=-]+", " ", text.lower()))
    numbers = np.array([LETTERS.index(letter) for letter in letters], float)
    if not 2 <= length * 4 or not 4 <= pieces <= len(numbers) // length:
        raise ValueError(f"4 to {len(numbers) // length} pieces of {length} letters are there; got {pieces}.")
    data = numbers[: pieces * length].reshape(pieces, length)
    return train_test_split(data, test_size=0.25, random_state=seed)


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    rng = np.random.default_rng(seed)
    k, letters = int(options["states"]), len(LETTERS)
    # States that rather change than stay: sequences of letters that repeat are a poorer optimum.
    # Letters as frequent as in the text, so that what is to be learned is how the states differ.
    frequency = np.bincount(train.astype(int).ravel(), minlength=letters) + 1.0
    start = {
        "start": 0.1 * rng.normal(size=k),
        "change": 0.1 * rng.normal(size=(k, k)) - 2.0 * np.eye(k),
        "emit": np.log(frequency / frequency.sum()) + 0.3 * rng.normal(size=(k, letters)),
    }
    if options["guide"] == "learned":
        start |= {f"see_{which}": np.zeros((letters, k)) for which in ("before", "now", "after")}
        start |= {"follow": np.zeros((k, k))}
    return start


def forward_backward(params, x):
    """Return log p(x) of each piece, and the expected counts of first states, changes and emissions given all pieces.

    The counts are the posterior-weighted sums of Fisher's identity and of the E step: arrays (states), (states, states) and
    (states, letters).
    """
    from scipy.special import log_softmax, logsumexp

    start, change, emit = (log_softmax(np.asarray(params[name], float), -1) for name in ("start", "change", "emit"))
    seen = np.moveaxis(emit[:, x.astype(int)], 0, -1)
    n, length, k = seen.shape
    forward, backward = np.zeros((length, n, k)), np.zeros((length, n, k))
    forward[0] = start + seen[:, 0]
    for t in range(1, length):
        forward[t] = logsumexp(forward[t - 1][:, :, None] + change, 1) + seen[:, t]
    for t in reversed(range(length - 1)):
        backward[t] = logsumexp(change + (seen[:, t + 1] + backward[t + 1])[:, None], 2)
    log_prob = logsumexp(forward[-1], -1)
    state = np.exp(forward + backward - log_prob[:, None])
    step = forward[:-1, :, :, None] + change + (seen.swapaxes(0, 1)[1:] + backward[1:])[:, :, None]
    letters = np.eye(len(LETTERS))[x.astype(int)]
    counts = {
        "start": state[0].sum(0),
        "change": np.exp(step - log_prob[:, None, None]).sum((0, 1)),
        "emit": np.einsum("tnk,ntl->kl", state, letters),
    }
    return log_prob, counts


def fisher_gradient(params, x):
    """Return ∇ log p(x) with respect to the logits, E[∇ log p(x, z) | x]: counts less what the present model expects of them."""
    from scipy.special import softmax

    _, counts = forward_backward(params, x)
    return {
        name: c - c.sum(-1, keepdims=True) * softmax(np.asarray(params[name], float), -1) for name, c in counts.items()
    }


def em_step(params, x):
    """Return the parameters after one step of expectation maximisation (Baum and Welch)."""
    _, counts = forward_backward(params, x)
    return {name: np.log(np.maximum(c, 1e-12) / c.sum(-1, keepdims=True)) for name, c in counts.items()}


def program(ppl, dist, xp, array, log_softmax, fixed, index, loop, options, train, seed):
    """Return model and guide, written once for both libraries; their loops over time differ."""
    values = {name: array(value) for name, value in initial(options, train, seed).items()}

    def param(name):
        return ppl.param(name, values[name])

    def model(x):
        start, change, emit = param("start"), param("change"), param("emit")

        def step(name, carry, now):
            z, first = carry
            (letter,) = now
            with ppl.plate(name("texts"), x.shape[0]):
                z = ppl.sample(name("z"), dist.Categorical(logits=xp.where(first > 0, start, change[z])))
                ppl.sample(name("x"), dist.Categorical(logits=emit[z]), obs=letter)
            return (z, first * 0), None

        loop(step, nothing(x), (index(x.T),))

    def nothing(x):
        """Return what comes before the first letter: a state that is not looked at, and that this is the first."""
        return index(0 * x[:, 0]), array(1.0)

    def exact_guide(x):
        start, change, emit = (log_softmax(fixed(param(name))) for name in ("start", "change", "emit"))
        seen = xp.moveaxis(emit[:, index(x.T)], 0, -1)
        messages = backward_messages(seen, change)

        def step(name, carry, now):
            z, first = carry
            logits = xp.where(first > 0, start, change[z]) + now[0]
            with ppl.plate(name("texts"), x.shape[0]):
                z = ppl.sample(name("z"), dist.Categorical(logits=logits))
            return (z, first * 0), None

        loop(step, nothing(x), (seen + messages,))

    def backward_messages(seen, change):
        """Return log p(x_{t+1}, … | z_t) for each time, text and state."""
        found = [0 * seen[-1]]
        for t in range(len(seen) - 1, 0, -1):
            found.append(xp.logsumexp(change + (seen[t] + found[-1])[:, None], -1))
        return xp.stack(found[::-1])

    def learned_guide(x):
        follow, letters = param("follow"), index(x.T)
        before, now_, behind = (param(f"see_{which}") for which in ("before", "now", "after"))
        edge = 0 * letters[:1]
        near = (
            now_[letters] + before[xp.concatenate([edge, letters[:-1]])] + behind[xp.concatenate([letters[1:], edge])]
        )

        def step(name, carry, now):
            z, first = carry
            logits = xp.where(first > 0, 0.0, follow[z]) + now[0]
            with ppl.plate(name("texts"), x.shape[0]):
                z = ppl.sample(name("z"), dist.Categorical(logits=logits))
            return (z, first * 0), None

        loop(step, nothing(x), (near,))

    return model, exact_guide if options["guide"] == "exact" else learned_guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from chains import loop_in_pyro

    def array(a):
        return torch.tensor(a, dtype=torch.get_default_dtype())

    def log_softmax(a):
        return a.log_softmax(-1)

    return program(
        pyro,
        dist,
        torch,
        array,
        log_softmax,
        torch.Tensor.detach,
        torch.Tensor.long,
        loop_in_pyro,
        options,
        train,
        seed,
    )


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from chains import scan_in_numpyro
    from jax.scipy.special import logsumexp

    class Arrays:
        """jax.numpy, with logsumexp as torch has it."""

        def __getattr__(self, name):
            return logsumexp if name == "logsumexp" else getattr(jnp, name)

    def index(x):
        return x.astype(int)

    return program(
        numpyro,
        dist,
        Arrays(),
        jnp.asarray,
        jax.nn.log_softmax,
        jax.lax.stop_gradient,
        index,
        scan_in_numpyro,
        options,
        train,
        seed,
    )
