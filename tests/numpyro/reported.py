"""Programs of the kinds that users have reported against `TraceEnum_ELBO`, with the sum over all joint values written out.

Pyro's issues 1460, 2724 and 2809, NumPyro's 2013 and pull request 1537: scales and masks around summed sites, sites that the guide draws
above, beside and below them, and branches that only a plate has in common.
"""

import itertools

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro import handlers

from pplgrad.testing.in_numpyro import array
from tests.numpyro.marginal import SUM, bernoulli, case, p, program

BITS = (0.0, 1.0)


def log_bernoulli(value, logit):
    return value * logit - jax.nn.softplus(logit)


def log_normal(x, loc):
    return dist.Normal(loc, 1.0).log_prob(x)


def lse(terms):
    return logsumexp(jnp.stack(jnp.broadcast_arrays(*terms)), 0)


def scaled_and_masked():
    """A summed site in a subsampled plate with a mask, under a draw of the guide in the plate, and a scale around everything."""
    x, seen = array([0.3, -1.1, 2.0]), jnp.array([True, False, True])

    def summed():
        with handlers.scale(scale=2.5):
            w = bernoulli("w", array(0.4))
            with numpyro.plate("data", 3, subsample_size=2) as index:
                z = bernoulli("z", p("b")[0] + w)
                with handlers.mask(mask=seen[index]):
                    k = numpyro.sample("k", dist.Bernoulli(logits=p("b")[1] * z - w), infer=SUM)
                    numpyro.sample("x", dist.Normal(p("m") * k + 0.5 * z, 1.0), obs=x[index])

    def by_hand():
        w = numpyro.sample("w", dist.Bernoulli(0.5).mask(False))
        with numpyro.plate("data", 3, subsample_size=2) as index:
            z = numpyro.sample("z", dist.Bernoulli(0.5).mask(False))
        over_k = lse([log_bernoulli(k, p("b")[1] * z - w) + log_normal(x[index], p("m") * k + 0.5 * z) for k in BITS])
        rows = log_bernoulli(z, p("b")[0] + w) + jnp.where(seen[index], over_k, 0.0)
        numpyro.factor("all", 2.5 * (log_bernoulli(w, array(0.4)) + 1.5 * rows.sum(-1)))

    def guide():
        with handlers.scale(scale=2.5):
            w = bernoulli("w", p("a")[0])
            with numpyro.plate("data", 3, subsample_size=2):
                bernoulli("z", p("a")[1] - w)

    made = case({"w": ((), 2), "z": ((2,), 2)}, {"a": [0.3, -0.2], "b": [0.2, 0.9], "m": 1.3}, {"data": (3, 2)})
    return program(summed, by_hand, guide, made)


def more_global_than_the_guide():
    """A summed site outside of the plate in which the guide draws, in a branch of its own."""
    x, y = array([0.3, -1.1]), array(0.7)

    def summed():
        g = numpyro.sample("g", dist.Categorical(logits=p("b")), infer=SUM)
        numpyro.sample("y", dist.Normal(p("m")[g], 1.0), obs=y)
        with numpyro.plate("data", 2):
            z = bernoulli("z", p("c")[0])
            k = numpyro.sample("k", dist.Bernoulli(logits=p("c")[1] + z), infer=SUM)
            numpyro.sample("x", dist.Normal(k * p("c")[2] - z, 1.0), obs=x)

    def by_hand():
        with numpyro.plate("data", 2):
            z = bernoulli("z", p("c")[0])
        terms = []
        for g, *ks in itertools.product(range(3), BITS, BITS):
            k = jnp.array(ks)
            own = log_bernoulli(k, p("c")[1] + z) + log_normal(x, k * p("c")[2] - z)
            terms.append(jax.nn.log_softmax(p("b"))[g] + log_normal(y, p("m")[g]) + own.sum(-1))
        numpyro.factor("all", lse(terms))

    def guide():
        with numpyro.plate("data", 2):
            bernoulli("z", p("a"))

    params = {"a": [0.3, -0.6], "b": [0.2, 0.5, 0.0], "c": [0.4, -0.3, 0.8], "m": [-1.0, 0.5, 1.2]}
    return program(summed, by_hand, guide, case({"z": ((2,), 2)}, params))


def branches_in_a_plate():
    """Two branches of summed sites under a draw of the guide in a plate, one of them in a second plate."""
    x, y = array([[0.3], [-1.1]]), array([[0.7, 1.4], [0.1, -0.5]])

    def summed():
        w = bernoulli("w", array(0.4))
        with numpyro.plate("rows", 2, dim=-2):
            z = bernoulli("z", p("b")[0] + w)
            k = numpyro.sample("k", dist.Bernoulli(logits=p("b")[1] + z), infer=SUM)
            numpyro.sample("x", dist.Normal(p("m") * k, 1.0), obs=x)
            j = numpyro.sample("j", dist.Bernoulli(logits=p("b")[2] - z), infer=SUM)
            with numpyro.plate("columns", 2, dim=-1):
                c = numpyro.sample("c", dist.Bernoulli(logits=p("b")[3] * j), infer=SUM)
                numpyro.sample("y", dist.Normal(c + j - 0.4 * z, 1.0), obs=y)

    def by_hand():
        w = bernoulli("w", array(0.4))
        with numpyro.plate("rows", 2, dim=-2):
            z = bernoulli("z", p("b")[0] + w)
        total = 0.0
        for row in range(2):
            at = z[row, 0]
            terms = [
                log_bernoulli(k, p("b")[1] + at)
                + log_normal(x[row, 0], p("m") * k)
                + log_bernoulli(j, p("b")[2] - at)
                + sum(
                    log_bernoulli(c, p("b")[3] * j) + log_normal(y[row, i], c + j - 0.4 * at) for i, c in enumerate(cs)
                )
                for k, j, *cs in itertools.product(BITS, repeat=4)
            ]
            total = total + lse(terms)
        numpyro.factor("all", total)

    def guide():
        w = bernoulli("w", p("a")[0])
        with numpyro.plate("rows", 2, dim=-2):
            bernoulli("z", p("a")[1:3, None] + w)

    params = {"a": [0.3, 0.1, -0.4], "b": [0.2, 0.5, -0.3, 0.6], "m": 0.7}
    return program(summed, by_hand, guide, case({"w": ((), 2), "z": ((2, 1), 2)}, params))


def beside_the_guides():
    """A site that the guide draws beside a summed one in a subsampled plate: its prior reads the summed one, and data read both."""
    x = array([0.3, -1.1, 2.0])

    def summed():
        with numpyro.plate("data", 3, subsample_size=2) as index:
            k = numpyro.sample("k", dist.Bernoulli(logits=p("b")), infer=SUM)
            c = numpyro.sample("c", dist.Categorical(logits=p("t")[k]))
            numpyro.sample("x", dist.Normal(p("m")[k, c], 1.0), obs=x[index])

    def by_hand():
        with numpyro.plate("data", 3, subsample_size=2) as index:
            c = numpyro.sample("c", dist.Categorical(jnp.ones(3) / 3).mask(False))
            terms = [
                log_bernoulli(k, p("b")) + jax.nn.log_softmax(p("t"))[k][c] + log_normal(x[index], p("m")[k][c])
                for k in (0, 1)
            ]
            numpyro.factor("all", lse(terms))

    def guide():
        with numpyro.plate("data", 3, subsample_size=2):
            numpyro.sample("c", dist.Categorical(logits=p("a")))

    params = {
        "a": [0.3, -0.6, 0.1],
        "b": 0.4,
        "m": [[-1.0, 0.5, 1.2], [0.4, 0.0, -0.7]],
        "t": [[0.3, 0.1, -0.2], [0.0, 0.4, 0.9]],
    }
    return program(summed, by_hand, guide, case({"c": ((2,), 3)}, params, {"data": (3, 2)}))


def read_outside_of_their_plate():
    """Draws of the guide in a plate, whose sum is read outside of it beside a summed site."""

    def model(observe):
        w = bernoulli("w", array(0.4))
        with numpyro.plate("data", 3):
            z = bernoulli("z", p("b")[0] + w)
        observe(z.sum(-1))

    def summed(total):
        k = numpyro.sample("k", dist.Bernoulli(logits=p("b")[1] - 0.3 * total), infer=SUM)
        numpyro.sample("x", dist.Normal(total + p("m") * k, 1.0), obs=array(1.1))

    def by_hand(total):
        logs = [log_bernoulli(k, p("b")[1] - 0.3 * total) + log_normal(1.1, total + p("m") * k) for k in BITS]
        numpyro.factor("x", lse(logs))

    def guide():
        bernoulli("w", p("a")[0])
        with numpyro.plate("data", 3):
            bernoulli("z", p("a")[1:])

    params = {"a": [0.3, 0.1, -0.4, 0.5], "b": [0.2, 0.5], "m": 0.7}
    made = case({"w": ((), 2), "z": ((3,), 2)}, params)
    return program(lambda: model(summed), lambda: model(by_hand), guide, made)


REPORTED = {
    "scaled and masked": scaled_and_masked,
    "more global than the guide": more_global_than_the_guide,
    "branches in a plate": branches_in_a_plate,
    "beside the guide's": beside_the_guides,
    "read outside of their plate": read_outside_of_their_plate,
}
