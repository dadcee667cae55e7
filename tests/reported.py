"""Programs of the kinds that users have reported against `TraceEnum_ELBO`, with the sum over all joint values written out, for both libraries.

Pyro's issues 1460, 2724 and 2809, NumPyro's 2013 and pull request 1537: scales and masks around summed sites, sites that the guide draws
above, beside and below them, and branches that only a plate has in common.
"""

import itertools

import numpy as np

from pplgrad import DisARM, Enumerate, LocalExpectation, ScoreFunction
from tests.enumerating import look_up
from tests.summing import SUM, case, program

ESTIMATORS = {
    "default": None,
    "score": ScoreFunction(),
    "local": LocalExpectation(),
    "joint": Enumerate(),
    "disarm": DisARM(),
}


def not_binary(name, short):
    return short == "disarm" and name == "beside the guide's"


def bits(h):
    return h.array(0.0), h.array(1.0)


def bernoulli(h, name, logit, **given):
    return h.sample(name, h.dist.Bernoulli(logits=logit), **given)


def observed(h, name, loc, x):
    h.sample(name, h.dist.Normal(loc, 1.0), obs=x)


def log_bernoulli(h, value, logit):
    return value * logit - h.xp.log(1 + h.xp.exp(logit))


def log_normal(h, x, loc):
    return h.dist.Normal(loc, 1.0).log_prob(x)


def lse(h, terms):
    return h.xp.log(h.xp.sum(h.xp.exp(h.xp.stack(h.xp.broadcast_arrays(*terms))), axis=0))


def log_softmax(h, x):
    return x - h.xp.log(h.xp.sum(h.xp.exp(x), axis=-1, keepdims=True))


def parameters(h, made):
    """Return a function from the name of a parameter to its value."""
    return lambda name: h.param(name, h.array(made.params[name]))


def scaled_and_masked(h):
    """A summed site in a subsampled plate with a mask, under a draw of the guide in the plate, and a scale around everything."""
    made = case({"w": ((), 2), "z": ((2,), 2)}, {"a": [0.3, -0.2], "b": [0.2, 0.9], "m": 1.3}, {"data": (3, 2)})
    x, seen, p = h.array([0.3, -1.1, 2.0]), h.xp.asarray(np.array([True, False, True])), parameters(h, made)

    def summed():
        with h.scale(2.5):
            w = bernoulli(h, "w", h.array(0.4))
            with h.plate("data", 3, subsample_size=2) as index:
                z = bernoulli(h, "z", p("b")[0] + w)
                with h.mask(seen[index]):
                    k = bernoulli(h, "k", p("b")[1] * z - w, infer=dict(SUM))
                    observed(h, "x", p("m") * k + 0.5 * z, x[index])

    def by_hand():
        flat = h.dist.Bernoulli(h.array(0.5)).mask(False)
        w = h.sample("w", flat)
        with h.plate("data", 3, subsample_size=2) as index:
            z = h.sample("z", flat)
        over_k = lse(
            h,
            [log_bernoulli(h, k, p("b")[1] * z - w) + log_normal(h, x[index], p("m") * k + 0.5 * z) for k in bits(h)],
        )
        rows = log_bernoulli(h, z, p("b")[0] + w) + h.xp.where(seen[index], over_k, 0 * over_k)
        h.factor("all", 2.5 * (log_bernoulli(h, w, h.array(0.4)) + 1.5 * rows.sum(-1)))

    def guide():
        with h.scale(2.5):
            w = bernoulli(h, "w", p("a")[0])
            with h.plate("data", 3, subsample_size=2):
                bernoulli(h, "z", p("a")[1] - w)

    return program(summed, by_hand, guide, made)


def more_global_than_the_guide(h):
    """A summed site outside of the plate in which the guide draws, in a branch of its own."""
    params = {"a": [0.3, -0.6], "b": [0.2, 0.5, 0.0], "c": [0.4, -0.3, 0.8], "m": [-1.0, 0.5, 1.2]}
    made = case({"z": ((2,), 2)}, params)
    x, y, p = h.array([0.3, -1.1]), h.array(0.7), parameters(h, made)

    def summed():
        g = h.sample("g", h.dist.Categorical(logits=p("b")), infer=dict(SUM))
        observed(h, "y", p("m")[g], y)
        with h.plate("data", 2):
            z = bernoulli(h, "z", p("c")[0])
            k = bernoulli(h, "k", p("c")[1] + z, infer=dict(SUM))
            observed(h, "x", k * p("c")[2] - z, x)

    def by_hand():
        with h.plate("data", 2):
            z = bernoulli(h, "z", p("c")[0])
        terms = []
        for g, *ks in itertools.product(range(3), bits(h), bits(h)):
            k = h.xp.stack(ks)
            own = log_bernoulli(h, k, p("c")[1] + z) + log_normal(h, x, k * p("c")[2] - z)
            terms.append(log_softmax(h, p("b"))[g] + log_normal(h, y, p("m")[g]) + own.sum(-1))
        h.factor("all", lse(h, terms))

    def guide():
        with h.plate("data", 2):
            bernoulli(h, "z", p("a"))

    return program(summed, by_hand, guide, made)


def branches_in_a_plate(h):
    """Two branches of summed sites under a draw of the guide in a plate, one of them in a second plate."""
    params = {"a": [0.3, 0.1, -0.4], "b": [0.2, 0.5, -0.3, 0.6], "m": 0.7}
    made = case({"w": ((), 2), "z": ((2, 1), 2)}, params)
    x, y, p = h.array([[0.3], [-1.1]]), h.array([[0.7, 1.4], [0.1, -0.5]]), parameters(h, made)

    def summed():
        w = bernoulli(h, "w", h.array(0.4))
        with h.plate("rows", 2, dim=-2):
            z = bernoulli(h, "z", p("b")[0] + w)
            k = bernoulli(h, "k", p("b")[1] + z, infer=dict(SUM))
            observed(h, "x", p("m") * k, x)
            j = bernoulli(h, "j", p("b")[2] - z, infer=dict(SUM))
            with h.plate("columns", 2, dim=-1):
                c = bernoulli(h, "c", p("b")[3] * j, infer=dict(SUM))
                observed(h, "y", c + j - 0.4 * z, y)

    def by_hand():
        w = bernoulli(h, "w", h.array(0.4))
        with h.plate("rows", 2, dim=-2):
            z = bernoulli(h, "z", p("b")[0] + w)
        total = h.array(0.0)
        for row in range(2):
            at = z[..., row, 0]
            terms = [
                log_bernoulli(h, k, p("b")[1] + at)
                + log_normal(h, x[row, 0], p("m") * k)
                + log_bernoulli(h, j, p("b")[2] - at)
                + sum(
                    log_bernoulli(h, c, p("b")[3] * j) + log_normal(h, y[row, i], c + j - 0.4 * at)
                    for i, c in enumerate(cs)
                )
                for k, j, *cs in itertools.product(bits(h), repeat=4)
            ]
            total = total + lse(h, terms)
        # Particles that run together stand in front of the plates.
        h.factor("all", total if z.ndim == 2 else total[..., None, None])

    def guide():
        w = bernoulli(h, "w", p("a")[0])
        with h.plate("rows", 2, dim=-2):
            bernoulli(h, "z", p("a")[1:3, None] + w)

    return program(summed, by_hand, guide, made)


def beside_the_guides(h):
    """A site that the guide draws beside a summed one in a subsampled plate: its prior reads the summed one, and data read both."""
    params = {
        "a": [0.3, -0.6, 0.1],
        "b": 0.4,
        "m": [[-1.0, 0.5, 1.2], [0.4, 0.0, -0.7]],
        "t": [[0.3, 0.1, -0.2], [0.0, 0.4, 0.9]],
    }
    made = case({"c": ((2,), 3)}, params, {"data": (3, 2)})
    x, p = h.array([0.3, -1.1, 2.0]), parameters(h, made)

    def summed():
        with h.plate("data", 3, subsample_size=2) as index:
            k = bernoulli(h, "k", p("b"), infer=dict(SUM))
            c = h.sample("c", h.dist.Categorical(logits=look_up(h, p("t"), k)))
            chosen = h.xp.where(c[..., None] == h.array([0, 1, 2]), look_up(h, p("m"), k), h.array(0.0))
            observed(h, "x", chosen.sum(-1), x[index])

    def by_hand():
        with h.plate("data", 3, subsample_size=2) as index:
            c = h.sample("c", h.dist.Categorical(h.array(np.ones(3) / 3)).mask(False))
            terms = [
                log_bernoulli(h, k, p("b")) + log_softmax(h, p("t"))[k][c] + log_normal(h, x[index], p("m")[k][c])
                for k in (0, 1)
            ]
            h.factor("all", lse(h, terms))

    def guide():
        with h.plate("data", 3, subsample_size=2):
            h.sample("c", h.dist.Categorical(logits=p("a")))

    return program(summed, by_hand, guide, made)


def read_outside_of_their_plate(h):
    """Draws of the guide in a plate, whose sum is read outside of it beside a summed site."""
    made = case({"w": ((), 2), "z": ((3,), 2)}, {"a": [0.3, 0.1, -0.4, 0.5], "b": [0.2, 0.5], "m": 0.7})
    x, p = h.array(1.1), parameters(h, made)

    def model(observe):
        w = bernoulli(h, "w", h.array(0.4))
        with h.plate("data", 3):
            z = bernoulli(h, "z", p("b")[0] + w)
        observe(h.xp.sum(z, axis=-1, keepdims=z.ndim > 1))

    def summed(total):
        k = bernoulli(h, "k", p("b")[1] - 0.3 * total, infer=dict(SUM))
        observed(h, "x", total + p("m") * k, x)

    def by_hand(total):
        terms = [log_bernoulli(h, k, p("b")[1] - 0.3 * total) + log_normal(h, x, total + p("m") * k) for k in bits(h)]
        h.factor("x", lse(h, terms))

    def guide():
        bernoulli(h, "w", p("a")[0])
        with h.plate("data", 3):
            bernoulli(h, "z", p("a")[1:])

    return program(lambda: model(summed), lambda: model(by_hand), guide, made)


REPORTED = {
    "scaled and masked": scaled_and_masked,
    "more global than the guide": more_global_than_the_guide,
    "branches in a plate": branches_in_a_plate,
    "beside the guide's": beside_the_guides,
    "read outside of their plate": read_outside_of_their_plate,
}
