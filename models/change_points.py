"""Change points in a series of counts: when did the rate of coal-mining disasters change, and to what?

    c_1 < … < c_K uniform over the years,  rate_k ~ Gamma(shape, 1/mean scale),  count_t ~ Poisson(rate of t's segment)

A segment starts in the year of its change point. The guide draws the change points one after the other, each from a table over the
years restricted to those after the last one, and then the rates: from their exact posterior given the change points, a gamma
("conditional"), or from learned gammas that know nothing of them ("independent"). All years share the latents, so that
every step sees the whole train set.

The data are in `coal.py`.
"""

from itertools import combinations
from math import comb

import numpy as np
from coal import series

OPTIONS = {
    "changes": 1,
    "shape": 1.0,  # of the rates' gamma prior
    "inverse_scale": 1.0,  # of the rates' gamma prior, in years
    "rates": "conditional",  # or "independent": how the guide draws the rates
}
DISCRETE = ("change_*",)
WHOLE_DATA = True
NEVER = -1e4  # the logit of a year that a change point cannot have: finite, so that no gradient is NaN


def load(options, seed):
    """Return 90 of the years and the other 22, at random."""
    from sklearn.model_selection import train_test_split

    if options["rates"] not in ("conditional", "independent"):
        raise ValueError(f"rates is 'conditional' or 'independent'; got '{options['rates']}'.")
    if int(options["changes"]) < 1:
        raise ValueError(f"changes is at least 1; got {options['changes']}.")
    return train_test_split(series(), test_size=22, random_state=seed)


def exact_posterior(options, data):
    """Return all change points (a row each), their posterior probabilities, and the log evidence.

    The rates are summed out in closed form: a segment of n years with s disasters has evidence
    b^a / Γ(a) · Γ(a + s) / (b + n)^(a + s) / Π count!.
    """
    from scipy.special import gammaln, logsumexp

    a, b = float(options["shape"]), float(options["inverse_scale"])
    places = np.array(list(combinations(range(1, len(series())), int(options["changes"]))))
    segment = np.sum(data[:, 0] >= places[..., None], 1)
    joint = -np.log(len(places)) - gammaln(data[:, 1] + 1).sum()
    for k in range(places.shape[1] + 1):
        n, s = np.sum(segment == k, -1), np.sum((segment == k) * data[:, 1], -1)
        joint = joint + a * np.log(b) - gammaln(a) + gammaln(a + s) - (a + s) * np.log(b + n)
    evidence = logsumexp(joint)
    return places, np.exp(joint - evidence), evidence


def guide_probabilities(params, places):
    """Return the guide's probability of each row of change points, from its parameters by name."""
    from scipy.special import log_softmax

    when, log_q = params["when"] + uniform_logits(*params["when"].shape), np.zeros(len(places))
    for k in range(places.shape[1]):
        last = places[:, k - 1, None] if k else np.full((len(places), 1), -1)
        logits = when[k] + np.where(np.arange(when.shape[1]) > last, 0.0, NEVER)
        log_q += log_softmax(logits, -1)[np.arange(len(places)), places[:, k]]
    return np.exp(log_q)


def mean_rates(options, data, places, probabilities):
    """Return the posterior mean rate of each year of the data, given the probabilities of the change points."""
    a, b = float(options["shape"]), float(options["inverse_scale"])
    segment, rates = np.sum(data[:, 0] >= places[..., None], 1), 0.0
    for k in range(places.shape[1] + 1):
        within = segment == k
        mean = (a + np.sum(within * data[:, 1], -1)) / (b + np.sum(within, -1))
        rates = rates + (probabilities * mean) @ within
    return rates


def uniform_logits(changes, years):
    """Return log p(c_k = year | …) of the uniform law over increasing change points, up to what is constant in the year."""
    left = [[comb(years - 1 - year, changes - 1 - k) for year in range(years)] for k in range(changes)]
    possible = np.array(left, float)
    possible[:, 0] = 0
    return np.where(possible > 0, np.log(np.maximum(possible, 1)), NEVER)


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    changes = int(options["changes"])
    start = {"when": np.zeros((changes, len(series())))}
    if options["rates"] == "independent":
        mean = train[:, 1].mean()
        start |= {
            "log_shape": np.full(changes + 1, np.log(10.0)),
            "log_inverse": np.full(changes + 1, np.log(10 / mean)),
        }
    return start


def program(ppl, dist, xp, array, options, train, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    changes, years = start["when"].shape
    a, b = float(options["shape"]), float(options["inverse_scale"])
    order, year = array(uniform_logits(changes, years)), array(np.arange(years))

    def param(name):
        return ppl.param(name, start[name])

    def change_points(logits):
        drawn = []
        for k in range(changes):
            last = drawn[-1][..., None] if drawn else -1
            drawn.append(
                ppl.sample(f"change_{k}", dist.Categorical(logits=logits[k] + xp.where(year > last, 0.0, NEVER)))
            )
        return xp.stack(drawn, -1)

    def segments(data, places):
        """Return which segment each year is in, as ones and zeros, the segments last."""
        number = (data[:, 0, None] >= places).sum(-1)
        return 1.0 * (number[..., None] == xp.arange(changes + 1))

    def model(data):
        places = change_points(order)
        rate = ppl.sample("rate", dist.Gamma(array(np.full(changes + 1, a)), array(b)).to_event(1))
        with ppl.plate("data", len(data)):
            mean = (segments(data, places) * rate).sum(-1)
            ppl.sample("count", dist.Poisson(mean), obs=data[:, 1])

    def guide(data):
        places = change_points(order + param("when"))
        if options["rates"] == "independent":
            shape, inverse = xp.exp(param("log_shape")), xp.exp(param("log_inverse"))
        else:
            # A vectorized particle dimension stands left of that of the years.
            of, particles = segments(data, places), places.ndim > 1
            shape = a + (of * data[:, 1, None]).sum(-2, keepdims=particles)
            inverse = b + of.sum(-2, keepdims=particles)
        ppl.sample("rate", dist.Gamma(shape, inverse).to_event(1))

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
