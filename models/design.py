"""Experiment design: which experiment tells most about its unknown θ, by the expected information gain.

    I(d) = E[log q(θ | y, d) − log p(θ)],  θ ~ p(θ),  y ~ p(y | θ, d),

which is the mutual information of θ and y if q is the posterior, and a lower bound of it else (Barber and Agakov 2003). The
design d and the outcome y are sites of the guide, the integrand is a `factor`, and the objective is `Expectation()`. A datum is
one θ from the prior. Two problems whose answers are known (`information`):

- "trial": n of 8 patients get the new treatment and the others the old one, whose effect is better known; n is discrete, a site
  with a policy; outcomes are group means with normal noise, and q is a learned normal.
- "decay": n photons are counted, once, at a time d after the pulse, from a substance with one of a few decay rates θ; d is
  continuous, a parameter; counts are Poisson, which no reparameterization differentiates, and q is Bayes' rule.

Under `ELBO()` the policy gets an entropy bonus of one nat per nat, and counts of "decay" are drawn towards those at time zero.
"""

import numpy as np

OPTIONS = {
    "problem": "trial",  # "trial": a discrete design; "decay": a continuous one
    "patients": 8,  # in the trial
    "photons": 30.0,  # expected at time zero of the decay
    "start": 0.5,  # the first guess of the time, in seconds
}
DISCRETE = ("n",)
SPREADS = np.array([3.0, 1.2])  # prior standard deviations of the effects: of the new treatment, of the old one
NOISE = 2.0  # standard deviation of one patient's outcome
RATES = np.array([0.2, 0.4, 0.8, 1.6])  # per second, equally probable


def load(options, seed):
    """Return unknowns from the prior: effects of the trial, standardised as the prior says, or each decay rate as often."""
    if options["problem"] == "decay":
        return np.tile(RATES, 256)[:, None], np.tile(RATES, 64)[:, None]
    if options["problem"] != "trial":
        raise ValueError(f"problem is 'trial' or 'decay'; got '{options['problem']}'.")
    rng = np.random.default_rng(seed)
    return tuple(SPREADS * _white(rng.normal(size=(n, 2))) for n in (1024, 256))


def _white(x):
    """Return numbers whose mean is 0 and whose covariance is 1, so that the prior is met exactly."""
    x = x - x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / len(x))).T


def designs(options):
    """Return the designs of the trial, or a grid of times in seconds."""
    if options["problem"] == "trial":
        return np.arange(1, int(options["patients"]))
    return np.linspace(0.02, 6.0, 300)


def information(options, d=None):
    """Return the exact information gain at some designs, at those of `designs` by default, in nats.

    Trial: Σ_group ½ log(1 + n s² / σ²). Decay: the mutual information of rate and count, a finite sum.
    """
    from scipy.stats import poisson

    d = designs(options) if d is None else d
    if options["problem"] == "trial":
        sizes = np.stack([d, int(options["patients"]) - d], -1)
        return 0.5 * np.log1p(sizes * SPREADS**2 / NOISE**2).sum(-1)
    counts = np.arange(int(options["photons"] + 10 * np.sqrt(options["photons"]) + 10))
    p = poisson.pmf(counts, options["photons"] * np.exp(-RATES[:, None, None] * d[:, None]))
    marginal = p.mean(0)
    ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)
    return (p * np.log(ratio)).sum(-1).mean(0)


def trial(ppl, dist, xp, array, options):
    """Return model and guide of the trial: a policy over n, and a normal posterior for each n."""
    sizes = array(np.stack([designs(options), int(options["patients"]) - designs(options)], -1))
    prior = dist.Normal(array(np.zeros(2)), array(SPREADS))
    zeros = np.zeros(tuple(sizes.shape))

    def outcome(theta, n):
        return dist.Normal(theta, NOISE / xp.sqrt(sizes[n])).to_event(1)

    def model(theta):
        slope = ppl.param("slope", array(zeros))
        log_scale = ppl.param("log_scale", array(zeros + np.log(SPREADS)))
        with ppl.plate("experiments", theta.shape[0]):
            n = ppl.sample("n", dist.Categorical(logits=array(zeros[:, 0])))
            y = ppl.sample("y", outcome(theta, n))
            posterior = dist.Normal(slope[n] * y, xp.exp(log_scale[n]))
            ppl.factor("gain", (posterior.log_prob(theta) - prior.log_prob(theta)).sum(-1))

    def guide(theta):
        policy = ppl.param("policy", array(zeros[:, 0]))
        with ppl.plate("experiments", theta.shape[0]):
            n = ppl.sample("n", dist.Categorical(logits=xp.zeros_like(theta[:, :1]) + 0.3 * policy))
            ppl.sample("y", outcome(theta, n))

    return model, guide


def decay(ppl, dist, xp, array, options):
    """Return model and guide of the decay: a time to count at, and Bayes' rule over the rates."""
    photons, start = float(options["photons"]), array(np.array(np.log(options["start"])))

    def model(theta):
        time = xp.exp(ppl.param("log_time", start))
        with ppl.plate("experiments", theta.shape[0]):
            n = ppl.sample("n", dist.Poisson(xp.zeros_like(theta[:, 0]) + photons))
            each = dist.Poisson(photons * xp.exp(-time * array(RATES))).log_prob(n[..., None])
            of_truth = dist.Poisson(photons * xp.exp(-time * theta[:, 0])).log_prob(n)
            ppl.factor("gain", -xp.log(xp.exp(each - of_truth[..., None]).mean(-1)))

    def guide(theta):
        time = xp.exp(ppl.param("log_time", start))
        with ppl.plate("experiments", theta.shape[0]):
            ppl.sample("n", dist.Poisson(photons * xp.exp(-time * theta[:, 0])))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    made = {"trial": trial, "decay": decay}[options["problem"]]
    return made(pyro, dist, torch, lambda a: torch.tensor(a, dtype=torch.float32), options)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    made = {"trial": trial, "decay": decay}[options["problem"]]
    return made(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), options)
