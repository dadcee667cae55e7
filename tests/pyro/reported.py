"""Programs of the kinds that users have reported against `TraceEnum_ELBO`, with the sum over all joint values written out.

Pyro's issues 1460, 2724 and 2809, NumPyro's 2013 and pull request 1537: scales and masks around summed sites, sites that the guide draws
above, beside and below them, and branches that only a plate has in common.
"""

import itertools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex

from pplgrad.testing.in_pyro import array
from tests.pyro.marginal import SUM, bernoulli, case, p, program

BITS = (array(0.0), array(1.0))


def log_bernoulli(value, logit):
    return dist.Bernoulli(logits=logit).log_prob(value + 0 * logit)


def log_normal(x, loc):
    return dist.Normal(loc, 1.0).log_prob(x)


def lse(terms):
    return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)


def scaled_and_masked():
    """A summed site in a subsampled plate with a mask, under a draw of the guide in the plate, and a scale around everything."""
    x, seen = array([0.3, -1.1, 2.0]), torch.tensor([True, False, True])

    def summed():
        with poutine.scale(scale=2.5):
            w = bernoulli("w", array(0.4))
            with pyro.plate("data", 3, subsample_size=2) as index:
                z = bernoulli("z", p("b")[0] + w)
                with poutine.mask(mask=seen[index]):
                    k = pyro.sample("k", dist.Bernoulli(logits=p("b")[1] * z - w), infer=SUM)
                    pyro.sample("x", dist.Normal(p("m") * k + 0.5 * z, 1.0), obs=x[index])

    def by_hand():
        w = pyro.sample("w", dist.Bernoulli(0.5).mask(False))
        with pyro.plate("data", 3, subsample_size=2) as index:
            z = pyro.sample("z", dist.Bernoulli(0.5).mask(False))
        over_k = lse(log_bernoulli(k, p("b")[1] * z - w) + log_normal(x[index], p("m") * k + 0.5 * z) for k in BITS)
        rows = log_bernoulli(z, p("b")[0] + w) + torch.where(seen[index], over_k, array(0.0))
        pyro.factor("all", 2.5 * (log_bernoulli(w, array(0.4)) + 1.5 * rows.sum(-1)))

    def guide():
        with poutine.scale(scale=2.5):
            w = bernoulli("w", p("a")[0])
            with pyro.plate("data", 3, subsample_size=2):
                bernoulli("z", p("a")[1] - w)

    made = case({"w": ((), 2), "z": ((2,), 2)}, {"a": [0.3, -0.2], "b": [0.2, 0.9], "m": 1.3}, {"data": (3, 2)})
    return program(summed, by_hand, guide, made)


def more_global_than_the_guide():
    """A summed site outside of the plate in which the guide draws, in a branch of its own."""
    x, y = array([0.3, -1.1]), array(0.7)

    def summed():
        g = pyro.sample("g", dist.Categorical(logits=p("b")), infer=SUM)
        pyro.sample("y", dist.Normal(p("m")[g], 1.0), obs=y)
        with pyro.plate("data", 2):
            z = bernoulli("z", p("c")[0])
            k = pyro.sample("k", dist.Bernoulli(logits=p("c")[1] + z), infer=SUM)
            pyro.sample("x", dist.Normal(k * p("c")[2] - z, 1.0), obs=x)

    def by_hand():
        with pyro.plate("data", 2):
            z = bernoulli("z", p("c")[0])
        terms = []
        for g, *k in itertools.product(range(3), BITS, BITS):
            k = torch.stack(k)
            own = log_bernoulli(k, p("c")[1] + z) + log_normal(x, k * p("c")[2] - z)
            terms.append(p("b").log_softmax(-1)[g] + log_normal(y, p("m")[g]) + own.sum(-1))
        pyro.factor("all", lse(terms))

    def guide():
        with pyro.plate("data", 2):
            bernoulli("z", p("a"))

    params = {"a": [0.3, -0.6], "b": [0.2, 0.5, 0.0], "c": [0.4, -0.3, 0.8], "m": [-1.0, 0.5, 1.2]}
    return program(summed, by_hand, guide, case({"z": ((2,), 2)}, params))


def branches_in_a_plate():
    """Two branches of summed sites under a draw of the guide in a plate, one of them in a second plate."""
    x, y = array([[0.3], [-1.1]]), array([[0.7, 1.4], [0.1, -0.5]])

    def summed():
        w = bernoulli("w", array(0.4))
        with pyro.plate("rows", 2, dim=-2):
            z = bernoulli("z", p("b")[0] + w)
            k = pyro.sample("k", dist.Bernoulli(logits=p("b")[1] + z), infer=SUM)
            pyro.sample("x", dist.Normal(p("m") * k, 1.0), obs=x)
            j = pyro.sample("j", dist.Bernoulli(logits=p("b")[2] - z), infer=SUM)
            with pyro.plate("columns", 2, dim=-1):
                c = pyro.sample("c", dist.Bernoulli(logits=p("b")[3] * j), infer=SUM)
                pyro.sample("y", dist.Normal(c + j - 0.4 * z, 1.0), obs=y)

    def by_hand():
        w = bernoulli("w", array(0.4))
        with pyro.plate("rows", 2, dim=-2):
            z = bernoulli("z", p("b")[0] + w)
        total = array(0.0)
        for row in range(2):
            at = z[..., row, 0]
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
        pyro.factor("all", total if z.dim() == 2 else total[..., None, None])

    def guide():
        w = bernoulli("w", p("a")[0])
        with pyro.plate("rows", 2, dim=-2):
            bernoulli("z", p("a")[1:3, None] + w)

    params = {"a": [0.3, 0.1, -0.4], "b": [0.2, 0.5, -0.3, 0.6], "m": 0.7}
    return program(summed, by_hand, guide, case({"w": ((), 2), "z": ((2, 1), 2)}, params))


def beside_the_guides():
    """A site that the guide draws beside a summed one in a subsampled plate: its prior reads the summed one, and data read both."""
    x = array([0.3, -1.1, 2.0])

    def summed():
        with pyro.plate("data", 3, subsample_size=2) as index:
            k = pyro.sample("k", dist.Bernoulli(logits=p("b")), infer=SUM).long()
            c = pyro.sample("c", dist.Categorical(logits=Vindex(p("t"))[k]))
            pyro.sample("x", dist.Normal(Vindex(p("m"))[k, c], 1.0), obs=x[index])

    def by_hand():
        with pyro.plate("data", 3, subsample_size=2) as index:
            c = pyro.sample("c", dist.Categorical(torch.ones(3, dtype=torch.float64)).mask(False))
            terms = [
                log_bernoulli(BITS[k], p("b")) + p("t").log_softmax(-1)[k][c] + log_normal(x[index], p("m")[k][c])
                for k in (0, 1)
            ]
            pyro.factor("all", lse(terms))

    def guide():
        with pyro.plate("data", 3, subsample_size=2):
            pyro.sample("c", dist.Categorical(logits=p("a")))

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
        with pyro.plate("data", 3):
            z = bernoulli("z", p("b")[0] + w)
        observe(z.sum(-1, keepdim=z.dim() > 1))

    def summed(total):
        k = pyro.sample("k", dist.Bernoulli(logits=p("b")[1] - 0.3 * total), infer=SUM)
        pyro.sample("x", dist.Normal(total + p("m") * k, 1.0), obs=array(1.1))

    def by_hand(total):
        logs = [log_bernoulli(k, p("b")[1] - 0.3 * total) + log_normal(array(1.1), total + p("m") * k) for k in BITS]
        pyro.factor("x", lse(logs))

    def guide():
        bernoulli("w", p("a")[0])
        with pyro.plate("data", 3):
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
