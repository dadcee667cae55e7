"""What is proved of objectives at the draws of another program: exact gradients, by hand in NumPy, the same for both libraries."""

import itertools

import numpy as np

from pplgrad.core import off_policy
from pplgrad.core.off_policy import LogVariance, TrajectoryBalance
from pplgrad.engine import signals

A = np.array([0.2, 0.3, -0.4])
B = np.array([-0.3, 0.5])
M = 0.8
LOG_Z = 0.7
X = np.array([1.4, -0.2, 0.6])


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def bernoulli(p, z):
    return np.log(np.where(z == 1, p, 1 - p))


def normal(x, mean):
    return -0.5 * (x - mean) ** 2 - 0.5 * np.log(2 * np.pi)


def pair(host):
    """Return model and guide of two binary sites, one over the other; the model has a parameter."""
    d = host.dist

    def model():
        m = host.param("m", host.array(M))
        z = host.sample("z", d.Bernoulli(host.array(0.3)))
        w = host.sample("w", d.Bernoulli(0.2 + 0.5 * z))
        host.sample("x", d.Normal(m * z + 2 * w, 1.0), obs=host.array(X[0]))

    def guide():
        a = host.param("a", host.array(A))
        host.param("log_normalizer", host.array(LOG_Z))
        z = host.sample("z", d.Bernoulli(logits=a[0]))
        host.sample("w", d.Bernoulli(logits=a[1] + a[2] * z))

    return model, guide


def pair_rows():
    """Return each outcome's values, probability under a proposal, log q − log p and its derivatives."""
    z, w = np.array(list(itertools.product([0.0, 1.0], repeat=2))).T
    r = np.exp(bernoulli(0.6, z) + bernoulli(0.35 + 0.3 * z, w))
    second = A[1] + A[2] * z
    log_q = bernoulli(sigmoid(A[0]), z) + bernoulli(sigmoid(second), w)
    log_p = bernoulli(0.3, z) + bernoulli(0.2 + 0.5 * z, w) + normal(X[0], M * z + 2 * w)
    apart = w - sigmoid(second)
    return {"z": z, "w": w}, r, log_q - log_p, np.stack([z - sigmoid(A[0]), apart, z * apart], 1)


def pair_proposal(host):
    """Return the program whose probabilities `pair_rows` has."""

    def proposal():
        z = host.sample("z", host.dist.Bernoulli(host.array(0.6)))
        host.sample("w", host.dist.Bernoulli(0.35 + 0.3 * z))

    return proposal


def elements(host, plate):
    """Return model and guide of a binary site for each element of a plate, in whose minibatch `plate()` stands."""
    d = host.dist

    def model():
        with plate() as index:
            z = host.sample("z", d.Bernoulli(host.array(0.3) + 0 * host.array(X)[index]))
            host.sample("x", d.Normal(M * z, 1.0), obs=host.array(X)[index])

    def guide():
        b = host.param("b", host.array(B))
        with plate() as index:
            host.sample("z", d.Bernoulli(logits=b[0] + b[1] * host.array(X)[index]))

    return model, guide


SUBSETS = [(0, 1), (0, 2), (1, 2)]


def element_rows():
    """Return the probability under a proposal, log q − log p and its derivatives of z = 0, 1 at each element: (2, 3)."""
    z = np.array([[0.0], [1.0]])
    r = np.where(z == 1, 0.3 + 0.2 * np.arange(3), 0.7 - 0.2 * np.arange(3))
    q = sigmoid(B[0] + B[1] * X)
    f = bernoulli(q, z) - bernoulli(0.3, z) - normal(X, M * z)
    return r, f, np.stack([z - q, (z - q) * X], -1)


def half_variance(r, f, slopes):
    """Return ½ Var_r[f] and its derivatives, from all outcomes along the first axis."""
    mean = (r * f).sum(0)
    return 0.5 * (r * (f - mean) ** 2).sum(0), np.tensordot(r * (f - mean), slopes, ((0,), (0,)))


def balance(r, f, slopes):
    """Return E_r[(log Z + f)²] and its derivatives, by the guide's parameters and by log Z."""
    return (r * (LOG_Z + f) ** 2).sum(), 2 * (r * (LOG_Z + f)) @ slopes, 2 * (r * (LOG_Z + f)).sum()


def half_variance_of_elements():
    """Return Σ_i ½ Var_r[f_i] over all elements, and its derivatives."""
    rows = [half_variance(*(x[:, i] for x in element_rows())) for i in range(3)]
    return sum(value for value, _ in rows), sum(slope for _, slope in rows)


def tuples(r, particles):
    """Yield the numbers of the outcomes of all particles, and the probability of each tuple."""
    for picked in itertools.product(range(len(r)), repeat=particles):
        yield list(picked), float(np.prod(r[list(picked)]))


MUTANTS = {}


def mutant(apply):
    MUTANTS[apply.__name__] = apply
    return apply


@mutant
def variance_with_the_denominator_of_all(patch):
    plain = LogVariance.discrepancy

    def discrepancy(self, xp, logs, axis, log_normalizer):
        count = logs.shape[axis]
        return plain(self, xp, logs, axis, log_normalizer) * (count - 1) / count

    patch.setattr(LogVariance, "discrepancy", discrepancy)


@mutant
def weighted_by_importance(patch):
    """As if the draws of the proposal had to be made those of the posterior."""
    plain = LogVariance.discrepancy

    def discrepancy(self, xp, logs, axis, log_normalizer):
        shares = xp.exp(logs - xp.max(logs, axis=axis, keepdims=True))
        return plain(self, xp, logs * shares, axis, log_normalizer)

    patch.setattr(LogVariance, "discrepancy", discrepancy)


@mutant
def mean_as_a_constant_of_the_wrong_sign(patch):
    def discrepancy(self, xp, logs, axis, log_normalizer):
        apart = logs + xp.mean(logs, axis=axis, keepdims=True)
        return 0.5 * xp.sum(apart * apart, axis=axis) / (logs.shape[axis] - 1)

    patch.setattr(LogVariance, "discrepancy", discrepancy)


@mutant
def normalizer_with_the_wrong_sign(patch):
    plain = TrajectoryBalance.discrepancy
    patch.setattr(
        TrajectoryBalance, "discrepancy", lambda self, xp, logs, axis, number: plain(self, xp, logs, axis, -number)
    )


@mutant
def model_that_follows(patch):
    patch.setattr(signals, "_model_held", lambda ops, layout, costs: list(costs))


@mutant
def scale_inside_of_the_square(patch):
    patch.setattr(signals, "_scale_outside", lambda layout: 1.0)


def draws_that_move(patch):
    """Not among `MUTANTS`: discrete draws do not move; it is for continuous sites."""
    patch.setattr(off_policy.OffPolicy, "draws_are_constant", False)


BITS = 4


def two_modes(host):
    """Return a chain of four bits with two far modes, an autoregressive guide that starts in one of them, and the uniform proposal."""
    d = host.dist

    def model():
        signs = [2 * host.sample(f"z{i}", d.Bernoulli(host.array(0.5))) - 1 for i in range(BITS)]
        host.factor("alike", 4.0 * sum(x * y for x, y in zip(signs, signs[1:], strict=False)))

    def guide():
        a, b = host.param("a", host.array([4.0] * BITS)), host.param("b", host.array([0.0] * BITS))
        host.param("log_normalizer", host.array(0.0))
        before = host.array(1.0)
        for i in range(BITS):
            before = host.sample(f"z{i}", d.Bernoulli(logits=a[i] + b[i] * (2 * before - 1)))

    def uniform():
        for i in range(BITS):
            host.sample(f"z{i}", d.Bernoulli(host.array(0.5)))

    return model, guide, uniform


def mass_of_the_other_mode(a, b):
    """Return the guide's probability of zeros alone."""
    return np.prod(1 - sigmoid(a + b * np.array([1.0, -1.0, -1.0, -1.0])))


MASS = 0.5 * sigmoid(8.0) ** 3
"""The posterior's: log odds of 8 between neighbours."""
EVIDENCE = np.log(2 * (2 * np.cosh(4.0)) ** 3 / 2**BITS)
