"""Evolution strategies: a normal search distribution over the input of a function that can only be evaluated.

    x_i ~ N(μ, σ² I),   reward −(f(x_i) − b) / s,   maximise its expectation over μ and log σ

f runs in NumPy, as a `black_box` outside of either library's automatic differentiation. b and s are the datum: the mean and the
spread of f that are known from before the draw (0 and 1 to begin with). A baseline and a positive factor change no direction, and make steps of
one size whatever f's. Use it with `--objective 'Expectation()'`.
"""

import numpy as np

OPTIONS = {
    "function": "steps",  # or "rastrigin"
    "dimensions": 6,
    "population": 16,
    "sigma": 0.5,
}
DISCRETE = ("x",)


def optimum(dimensions):
    """Return where both functions are least, at 0."""
    return np.linspace(-1.0, 1.0, int(dimensions))


def steps(x):
    """Return a bowl of flat steps: its derivative is 0 wherever there is one. x is (..., dimensions)."""
    gap = np.asarray(x, float) - optimum(np.shape(x)[-1])
    return (np.ceil(np.maximum(np.abs(gap) - 0.05, 0.0) * 10) ** 2).sum(-1) / 100


def rastrigin(x):
    """Return a bowl with a cosine on it: 11 local optima in every unit of each coordinate's range of 11."""
    gap = np.asarray(x, float) - optimum(np.shape(x)[-1])
    return (gap**2 + 1 - np.cos(2 * np.pi * gap)).sum(-1)


FUNCTIONS = {"steps": steps, "rastrigin": rastrigin}


def load(options, seed):
    """Return a population's (b, s), one row for each member, train and test the same."""
    if options["function"] not in FUNCTIONS:
        raise ValueError(f"function is one of {', '.join(FUNCTIONS)}; got '{options['function']}'.")
    rows = np.tile([0.0, 1.0], (int(options["population"]), 1))
    return rows, rows


def initial(options):
    """Return the first μ and log σ."""
    return {"mu": np.zeros(int(options["dimensions"])), "log_sigma": np.log(float(options["sigma"]))}


def program(ppl, dist, xp, array, black_box, options):
    """Return model and guide, written once for both libraries."""
    start, function = initial(options), FUNCTIONS[options["function"]]

    def model(known):
        with ppl.plate("population", known.shape[0]):
            x = ppl.sample("x", dist.Normal(array(np.zeros(len(start["mu"]))), 10.0).to_event(1))
            ppl.factor("reward", -(black_box(function, x, event_dim=1) - known[:, 0]) / known[:, 1])

    def guide(known):
        mu, log_sigma = (ppl.param(name, array(value)) for name, value in start.items())
        with ppl.plate("population", known.shape[0]):
            ppl.sample("x", dist.Normal(mu, xp.exp(log_sigma)).to_event(1))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    from pplgrad.pyro import black_box

    def array(a):
        return torch.tensor(a, dtype=torch.get_default_dtype())

    return program(pyro, dist, torch, array, black_box, options)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from pplgrad.numpyro import black_box

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, float), black_box, options)
