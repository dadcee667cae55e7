"""A softmax lottery: n outcomes with known rewards, drawn with probabilities π_k ∝ exp(θ_k).

    k ~ π,   E_π[r] = Σ_k π_k r_k,   ∇_θj E_π[r] = π_j (r_j − E_π[r])

Use it with `--objective 'Expectation()'`, which is E_π[r] alone; under the ELBO it is E_π[r] + H(π) − log n, whose optimum is
softmax(r). A datum is one round, the rewards of all outcomes, of which only the drawn one's is paid.
"""

import numpy as np

OPTIONS = {
    "outcomes": 4,
    "rounds": 16,
    "noise": 0.0,  # standard deviation of a round's rewards about the outcomes' own
}
DISCRETE = ("k",)


def rewards(outcomes):
    """Return the outcomes' own rewards: 10 for the first, 11 for the last, so that a baseline has work to do."""
    return np.linspace(10.0, 11.0, int(outcomes))


def load(options, seed):
    """Return the rounds' rewards, train and test."""
    rng = np.random.default_rng(seed)
    n, rounds = int(options["outcomes"]), int(options["rounds"])
    if n < 2:
        raise ValueError(f"a lottery has two outcomes or more; got {n}.")
    noise = float(options["noise"]) * rng.normal(size=(2, rounds, n))
    return tuple(rewards(n) + noise)


def program(ppl, dist, array, start):
    """Return model and guide, written once for both libraries."""

    def model(x):
        with ppl.plate("rounds", x.shape[0]):
            k = ppl.sample("k", dist.Categorical(logits=array(np.zeros(x.shape[1]))))
            # A vectorized particle dimension stands left of the rounds'.
            paid = (x * (k[..., None] == array(np.arange(x.shape[1])))).sum(-1)
            ppl.factor("reward", paid)

    def guide(x):
        logits = ppl.param("logits", array(start))
        with ppl.plate("rounds", x.shape[0]):
            ppl.sample("k", dist.Categorical(logits=logits))

    return model, guide


def initial(options):
    """Return the initial θ: not the fair lottery."""
    return np.linspace(0.5, -0.5, int(options["outcomes"]))


def pyro_program(options, train, seed, start=None):
    """Return model and guide for Pyro; `start` holds the first θ, (n,), or (rounds, n) with one lottery for each round."""
    import pyro
    import pyro.distributions as dist
    import torch

    start = initial(options) if start is None else start
    return program(pyro, dist, lambda a: torch.tensor(a, dtype=torch.get_default_dtype()), start)


def numpyro_program(options, train, seed, start=None):
    """Return model and guide for NumPyro; `start` holds the first θ, (n,), or (rounds, n) with one lottery for each round."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    start = initial(options) if start is None else start
    return program(numpyro, dist, lambda a: jnp.asarray(a, float), start)
