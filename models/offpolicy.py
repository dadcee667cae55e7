"""A policy learned from decisions that another policy made, with and without a hidden cause of decision and reward.

A patient with context x and hidden health u ~ Bernoulli(½) gets an arm a, and the reward r(a, x, u) = m_a + s_a x + u/2.

    source = "own"       a ~ π_θ(a | x)       reward r                            the policy's own decisions
    source = "known"     a ~ β(a | x, u)      reward r π_θ(a | x) / β(a | x, u)   logged, propensities known
    source = "hidden"    a ~ β(a | x, u)      reward r π_θ(a | x) / β(a | x)      logged without u: β(a | x) is its marginal

All of them are meant to be E[r] under π_θ, whose gradient is E[r w ∇ log π_θ] with the importance weight w; the third is not, where
`confounding` is not 0: doctors who see u give the worst arm to the healthiest. Use it with `--objective 'Expectation()'`. A
datum is the context of one patient.
"""

import numpy as np

OPTIONS = {
    "source": "known",
    "confounding": 1.5,  # how strongly the logged decisions follow u
    "patients": 16,
}
DISCRETE = ("u", "a")
MEANS, SLOPES = np.array([0.35, 0.30, 0.15]), np.array([0.0, 0.2, 0.0])
HEALTH = 0.5
SOURCES = ("own", "known", "hidden")


def load(options, seed):
    """Return the contexts, one a row, train and test the same."""
    if options["source"] not in SOURCES:
        raise ValueError(f"source is one of {', '.join(SOURCES)}; got '{options['source']}'.")
    contexts = np.linspace(-1.0, 1.0, int(options["patients"]))[:, None]
    return contexts, contexts


def behaviour(options):
    """Return β(a | u), which does not depend on x, as an array (u, arms)."""
    logits = float(options["confounding"]) * np.array([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def program(ppl, dist, xp, array, options, start):
    """Return model and guide, written once for both libraries."""
    source = options["source"]
    logged = behaviour(options)
    # What is believed of the logged decisions: without u, the mean over its two values.
    believed = logged if source == "known" else np.stack([logged.mean(0)] * 2)

    def policy(x):
        """Return log π(a | x) of all arms; θ holds an intercept and a slope for each."""
        theta = ppl.param("theta", array(start))
        logits = theta[..., 0] + theta[..., 1] * x
        return logits - xp.log(xp.exp(logits).sum(-1))[..., None]

    def at(table, u):
        """Return the row of a table (u, arms) for each patient."""
        low, high = array(table)
        return low + (high - low) * u[..., None]

    def chosen(numbers, a):
        """Return the number of the arm that each patient got."""
        return (numbers * (a[..., None] == array(np.arange(3)))).sum(-1)

    def model(x):
        with ppl.plate("patients", x.shape[0]):
            u = ppl.sample("u", dist.Bernoulli(array(0.5)))
            a = ppl.sample("a", dist.Categorical(logits=array(np.zeros(3))))
            reward = chosen(array(MEANS) + array(SLOPES) * x, a) + HEALTH * u
            if source != "own":
                weight = xp.exp(chosen(policy(x), a)) / chosen(at(believed, u), a)
                reward = reward * weight
            ppl.factor("reward", reward)

    def guide(x):
        with ppl.plate("patients", x.shape[0]):
            u = ppl.sample("u", dist.Bernoulli(array(0.5)))
            # θ is the guide's whatever the source, so that the lab sees the policy's gradient.
            own = policy(x)
            logits = own if source == "own" else xp.log(at(logged, u))
            ppl.sample("a", dist.Categorical(logits=logits))

    return model, guide


def initial():
    """Return the first θ: the fair policy."""
    return np.zeros((3, 2))


def pyro_program(options, train, seed, start=None):
    """Return model and guide for Pyro; `start` holds the first θ, (arms, 2), or (patients, arms, 2) with one for each."""
    import pyro
    import pyro.distributions as dist
    import torch

    def array(a):
        return torch.tensor(a, dtype=torch.get_default_dtype())

    return program(pyro, dist, torch, array, options, initial() if start is None else start)


def numpyro_program(options, train, seed, start=None):
    """Return model and guide for NumPyro; `start` holds the first θ, (arms, 2), or (patients, arms, 2) with one for each."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    start = initial() if start is None else start
    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, float), options, start)
