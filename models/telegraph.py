"""Gene expression in bursts: a promoter that switches on and off, and the number of mRNA molecules in each cell.

Two reactions switch the promoter, off → on at rate k_on and on → off at rate k_off; while on it makes mRNA at rate s, and each molecule is
lost at rate 1 (the unit of all rates). The stationary law has a closed form (Peccoud and Ycart 1995, Theor. Popul. Biol. 48):

    g ~ Bernoulli(k_on / (k_on + k_off)),  p | g ~ Beta(k_on + g, k_off + 1 − g),  n | p ~ Poisson(s p)

where g is the hidden promoter now and p the share of its recent past that it was on; summed over g and p it is the Beta-Poisson law. The
rates are parameters; the guide has a promoter and a share for each count, q(g | n) q(p | g, n). The cells are simulated, reaction by
reaction, so that the law is put to the test as well.
"""

import numpy as np

OPTIONS = {
    "cells": 3000,
    "k_on": 1.2,  # of the simulated cells, as are the next two
    "k_off": 2.4,
    "rate": 30.0,  # of transcription
}
DISCRETE = ("promoter",)


def simulate(cells, k_on, k_off, rate, rng, until=12.0):
    """Return the promoter and the mRNA count of each cell at a time, by Gillespie's algorithm for all cells at once."""
    on, count, clock = np.zeros(cells, bool), np.zeros(cells, int), np.zeros(cells)
    running = np.arange(cells)
    while len(running):
        switch = np.where(on[running], k_off, k_on)
        make, lose = rate * on[running], count[running]
        total = switch + make + lose
        clock[running] += rng.exponential(1 / total)
        running, keep = running[clock[running] < until], clock[running] < until
        which = rng.random(len(running)) * total[keep]
        switched = which < switch[keep]
        made = ~switched & (which < (switch + make)[keep])
        on[running] ^= switched
        count[running] += made.astype(int) - (~switched & ~made)
    return on, count


def load(options, seed):
    """Return the counts of the cells, a row each, split into train and test."""
    rng = np.random.default_rng(seed)
    cells = int(options["cells"])
    if cells < 10:
        raise ValueError(f"cells is at least 10; got {cells}.")
    _, counts = simulate(cells, options["k_on"], options["k_off"], options["rate"], rng)
    data = counts[:, None].astype(float)
    return data[: cells * 9 // 10], data[cells * 9 // 10 :]


def log_law(rates, counts):
    """Return log p(n) of the exact stationary law, rates = (k_on, k_off, s): the Beta-Poisson law, by Kummer's function."""
    from scipy.special import gammaln, hyp1f1

    k_on, k_off, s = rates
    # Kummer's transformation, with its positive argument, adds positive terms only.
    kummer = np.log(hyp1f1(k_off, k_on + k_off + counts, s)) - s
    ratio = gammaln(k_on + counts) - gammaln(k_on) + gammaln(k_on + k_off) - gammaln(k_on + k_off + counts)
    return counts * np.log(s) - gammaln(counts + 1) + ratio + kummer


def promoter_on(rates, counts):
    """Return the exact posterior probability that the promoter is on, given the count."""
    k_on, k_off, s = rates
    return k_on / (k_on + k_off) * np.exp(log_law((k_on + 1, k_off, s), counts) - log_law(rates, counts))


def most_likely(counts):
    """Return the rates (k_on, k_off, s) of maximal likelihood under the exact law, and the log likelihood per cell there."""
    from scipy.optimize import minimize

    values, times = np.unique(counts, return_counts=True)
    found = minimize(
        lambda log_rates: -(times @ log_law(np.exp(log_rates), values)) / len(counts),
        np.log([1.0, 1.0, values.max()]),
        method="Nelder-Mead",
        options={"xatol": 1e-5, "fatol": 1e-9, "maxiter": 4000},
    )
    return np.exp(found.x), -found.fun


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    counts = np.arange(int(train.max()) * 3 // 2 + 2)
    share = np.clip(counts / train.max(), 0.05, 0.9)
    shapes = np.stack([2 + counts, (2 + counts) * (1 / share - 1)], -1)
    return {
        "log_rates": np.log([1.0, 1.0, train.max()]),
        "see": 4 * share - 1,
        "log_shapes": np.log(np.stack([shapes, shapes])),
    }


def program(ppl, dist, xp, array, index, options, train, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    largest = len(start["see"]) - 1

    def param(name):
        return ppl.param(name, start[name])

    def model(x):
        k_on, k_off, rate = xp.exp(param("log_rates"))
        with ppl.plate("cells", x.shape[0]):
            g = ppl.sample("promoter", dist.Bernoulli(k_on / (k_on + k_off)))
            share = ppl.sample("share", dist.Beta(k_on + g, k_off + 1 - g))
            ppl.sample("count", dist.Poisson(rate * share), obs=x[:, 0])

    def guide(x):
        # A count that no train cell had uses the nearest of the table.
        n = index(x[:, 0].clip(0, largest))
        with ppl.plate("cells", x.shape[0]):
            g = ppl.sample("promoter", dist.Bernoulli(logits=param("see")[n]))
            off, on = xp.exp(param("log_shapes"))[:, n]
            shapes = off + g[..., None] * (on - off)
            ppl.sample("share", dist.Beta(shapes[..., 0], shapes[..., 1]))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    return program(
        pyro, dist, torch, lambda a: torch.tensor(a, dtype=torch.float32), torch.Tensor.long, options, train, seed
    )


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def index(n):
        return n.astype(int)

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), index, options, train, seed)
