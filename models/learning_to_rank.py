"""Learning to rank: which of five patients will worsen most? A policy over rankings, whose reward is the gain of the whole order.

Each datum is a group of patients: ten measurements of each, and how far the disease went within a year (scikit-learn's diabetes data,
Efron et al. 2004). The guide draws a ranking from Plackett-Luce with logits linear in the measurements. The reward is the normalised
discounted cumulative gain (Järvelin and Kekäläinen 2002),

    NDCG = Σ_i gain(π_i) / log2(1 + i)  /  the same sum in the best order,

where the gain of a patient is 2^progression − 1, progression scaled to 0 … 3. It jumps from one order to another and has no derivative
that says anything. The objective is `Expectation()`.
"""

import numpy as np

OPTIONS = {
    "group": 5,  # patients in a group: up to 6 have few enough rankings to sum over
    "ranking": "numbers",  # "numbers": of the patients in order; "matrix": a permutation matrix, at which a reward has a derivative
}
DISCRETE = ("ranking",)


def load(options, seed):
    """Return groups of patients in random order, (groups, patients * 11): the measurements and then the gain of each; four fifths, and the others."""
    from sklearn.datasets import load_diabetes

    size = int(options["group"])
    if size < 2:
        raise ValueError(f"group is the number of patients in a group, 2 or more; got {size}.")
    if options["ranking"] not in ("numbers", "matrix"):
        raise ValueError(f"ranking is 'numbers' or 'matrix'; got '{options['ranking']}'.")
    data = load_diabetes()
    progression = 3 * (data.target - data.target.min()) / np.ptp(data.target)
    rows = np.column_stack([data.data / data.data.std(0), 2**progression - 1])
    rows = np.random.default_rng(seed).permutation(rows)[: len(rows) // size * size]
    groups = rows.reshape(-1, size * 11).astype(np.float32)
    return groups[: len(groups) * 4 // 5], groups[len(groups) * 4 // 5 :]


def parts(groups):
    """Return the measurements (groups, patients, 10) and the gains (groups, patients)."""
    rows = groups.reshape(len(groups), -1, 11)
    return rows[..., :10], rows[..., 10]


def discounts(size):
    """Return what a place in the order counts for."""
    return 1 / np.log2(2 + np.arange(size))


def ndcg(scores, gains):
    """Return the reward of ordering each group by a score, the highest first: from 0 to 1, with no unit."""
    by_score = np.take_along_axis(np.broadcast_to(gains, scores.shape), np.argsort(-scores, -1), -1)
    return (by_score @ discounts(gains.shape[-1])) / (-np.sort(-gains, -1) @ discounts(gains.shape[-1]))


def in_order(gains, matrix):
    """Return the gains in the order of a permutation matrix."""
    return (matrix * gains[..., None, :]).sum(-1)


def program(ppl, law, xp, array, pick, sort):
    """Return model and guide, written once for both libraries: `pick` takes the gains in an order, `sort` sorts them, the highest first."""

    def model(data):
        gains = data.reshape(len(data), -1, 11)[..., 10]
        discount = array(discounts(gains.shape[-1]))
        with ppl.plate("data", len(data)):
            ranking = ppl.sample("ranking", law(xp.zeros_like(gains)))
            reward = (pick(gains, ranking) * discount).sum(-1) / (sort(gains) * discount).sum(-1)
            ppl.factor("reward", reward)

    def guide(data):
        measured = data.reshape(len(data), -1, 11)[..., :10]
        weights = ppl.param("weights", array(np.zeros(10)))
        with ppl.plate("data", len(data)):
            ppl.sample("ranking", law((measured * weights).sum(-1)))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import torch

    from pplgrad.pyro import PermutationMatrix, PlackettLuce

    def pick(gains, ranking):
        return gains.expand(ranking.shape).gather(-1, ranking)

    def array(a):
        return torch.tensor(a, dtype=torch.float32)

    law, pick = (PlackettLuce, pick) if options["ranking"] == "numbers" else (PermutationMatrix, in_order)
    return program(pyro, law, torch, array, pick, lambda x: x.sort(-1, descending=True).values)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro

    from pplgrad.numpyro import PermutationMatrix, PlackettLuce

    def pick(gains, ranking):
        return jnp.take_along_axis(gains, ranking, -1)

    def array(a):
        return jnp.asarray(a, jnp.float32)

    law, pick = (PlackettLuce, pick) if options["ranking"] == "numbers" else (PermutationMatrix, in_order)
    return program(numpyro, law, jnp, array, pick, lambda x: -jnp.sort(-x, axis=-1))
