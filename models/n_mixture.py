"""Animals that are counted imperfectly: how many live at each place, when each visit overlooks some? (An N-mixture model.)

    N_i ~ Poisson(abundance),  count_ij ~ Binomial(N_i, detection)  on every visit j to place i

The latent count of a place is written as N_i = max_j count_ij + unseen_i, so that the guide never proposes fewer animals than were
seen at once. The guide draws unseen_i ~ Poisson, whose log rate is linear in the place's largest and mean count. Abundance and detection
are parameters of the model. The data are simulated, with abundance 6 and detection 0.4.
"""

import numpy as np

OPTIONS = {
    "places": 200,
    "visits": 4,
    "abundance": 6.0,  # of the simulation
    "detection": 0.4,  # of the simulation
}
DISCRETE = ("unseen",)
START = {"log_abundance": np.log(3.0), "detection_logit": 0.0, "log_rate": np.zeros(3)}


def load(options, seed):
    """Return simulated counts, a place in each row and a visit in each column: three quarters of the places, and the others."""
    if not 0 < float(options["detection"]) < 1:
        raise ValueError(f"detection is between 0 and 1; got {options['detection']}.")
    counts = simulate(options, seed)[1]
    train = len(counts) * 3 // 4
    return counts[:train], counts[train:]


def simulate(options, seed):
    """Return the number of animals at each place, and their counts on each visit."""
    rng = np.random.default_rng(seed)
    animals = rng.poisson(float(options["abundance"]), int(options["places"]))
    counts = rng.binomial(animals[:, None], float(options["detection"]), (len(animals), int(options["visits"])))
    return animals, counts.astype(np.float32)


def posterior(params, counts, most=100):
    """Return log p(counts of a place) in nats, and the probability of each number of animals there: a sum over that number."""
    from scipy.special import expit, logsumexp
    from scipy.stats import binom, poisson

    animals = np.arange(most)
    joint = binom.logpmf(counts[:, :, None], animals, expit(params["detection_logit"])).sum(1)
    joint = joint + poisson.logpmf(animals, np.exp(params["log_abundance"]))
    evidence = logsumexp(joint, axis=-1)
    return evidence, np.exp(joint - evidence[:, None])


def most_likely(counts):
    """Return the parameters of the model at which the counts are most probable."""
    from scipy.optimize import minimize

    names = ("log_abundance", "detection_logit")

    def loss(x):
        return -posterior(dict(zip(names, x, strict=True)), counts)[0].mean()

    return dict(zip(names, minimize(loss, [np.log(3.0), 0.0], method="Nelder-Mead").x, strict=True))


def guide_rates(params, counts):
    """Return the guide's mean number of animals that no visit saw, from its parameters."""
    a = params["log_rate"]
    return np.exp(a[0] + 0.1 * (a[1] * counts.max(-1) + a[2] * counts.mean(-1)))


def program(ppl, dist, xp, array, most_of):
    """Return model and guide, written once for both libraries; `most_of` returns the largest count of each row."""

    def param(name):
        return ppl.param(name, array(START[name]))

    def model(data):
        abundance, detection = param("log_abundance"), param("detection_logit")
        with ppl.plate("data", len(data)):
            # What the site's own law is here, the factor below says: that of all animals.
            unseen = ppl.sample("unseen", dist.ImproperUniform(dist.constraints.nonnegative_integer, (), ()))
            animals = most_of(data) + unseen
            ppl.factor("animals", dist.Poisson(xp.exp(abundance)).log_prob(animals))
            ppl.sample("count", dist.Binomial(animals[..., None], logits=detection).to_event(1), obs=data)

    def guide(data):
        a = param("log_rate")
        with ppl.plate("data", len(data)):
            ppl.sample("unseen", dist.Poisson(xp.exp(a[0] + 0.1 * (a[1] * most_of(data) + a[2] * data.mean(-1)))))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    return program(pyro, dist, torch, lambda a: torch.tensor(a, dtype=torch.float32), lambda x: x.amax(-1))


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), lambda x: x.max(-1))
