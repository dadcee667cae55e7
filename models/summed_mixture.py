"""A Gaussian mixture whose assignments are summed out, with a sampled choice of the shared spread, on the iris or the wine measurements.

    which_spread ~ uniform over SPREADS,  means ~ N(0, 3² I),
    p(x_i | means, which_spread) = Σ_k prior_k N(x_i; means[k], SPREADS[which_spread]²)

The guide draws the means and the spread, q(means) q(which_spread). The site `which_part` (the assignment k_i of each datum) is summed out of the model
exactly ("summed"), or is drawn in the guide from q(k_i | x_i) ("sampled"). All data share means and spread, so that every step sees the
whole train set.
"""

import numpy as np
from mixture import load as measurements

OPTIONS = {
    "components": 3,
    "data": "iris",  # "iris" or "wine", standardised
    "assignments": "summed",  # or "sampled"
}
DISCRETE = ("which_*",)
WHOLE_DATA = True
SPREADS = (0.3, 0.45, 0.6, 0.75, 0.9, 1.05)  # standard deviations within a component


def load(options, seed):
    """Return the standardised measurements, split into train and test."""
    if options["assignments"] not in ("summed", "sampled"):
        raise ValueError(f"assignments is 'summed' or 'sampled'; got '{options['assignments']}'.")
    return measurements(options, seed)


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries: means at random data."""
    rng = np.random.default_rng(seed)
    n, d = int(options["components"]), train.shape[1]
    return {
        "prior": np.zeros(n),
        "means_loc": train[rng.choice(len(train), n, replace=False)],
        "means_log_scale": np.full((n, d), -2.0),
        "spread": np.zeros(len(SPREADS)),
        "assign_w": np.zeros((d, n)),
        "assign_b": np.zeros(n),
    }


def joint(params, means, spread, x):
    """Return log p(x_i, k | means, spread) of each datum and component, for arrays of means (…, components, d) and spreads (…)."""
    from scipy.special import log_softmax

    spread = np.asarray(spread)[..., None, None]
    away = ((x[:, None] - means[..., None, :, :]) ** 2).sum(-1) / spread**2
    return log_softmax(params["prior"]) - 0.5 * away - x.shape[-1] * (np.log(spread) + 0.5 * np.log(2 * np.pi))


def bounds(params, x, rng, draws=200):
    """Return two bounds of log p(x_i | means, spread) per datum at draws of the guide: the sum over assignments, and that of q(k_i | x_i).

    The first is E_q[log Σ_k p(x_i, k | ·)], the second E_q[Σ_k q(k | x_i) (log p(x_i, k | ·) − log q(k | x_i))], at most as large; its sum
    over k is exact here.
    """
    from scipy.special import log_softmax, logsumexp, softmax

    noise = rng.normal(size=(draws, *params["means_loc"].shape))
    means = params["means_loc"] + np.exp(params["means_log_scale"]) * noise
    spread = rng.choice(SPREADS, size=draws, p=softmax(params["spread"].astype(float)))
    log_p = joint(params, means, spread, x)
    found = [logsumexp(log_p, -1).mean()]
    if "assign_w" in params:
        log_q = log_softmax(x @ params["assign_w"] + params["assign_b"], -1)
        found.append((np.exp(log_q) * (log_p - log_q)).sum(-1).mean())
    return found


def program(ppl, dist, xp, array, pick, options, train, seed):
    """Return model and guide, written once for both libraries; `pick(table, k)` reads rows of a table that particles may have."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    n, d = int(options["components"]), train.shape[1]
    summed = options["assignments"] == "summed"
    spreads, even = array(np.array(SPREADS)), array(np.zeros(len(SPREADS)))

    def param(name):
        return ppl.param(name, start[name])

    def model(x):
        means = ppl.sample("means", dist.Normal(array(np.zeros((n, d))), 3.0).to_event(2))
        spread = spreads[ppl.sample("which_spread", dist.Categorical(logits=even))]
        prior = param("prior")
        with ppl.plate("data", x.shape[0]):
            k = ppl.sample(
                "which_part", dist.Categorical(logits=prior), infer={"enumerate": "parallel"} if summed else None
            )
            ppl.sample("x", dist.Normal(pick(means, k), spread[..., None]).to_event(1), obs=x)

    def guide(x):
        ppl.sample("means", dist.Normal(param("means_loc"), xp.exp(param("means_log_scale"))).to_event(2))
        ppl.sample("which_spread", dist.Categorical(logits=param("spread")))
        if not summed:
            with ppl.plate("data", x.shape[0]):
                ppl.sample("which_part", dist.Categorical(logits=x @ param("assign_w") + param("assign_b")))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.ops.indexing import Vindex

    def array(a):
        return torch.tensor(a, dtype=torch.get_default_dtype())

    return program(pyro, dist, torch, array, lambda table, k: Vindex(table)[..., k, :], options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, dist, jnp, jnp.asarray, lambda table, k: table[k], options, train, seed)
