"""A number that wanders back to zero, seen through noise: a linear Gaussian state-space model, whose evidence the Kalman filter knows.

    z_t | z_{t−1} ~ N(decay · z_{t−1}, move²);  y_t | z_t ~ N(z_t, noise²)

In NumPyro time runs in `scan`, in Pyro in a `pyro.markov` loop, so that particle filters (`FIVO`) fit both. A datum is a series. The guide filters:
q(z_t | z_{t−1}, y_t) is normal, linear in both. decay and move are learned, and so is the guide.
"""

import numpy as np

OPTIONS = {
    "series": 40,
    "length": 60,
    "decay": 0.95,
    "move": 0.5,
    "noise": 1.0,
}
DISCRETE = ("z*",)  # which are normal, but get the estimators under comparison


def simulate(options, seed):
    """Return what is seen, a series a row."""
    rng = np.random.default_rng(seed)
    shape = int(options["series"]), int(options["length"])
    state, rows = np.zeros(shape[0]), []
    for _ in range(shape[1]):
        state = float(options["decay"]) * state + float(options["move"]) * rng.normal(size=shape[0])
        rows.append(state + float(options["noise"]) * rng.normal(size=shape[0]))
    return np.stack(rows, 1)


def load(options, seed):
    """Return simulated series, three quarters of them to train on."""
    if int(options["length"]) < 2 or int(options["series"]) < 4:
        raise ValueError("series is at least 4 and length at least 2.")
    data = simulate(options, seed)
    return data[: 3 * len(data) // 4], data[3 * len(data) // 4 :]


def log_evidence(options, params, y):
    """Return log p(y) of each series by the Kalman filter."""
    decay, move, noise = float(params["decay"]), np.exp(float(params["log_move"])), float(options["noise"])
    mean, variance, found = np.zeros(len(y)), 0.0, np.zeros(len(y))
    for seen in y.T:
        mean, variance = decay * mean, decay**2 * variance + move**2
        total = variance + noise**2
        found += -0.5 * np.log(2 * np.pi * total) - 0.5 * (seen - mean) ** 2 / total
        mean, variance = mean + variance / total * (seen - mean), variance * (1 - variance / total)
    return found


def most_likely(options, y):
    """Return decay and log_move of the highest evidence."""
    from scipy.optimize import minimize

    def loss(x):
        return -log_evidence(options, {"decay": x[0], "log_move": x[1]}, y).sum()

    best = minimize(loss, [0.8, -1.0], method="Nelder-Mead").x
    return {"decay": best[0], "log_move": best[1]}


START = {"decay": 0.6, "log_move": 0.0, "keep": 0.5, "gain": 0.3, "log_spread": -0.5}


def program(ppl, dist, xp, array, loop):
    """Return model and guide, written once for both libraries; their loops over time differ."""

    def param(name):
        return ppl.param(name, array(START[name]))

    def model(y, noise):
        decay, move = param("decay"), xp.exp(param("log_move"))

        def step(name, z, now):
            with ppl.plate(name("series"), len(y)):
                z = ppl.sample(name("z"), dist.Normal(decay * z, move))
                ppl.sample(name("y"), dist.Normal(z, noise), obs=now[0])
            return z, None

        loop(step, 0 * y[:, 0], (y.T,))

    def guide(y):
        keep, gain, spread = param("keep"), param("gain"), xp.exp(param("log_spread"))

        def step(name, z, now):
            with ppl.plate(name("series"), len(y)):
                z = ppl.sample(name("z"), dist.Normal(keep * z + gain * now[0], spread))
            return z, None

        loop(step, 0 * y[:, 0], (y.T,))

    return model, guide


def _of_data(made, options):
    model, guide = made
    return (lambda y: model(y, float(options["noise"]))), guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from chains import markov_in_pyro

    made = program(pyro, dist, torch, lambda a: torch.tensor(a, dtype=torch.float32), markov_in_pyro)
    return _of_data(made, options)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from chains import scan_in_numpyro

    return _of_data(program(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), scan_in_numpyro), options)
