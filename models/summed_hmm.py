"""A hidden Markov model of counts whose chain is summed out: how often did the rate of coal-mining disasters change, and between what?

    which_stay ~ uniform over STAYS,  log_rates[k] ~ N(log center_k, spread²),
    z_1 uniform,  z_t = z_{t−1} with probability STAYS[which_stay], another state else,  count_t | z_t ~ Poisson(rate[z_t])

The guide draws the rates (normal in their logarithms) and which_stay (categorical). The chain `which_state` is summed out of the model exactly
("summed"): in `pyro.markov` in Pyro, in `scan` in NumPyro. Or the guide draws it from a learned chain q(z_t | z_{t−1}) of its own
("sampled"). The centers of the rates, from 3 down to 1, differ, so that the states have an order. The data are in
`coal.py`.
"""

import numpy as np
from coal import series

OPTIONS = {
    "states": 2,
    "spread": 0.5,  # of the logarithms of the rates, a priori
    "years": 112,
    "chain": "summed",  # or "sampled"
}
DISCRETE = ("which_*",)
WHOLE_DATA = True
STAYS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def load(options, seed):
    """Return the years at even and at odd places, two series in the order of time."""
    if options["chain"] not in ("summed", "sampled"):
        raise ValueError(f"chain is 'summed' or 'sampled'; got '{options['chain']}'.")
    if int(options["states"]) < 2 or not 4 <= int(options["years"]) <= 112:
        raise ValueError("states is at least 2, and years is 4 to 112.")
    data = series()[: int(options["years"])]
    return data[::2], data[1::2]


def centers(options):
    """Return the prior median of each state's rate."""
    return np.geomspace(3, 1, int(options["states"]))


def changes(options):
    """Return the matrix of probabilities of z_t given z_{t−1} for each of STAYS."""
    k, stay = int(options["states"]), np.array(STAYS)[:, None, None]
    return stay * np.eye(k) + (1 - stay) / (k - 1) * (1 - np.eye(k))


def smoothed(options, data, log_rates, which):
    """Return log p(counts | rates, which_stay) and the posterior of each year's state, by forward and backward messages.

    `log_rates` has shape (…, states), `which` shape (…); the posterior has shape (…, years, states).
    """
    from scipy.stats import poisson

    seen = poisson.pmf(data[:, 1, None], np.exp(log_rates)[..., None, :])
    change = changes(options)[which]
    forward, backward = np.empty_like(seen), np.ones_like(seen)
    log_prob, now = 0.0, np.full(log_rates.shape, 1 / log_rates.shape[-1])
    for t in range(len(data)):
        now = (now[..., None, :] @ change)[..., 0, :] if t else now
        now = now * seen[..., t, :]
        total = now.sum(-1, keepdims=True)
        log_prob, now = log_prob + np.log(total[..., 0]), now / total
        forward[..., t, :] = now
    for t in reversed(range(len(data) - 1)):
        later = (change @ (seen[..., t + 1, :] * backward[..., t + 1, :])[..., None])[..., 0]
        backward[..., t, :] = later / later.sum(-1, keepdims=True)
    state = forward * backward
    return log_prob, state / state.sum(-1, keepdims=True)


def exact(options, data, points=41):
    """Return the log evidence, the posterior of which_stay, and the posterior mean rate of each year.

    The chain is summed by messages, the rates are integrated over a grid of `points` in each log rate, six standard deviations
    of the prior to either side.
    """
    from scipy.special import logsumexp
    from scipy.stats import norm

    k, spread = int(options["states"]), float(options["spread"])
    axis, width = np.linspace(-6 * spread, 6 * spread, points, retstep=True)
    places = np.stack(np.meshgrid(*[axis] * k, indexing="ij"), -1).reshape(-1, k)
    prior = norm.logpdf(places, 0, spread).sum(-1) + k * np.log(width) - np.log(len(STAYS))
    log_rates = places + np.log(centers(options))
    joint, rates = [], []
    for which in range(len(STAYS)):
        log_prob, state = smoothed(options, data, log_rates, np.full(len(places), which))
        joint.append(prior + log_prob)
        rates.append((state * np.exp(log_rates)[:, None]).sum(-1))
    evidence = logsumexp(joint)
    weight = np.exp(np.array(joint) - evidence)
    return evidence, weight.sum(-1), np.einsum("wp,wpt->t", weight, np.array(rates))


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    k = int(options["states"])
    start = {
        "rates_loc": np.log(centers(options)),
        "rates_log_scale": np.full(k, np.log(0.2)),
        "stay": np.zeros(len(STAYS)),
    }
    if options["chain"] == "sampled":
        start["follow"] = np.broadcast_to(np.eye(k), (len(train), k, k)).copy()
    return start


def program(ppl, dist, xp, array, index, pick, loop, options, train, seed):
    """Return model and guide, written once for both libraries; `pick(table, z)` reads rows of a table that particles may have."""
    values = {name: array(value) for name, value in initial(options, train, seed).items()}
    summed = options["chain"] == "summed"
    even, center, log_changes = (
        array(np.zeros(len(STAYS))),
        array(np.log(centers(options))),
        array(np.log(changes(options))),
    )

    def param(name):
        return ppl.param(name, values[name])

    def model(x):
        log_rates = ppl.sample("log_rates", dist.Normal(center, float(options["spread"])).to_event(1))
        log_change = log_changes[ppl.sample("which_stay", dist.Categorical(logits=even))]
        infer = {"enumerate": "parallel"} if summed else None

        def step(name, z, now):
            later, count = now
            z = ppl.sample(name("which_state"), dist.Categorical(logits=later * pick(log_change, z)), infer=infer)
            ppl.sample(name("count"), dist.Poisson(xp.exp(pick(log_rates[..., None], z)[..., 0])), obs=count)
            return z, None

        # The first state is uniform, whatever the state before it.
        later = array((np.arange(x.shape[0]) > 0).astype(float))
        loop(step, index(array(0.0)), (later, x[:, 1]))

    def guide(x):
        ppl.sample("log_rates", dist.Normal(param("rates_loc"), xp.exp(param("rates_log_scale"))).to_event(1))
        ppl.sample("which_stay", dist.Categorical(logits=param("stay")))
        if not summed:

            def step(name, z, now):
                return ppl.sample(name("which_state"), dist.Categorical(logits=now[0][z])), None

            # A batch of test data may have another length than the train data.
            loop(step, index(array(0.0)), (param("follow")[: x.shape[0]],))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from chains import loop_in_pyro, markov_in_pyro
    from pyro.ops.indexing import Vindex

    def array(a):
        return torch.tensor(a, dtype=torch.get_default_dtype())

    def pick(table, k):
        return Vindex(table)[..., k, :]

    loop = markov_in_pyro if options["chain"] == "summed" else loop_in_pyro
    return program(pyro, dist, torch, array, torch.Tensor.long, pick, loop, options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from chains import scan_in_numpyro

    def pick(table, k):
        return table[k]

    return program(
        numpyro, dist, jnp, jnp.asarray, lambda x: x.astype(int), pick, scan_in_numpyro, options, train, seed
    )
