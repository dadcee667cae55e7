"""What subsets and rankings are tested on, the same in both libraries, with right values from NumPy alone."""

import itertools

import numpy as np

from pplgrad import (
    IMLE,
    REBAR,
    RELAX,
    SIMPLE,
    Enumerate,
    LeaveOneOut,
    LocalExpectation,
    ScoreFunction,
    SumAndSample,
    UnorderedSet,
)
from pplgrad.core import structures
from pplgrad.core.noise import Noise
from pplgrad.estimators import perturbed
from pplgrad.testing.programs import Case
from tests.summing import SUM, case
from tests.summing import program as both_ways

EXACT = {
    "score": (ScoreFunction(), 1),
    "leave-one-out": (ScoreFunction(LeaveOneOut()), 2),
    "draws again": (ScoreFunction(samples=2), 1),
    "local-expectation": (LocalExpectation(), 1),
    "sum-and-sample": (SumAndSample(), 1),
    "unordered-set": (UnorderedSet(2), 1),
    "enumerate": (Enumerate(), 1),
}
"""Unbiased estimators that a subset or a ranking may have, and the particles that they are proved with."""

NETWORK = RELAX(0.5, through_cost=False, hidden=4)
"""It needs neither a relaxed value nor a derivative of the cost."""
MATRIX = {
    "score": (ScoreFunction(), 1),
    "leave-one-out": (ScoreFunction(LeaveOneOut()), 2),
}
"""Estimators of permutation matrices, which are not listed, with finite noise."""
MATRIX_RANDOM = {
    "rebar": REBAR(0.5, 0.8, learn=False),
    "rebar-warm": REBAR(2.0, learn=True),
    "relax": RELAX(0.5, hidden=4),
    "relax-alone": NETWORK,
}
NETWORK_ON = ["subset", "ranking", "ranking_plate", "categorical_index"]

LOGITS = np.array([0.4, -0.9, 1.1, 0.2])
PRIOR = np.array([-0.3, 0.5, 0.1, 0.8])
WEIGHTS = np.array([1.0, -0.7, 0.5, 0.3])
LAWS = [(1, 1), (3, 3), (4, 1), (5, 2)]
"""Sizes n and k of subsets."""


def vectors(n, k):
    """Return all binary vectors of length n with k ones."""
    return np.array([z for z in itertools.product((0.0, 1.0), repeat=n) if sum(z) == k])


def law(logits, k):
    """Return all subsets, and their probabilities."""
    values = vectors(len(logits), k)
    with np.errstate(invalid="ignore"):
        mass = np.exp(np.where(values > 0, logits, 0.0).sum(-1))
    return values, mass / mass.sum()


def covariance(logits, k):
    """Return the mean of a subset, and its covariance."""
    values, probs = law(logits, k)
    mean = probs @ values
    return mean, np.einsum("c,ci,cj->ij", probs, values, values) - np.outer(mean, mean)


def some_logits(n, impossible, seed=0):
    """Return logits of two rows, in one of which an item is never chosen."""
    logits = 2.0 * np.random.default_rng(seed + n).normal(size=(2, n))
    if impossible:
        logits[1, 0] = -np.inf
    return logits


def rankings(logits):
    """Return all rankings, and their log probabilities, item by item."""
    orders = np.array(list(itertools.permutations(range(len(logits)))))
    log_probs = [
        sum(logits[i] - np.log(np.exp(logits[list(order[place:])]).sum()) for place, i in enumerate(order))
        for order in orders
    ]
    return orders, np.array(log_probs)


def program(h):
    """Return a program whose guide alone has the parameter, with a cost that is linear in no item."""

    def model():
        z = h.sample("z", h.subset(2, h.array(PRIOR)))
        h.factor("f", -(h.xp.sum(z * h.array(WEIGHTS), axis=-1) ** 2) - z[..., 0] * z[..., 1] ** 3)

    def guide():
        h.sample("z", h.subset(2, h.param("a", h.array(LOGITS))))

    return model, guide


CASE = Case("relaxed_subset", {"a": LOGITS}, {"z": ((), 6)}, program, vectors={"z": structures.subsets(4, 2)})


def slope(z):
    """Return the derivative of the loss with respect to the draw."""
    own = np.array([z[1] ** 3, 3 * z[0] * z[1] ** 2, 0.0, 0.0])
    return LOGITS - PRIOR + 2 * (z @ WEIGHTS) * WEIGHTS + own


def expected(estimator):
    """Return the expected gradient of the loss, by the estimators' formulas; the noise is that of `FixedNoise`."""
    values, probs = law(LOGITS, 2)
    mean, cov = covariance(LOGITS, 2)
    if isinstance(estimator, SIMPLE):
        return sum(p * (z - mean + cov @ slope(z)) for z, p in zip(values, probs, strict=True))
    return sum(p * (z - mean + by_two_maps(z, estimator.lam)) for z, p in zip(values, probs, strict=True))


UNIFORM = np.array([0.3, 0.8, 0.55, 0.1])


def by_two_maps(z, lam):
    """Return IMLE's gradient, with Gumbel numbers cut off by the inverse of their distribution function."""
    gumbel = LOGITS - np.log(-np.log(UNIFORM))
    top = gumbel[z == 0].max()
    least = np.exp(-np.exp(LOGITS - top))
    # The noise counts from the largest down: a uniform number u is that of the exponential 1 - u.
    above = LOGITS - np.log(-np.log(1 - UNIFORM * (1 - least)))
    perturbed = np.where(z > 0, above, gumbel)
    moved = np.zeros(4)
    moved[np.argsort(-(perturbed - lam * slope(z)))[:2]] = 1.0
    return (z - moved) / lam


class FixedNoise(Noise):
    """Noise that is always the same."""

    def uniform(self, shape, like):
        return self.ops.xp.broadcast_to(self.ops.constant(UNIFORM, like), shape)


def fixed_noise(site, ops):
    return FixedNoise(ops)


RELAXED = {"simple": SIMPLE(), "imle": IMLE(0.7), "imle-far": IMLE(5.0)}


def summed_out(h):
    """A subset, and a ranking whose logits follow it, that are summed out of the model, under a decision that the guide draws."""
    made = case({"w": ((), 2)}, {"a": 0.3, "t": LOGITS, "s": [0.2, -0.4, 0.1]})
    gains, weights = h.array([1.0, -0.7, 0.5]), h.array(WEIGHTS)

    def start():
        w = h.sample("w", h.dist.Bernoulli(h.array(0.4)))
        return w, h.param("t", h.array(LOGITS)) * (1 + w), h.param("s", h.array(made.params["s"]))

    def summed():
        w, t, s = start()
        z = h.sample("z", h.subset(2, t), infer=dict(SUM))
        r = h.sample("r", h.ranking(s + z[..., :3]), infer=dict(SUM))
        h.sample("x", h.dist.Normal(h.xp.sum(z * weights, axis=-1) + gains[r[..., 0]] + w, 1.0), obs=h.array(0.7))

    def by_hand():
        w, t, s = start()
        joint = []
        for z in vectors(4, 2):
            among = [h.xp.sum(t * h.array(other)) for other in vectors(4, 2)]
            prior = h.xp.sum(t * h.array(z)) - h.xp.log(h.xp.sum(h.xp.exp(h.xp.stack(among))))
            logits = s + h.array(z[:3])
            for r in itertools.permutations(range(3)):
                steps = [logits[r[i]] - h.xp.log(sum(h.xp.exp(logits[j]) for j in r[i:])) for i in range(3)]
                loc = float(z @ WEIGHTS) + gains[r[0]] + w
                joint.append(prior + sum(steps) + h.dist.Normal(loc, 1.0).log_prob(h.array(0.7)))
        h.factor("x", h.xp.log(h.xp.sum(h.xp.exp(h.xp.stack(joint)))))

    def guide():
        h.sample("w", h.dist.Bernoulli(logits=h.param("a", h.array(0.3))))

    return both_ways(summed, by_hand, guide, made)


MUTANTS = {}


def mutant(apply):
    MUTANTS[apply.__name__] = apply
    return apply


@mutant
def the_recursion_counts_one_half_twice(patch):
    plain = structures._joint
    patch.setattr(structures, "_joint", lambda ops, left, right, wide: plain(ops, left, left, wide))


@mutant
def subsets_without_their_normaliser(patch):
    patch.setattr(structures, "subset_log_prob", lambda ops, logits, k, value: (value * logits).sum(-1))


@mutant
def marginals_of_independent_items(patch):
    patch.setattr(structures, "subset_marginals", lambda ops, logits, k: 1 / (1 + ops.xp.exp(-logits)))


@mutant
def rankings_normalised_by_all_items(patch):
    def log_prob(ops, logits, value):
        ranked = ops.xp.take_along_axis(logits, value, axis=-1)
        return (ranked - ops.xp.log(ops.xp.exp(ranked).sum(-1))[..., None]).sum(-1)

    patch.setattr(structures, "ranking_log_prob", log_prob)


def law_error(subset, ranking, array):
    """Return how far densities and marginals of both laws are from NumPy's; `array` makes arrays of the library."""
    logits = some_logits(4, False)[0]
    values, probs = law(logits, 2)
    orders, log_probs = rankings(logits)
    few = subset(2, array(logits))
    errors = [
        few.log_prob(array(values)) - array(np.log(probs)),
        few.mean - array(covariance(logits, 2)[0]),
        ranking(array(np.tile(logits, (24, 1)))).log_prob(array(orders)) - array(log_probs),
    ]
    return max(float(abs(error).max()) for error in errors)


NETWORK_MUTANTS = {}


def network_mutant(apply):
    NETWORK_MUTANTS[apply.__name__] = apply
    return apply


@network_mutant
def keys_given_a_ranking_move_freely(patch):
    patch.setattr(perturbed.PerturbedRanking, "given", lambda self, along: along)


@network_mutant
def the_first_in_a_ranking_alone_holds_the_others_down(patch):
    plain = perturbed.given_ranking

    def given(ops, noise, logits, order):
        keys, parts, shares = plain(ops, noise, logits, order)
        return keys, parts * ops.constant(np.eye(parts.shape[-1])[0], parts), shares

    patch.setattr(perturbed, "given_ranking", given)


def keys_of_a_matrix_move_freely(patch):
    patch.setattr(perturbed.PerturbedMatrix, "given", lambda self, along: along)
