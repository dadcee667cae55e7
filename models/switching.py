"""A switching state-space model: a particle that drifts now up, now down, now not at all, seen through noise.

    s_t | s_{t−1}: stays with probability `stay`, else any other regime;  x_t = x_{t−1} + drift[s_t] + N(0, move²);  y_t = x_t + N(0, noise²)

Regimes are discrete, states continuous; in NumPyro time runs in `scan`, in Pyro in a Python loop. A datum is a series. The guide filters
with what is seen from t − 4 to t + 4: q(s_t | s_{t−1}, y) by the score function, q(x_t | x_{t−1}, s_t, y) by reparameterization. The drifts
are learned parameters.
"""

import numpy as np

OPTIONS = {
    "series": 60,
    "length": 40,
    "stay": 0.92,
    "move": 0.3,
    "noise": 0.5,
}
DISCRETE = ("s*",)
DRIFTS = (-1.0, 0.0, 1.0)  # of the simulated series, per step
SEEN = 4  # steps that the guide looks back and ahead


def simulate(options, seed):
    """Return the regimes and what is seen of them, a series a row."""
    rng = np.random.default_rng(seed)
    shape = int(options["series"]), int(options["length"])
    regimes = np.zeros(shape, int)
    regimes[:, 0] = rng.integers(3, size=shape[0])
    for t in range(1, shape[1]):
        moved = (regimes[:, t - 1] + rng.integers(1, 3, size=shape[0])) % 3
        regimes[:, t] = np.where(rng.random(shape[0]) < float(options["stay"]), regimes[:, t - 1], moved)
    states = np.cumsum(np.array(DRIFTS)[regimes] + float(options["move"]) * rng.normal(size=shape), 1)
    return regimes, states + float(options["noise"]) * rng.normal(size=shape)


def load(options, seed):
    """Return simulated series, three quarters of them to train on."""
    if int(options["length"]) < 2 or int(options["series"]) < 4:
        raise ValueError("series is at least 4 and length at least 2.")
    data = simulate(options, seed)[1]
    return data[: 3 * len(data) // 4], data[3 * len(data) // 4 :]


def transitions(options):
    """Return log p(s_t | s_{t−1})."""
    stay = float(options["stay"])
    return np.log(np.where(np.eye(3) > 0, stay, (1 - stay) / 2))


def exact_log_evidence(options, drifts, y):
    """Return log p(y) of short series and p(s | y) of their regimes, by the Kalman filter on each of the 3^T sequences of regimes.

    Shapes: (series,) and (series, T, 3).
    """
    from itertools import product

    from scipy.special import logsumexp

    paths = np.array(list(product(range(3), repeat=y.shape[1])))
    change, drift = transitions(options), np.asarray(drifts)[paths]
    log_joint = np.log(1 / 3) + change[paths[:, :-1], paths[:, 1:]].sum(-1)
    log_joint = np.repeat(log_joint[None], len(y), 0)
    mean, variance = np.zeros((len(y), len(paths))), 0.0
    for t in range(y.shape[1]):
        mean, variance = mean + drift[:, t], variance + float(options["move"]) ** 2
        total = variance + float(options["noise"]) ** 2
        off = y[:, t, None] - mean
        log_joint += -0.5 * np.log(2 * np.pi * total) - 0.5 * off**2 / total
        mean, variance = mean + variance / total * off, variance * (1 - variance / total)
    evidence = logsumexp(log_joint, -1)
    return evidence, np.einsum("np,ptk->ntk", np.exp(log_joint - evidence[:, None]), np.eye(3)[paths])


def smoother(options, drifts, y, width=0.1):
    """Return log p(y) and p(s_t | y) as above of series of any length: forward-backward with the state on a grid of that width.

    The sums over the grid are integrals of smooth functions, right to about 1e-6 while the width is below half of `move` and `noise`.
    """
    from scipy.special import softmax
    from scipy.stats import norm

    reach = 4 * float(options["noise"]) + 4 * float(options["move"])
    grid = np.arange(min(y.min(), 0) - reach, max(y.max(), 0) + reach, width)
    grid -= grid[np.argmin(np.abs(grid))]
    kernel = np.stack([norm.pdf(grid - grid[:, None], d, float(options["move"])) * width for d in drifts])
    change = softmax(transitions(options), -1)
    seen = norm.pdf(y[..., None], grid, float(options["noise"]))
    n, length = y.shape
    forward = np.zeros((length, n, 3, len(grid)))
    forward[0] = norm.pdf(grid, np.asarray(drifts)[:, None], float(options["move"])) * width / 3 * seen[:, 0, None]
    log_evidence = np.zeros(n)
    for t in range(length):
        if t:
            moved = np.stack([(forward[t - 1].swapaxes(1, 2) @ change[:, k]) @ kernel[k] for k in range(3)], 1)
            forward[t] = moved * seen[:, t, None]
        total = forward[t].sum((1, 2), keepdims=True)
        log_evidence += np.log(total[:, 0, 0])
        forward[t] /= total
    backward, found = np.ones_like(forward[0]), np.zeros((n, length, 3))
    for t in reversed(range(length)):
        both = (forward[t] * backward).sum(-1)
        found[:, t] = both / both.sum(-1, keepdims=True)
        coming = np.stack([(seen[:, t] * backward[:, k]) @ kernel[k].T for k in range(3)], 1)
        backward = np.einsum("jk,nkg->njg", change, coming)
        backward /= backward.max((1, 2), keepdims=True)
    return log_evidence, found


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    return {
        "drifts": np.array([-0.5, 0.05, 0.5]),
        "see": np.outer(np.ones(2 * SEEN), [-0.1, 0.0, 0.1]),
        "pull": np.array([-0.1, 0.0, 0.1]),
        "bias": np.zeros(3),
        "follow": 0.5 * np.eye(3),
        "gain": np.array(0.5),
        "lean": np.zeros(2 * SEEN),
        "log_spread": np.array(-1.0),
    }


def program(ppl, dist, xp, array, loop, options, train, seed):
    """Return model and guide, written once for both libraries; their loops over time differ."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    change, move, noise = array(transitions(options)), float(options["move"]), float(options["noise"])

    def param(name):
        return ppl.param(name, start[name])

    def nothing(y):
        """Return what comes before the first step: a regime that is not looked at, a state, and that this is the first."""
        return xp.zeros(len(y), dtype=xp.int32), 0 * y[:, 0], array(1.0)

    def model(y):
        drifts = param("drifts")

        def step(name, carry, now):
            s, x, first = carry
            with ppl.plate(name("series"), len(y)):
                s = ppl.sample(name("s"), dist.Categorical(logits=(1 - first) * change[s]))
                x = ppl.sample(name("x"), dist.Normal(x + drifts[s], move))
                ppl.sample(name("y"), dist.Normal(x, noise), obs=now[0])
            return (s, x, 0 * first), None

        loop(step, nothing(y), (y.T,))

    def differences(y):
        """Return the changes from t − 4 to t + 4 at each time, zero beyond the ends: (T, series, 8)."""
        none = xp.zeros((len(y), SEEN), dtype=y.dtype)
        changes = xp.concatenate([none, y[:, 1:] - y[:, :-1], none], -1)
        return xp.stack([changes[:, i : i + y.shape[1]] for i in range(2 * SEEN)], -1).swapaxes(0, 1)

    def guide(y):
        drifts, gain, spread = param("drifts"), param("gain"), xp.exp(param("log_spread"))
        seen = differences(y)
        votes, lean, follow, pull = (
            seen @ param("see") + param("bias"),
            seen @ param("lean"),
            param("follow"),
            param("pull"),
        )

        def step(name, carry, now):
            s, x, first = carry
            here, vote, leaning = now
            logits = vote + (1 - first) * follow[s] + (here - x)[..., None] * pull
            with ppl.plate(name("series"), len(y)):
                s = ppl.sample(name("s"), dist.Categorical(logits=logits))
                ahead = x + drifts[s]
                x = ppl.sample(name("x"), dist.Normal(ahead + gain * (here - ahead) + leaning, spread))
            return (s, x, 0 * first), None

        loop(step, nothing(y), (y.T, votes, lean))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from chains import loop_in_pyro

    return program(
        pyro, dist, torch, lambda a: torch.tensor(a, dtype=torch.float32), loop_in_pyro, options, train, seed
    )


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from chains import scan_in_numpyro

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), scan_in_numpyro, options, train, seed)
