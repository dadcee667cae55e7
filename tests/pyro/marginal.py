"""Programs with sites that only the model has: each once with sites that are summed out, and once with the sum written out by hand."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex

from pplgrad.testing.in_pyro import array
from tests.summing import SUM, case, program


def bernoulli(name, logit):
    return pyro.sample(name, dist.Bernoulli(logits=logit))


def p(name):
    return pyro.param(name)


def mixture():
    """A mixture in a plate, whose weights depend on a global draw, and its means on a local one."""
    x = array([0.3, -1.1, 2.0])

    def latents():
        w = bernoulli("w", array(0.4))
        return w

    def summed():
        w = latents()
        with pyro.plate("data", 3):
            z = bernoulli("z", p("b")[2])
            k = pyro.sample(
                "k", dist.Categorical(logits=torch.stack([p("b")[0] * w, p("b")[1] * w, 0 * w], -1)), infer=dict(SUM)
            )
            pyro.sample("x", dist.Normal(p("m")[k] + 0.5 * z, 1.0), obs=x)

    def by_hand():
        w = latents()
        with pyro.plate("data", 3):
            z = bernoulli("z", p("b")[2])
            log_p = torch.stack([p("b")[0] * w, p("b")[1] * w, 0 * w], -1).log_softmax(-1)
            logs = dist.Normal(p("m") + 0.5 * z[..., None], 1.0).log_prob(x[..., None])
            pyro.factor("x", (log_p + logs).logsumexp(-1))

    def guide():
        bernoulli("w", p("a")[0])
        with pyro.plate("data", 3):
            bernoulli("z", p("a")[1:4])

    params = {"a": [0.3, -0.2, 0.5, 0.1], "b": [0.7, -0.4, 0.2], "m": [-1.0, 0.5, 1.5]}
    return program(summed, by_hand, guide, case({"w": ((), 2), "z": ((3,), 2)}, params))


def subsampled():
    """A mixture in a subsampled plate: the scale stays outside of the logarithm."""
    x = array([0.3, -1.1, 2.0])

    def run(inner):
        w = bernoulli("w", array(0.4))
        with pyro.plate("data", 3, subsample_size=2) as index:
            inner(w, x[index])

    def local(w, x):
        k = pyro.sample("k", dist.Bernoulli(logits=p("b") + w), infer=dict(SUM))
        pyro.sample("x", dist.Normal(p("m")[k.long()], 1.0), obs=x)

    def by_hand(w, x):
        logs = [
            dist.Bernoulli(logits=p("b") + w).log_prob(array(k)) + dist.Normal(p("m")[k], 1.0).log_prob(x)
            for k in (0, 1)
        ]
        pyro.factor("x", torch.stack(torch.broadcast_tensors(*logs)).logsumexp(0))

    def guide():
        bernoulli("w", p("a"))
        with pyro.plate("data", 3, subsample_size=2):
            pass

    made = case({"w": ((), 2)}, {"a": 0.3, "b": 0.2, "m": [-1.0, 0.5]}, {"data": (3, 2)})
    return program(lambda: run(local), lambda: run(by_hand), guide, made)


def chain(mask=False):
    """A hidden Markov model of five steps over a sampled regime, with masked steps if `mask`."""
    x = array([0.1, 1.4, -0.3, 0.8, 2.0])
    seen = [True, True, False, True, False] if mask else [True] * 5

    def parts(w):
        start = torch.stack([p("b")[0] + 0 * w, p("b")[1] * w, 0 * w], -1).log_softmax(-1)
        return start, p("t").log_softmax(-1), p("m") + 0.3 * w[..., None]

    def summed():
        w = bernoulli("w", array(0.4))
        start, move, mean = parts(w)
        k = None
        for t in pyro.markov(range(5)):
            with poutine.mask(mask=seen[t]):
                logits = start if k is None else Vindex(move)[k]
                k = pyro.sample(f"k{t}", dist.Categorical(logits=logits), infer=dict(SUM))
                pyro.sample(f"x{t}", dist.Normal(Vindex(mean)[..., k], 1.0), obs=x[t])

    def by_hand():
        w = bernoulli("w", array(0.4))
        start, move, mean = parts(w)
        total = start
        for t in range(5):
            if t:
                total = (total[..., None] + move).logsumexp(-2)
            if seen[t]:
                total = total + dist.Normal(mean, 1.0).log_prob(x[t])
        pyro.factor("x", total.logsumexp(-1))

    def guide():
        bernoulli("w", p("a"))

    params = {
        "a": 0.3,
        "b": [0.2, 0.5],
        "m": [-1.0, 0.5, 1.2],
        "t": [[0.3, 0.1, -0.2], [0.0, 0.4, 0.2], [-0.5, 0.1, 0.6]],
    }
    return program(summed, by_hand, guide, case({"w": ((), 2)}, params))


def tree():
    """A summed site outside of two plates, one inside of the first, and one inside of both, under a sampled one."""
    x = array([[0.3, -0.6], [1.2, 0.4]])

    def summed():
        w = bernoulli("w", array(0.4))
        k = pyro.sample("k", dist.Bernoulli(logits=p("b")[0] + w), infer=dict(SUM))
        with pyro.plate("rows", 2, dim=-2):
            r = pyro.sample("r", dist.Bernoulli(logits=p("b")[1] * k), infer=dict(SUM))
            z = bernoulli("z", p("b")[3])
            with pyro.plate("columns", 2, dim=-1):
                c = pyro.sample("c", dist.Bernoulli(logits=p("b")[2] + r - k), infer=dict(SUM))
                pyro.sample("x", dist.Normal(c + r * p("m") + z, 1.0), obs=x)

    def by_hand():
        w = bernoulli("w", array(0.4))
        with pyro.plate("rows", 2, dim=-2):
            z = bernoulli("z", p("b")[3])
        over_k = []
        for k in (array(0.0), array(1.0)):
            over_r = []
            for r in (array(0.0), array(1.0)):
                over_c = [
                    dist.Bernoulli(logits=p("b")[2] + r - k).log_prob(c)
                    + dist.Normal(c + r * p("m") + z, 1.0).log_prob(x)
                    for c in (array(0.0), array(1.0))
                ]
                inner = torch.stack(over_c).logsumexp(0).sum(-1, keepdim=True)
                over_r.append(dist.Bernoulli(logits=p("b")[1] * k).log_prob(r) + inner)
            total = torch.stack(over_r).logsumexp(0).sum((-1, -2))
            over_k.append(
                dist.Bernoulli(logits=p("b")[0] + w).log_prob(k) + (total if w.dim() == 0 else total[..., None, None])
            )
        pyro.factor("x", torch.stack(over_k).logsumexp(0))

    def guide():
        bernoulli("w", p("a")[0])
        with pyro.plate("rows", 2, dim=-2):
            bernoulli("z", p("a")[1:3, None])

    params = {"a": [0.3, 0.1, -0.4], "b": [0.2, 0.5, -0.3, 0.6], "m": 0.7}
    return program(summed, by_hand, guide, case({"w": ((), 2), "z": ((2, 1), 2)}, params))


def factorial():
    """Two hidden chains that are seen together, in a plate of sequences of different length."""
    x = array([[0.1, 1.4, -0.3], [0.8, 2.0, 0.2]])
    length = torch.tensor([3, 2])
    states = list(itertools.product((0.0, 1.0), repeat=2))

    def summed():
        w = bernoulli("w", array(0.4))
        with pyro.plate("sequences", 2):
            a = b = array(0.0)
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=t < length):
                    a = pyro.sample(f"a{t}", dist.Bernoulli(logits=p("b")[0] * a + w), infer=dict(SUM))
                    b = pyro.sample(f"b{t}", dist.Bernoulli(logits=p("b")[1] - b), infer=dict(SUM))
                    pyro.sample(f"x{t}", dist.Normal(a * p("m") + b, 1.0), obs=x[:, t])

    def by_hand():
        w = bernoulli("w", array(0.4))
        with pyro.plate("sequences", 2):
            total = None
            for t in range(3):
                rows = []
                for a, b in states:
                    own = torch.where(t < length, dist.Normal(a * p("m") + b, 1.0).log_prob(x[:, t]), array(0.0))

                    def move(before_a, before_b, a=a, b=b):
                        first = dist.Bernoulli(logits=p("b")[0] * before_a + w).log_prob(array(a))
                        return first + dist.Bernoulli(logits=p("b")[1] - before_b).log_prob(array(b))

                    if total is None:
                        rows.append(move(0.0, 0.0) + own)
                    else:
                        before = [x + move(*state) for state, x in zip(states, total, strict=True)]
                        rows.append(torch.stack(before).logsumexp(0) + own)
                total = rows
            pyro.factor("x", torch.stack(total).logsumexp(0))

    def guide():
        bernoulli("w", p("a"))

    return program(summed, by_hand, guide, case({"w": ((), 2)}, {"a": 0.3, "b": [0.9, 0.5], "m": 0.7}))


def parent_in_the_guide():
    """A summed site whose parent is a sampled categorical one, and a prior that reads the summed site."""

    def summed():
        g = pyro.sample("g", dist.Categorical(logits=p("b")))
        k = pyro.sample("k", dist.Categorical(logits=Vindex(p("t"))[g]), infer=dict(SUM))
        h = bernoulli("h", p("m")[k])
        pyro.sample("x", dist.Normal(h + Vindex(p("m"))[k], 1.0), obs=array(0.4))

    def by_hand():
        g = pyro.sample("g", dist.Categorical(logits=p("b")))
        h = pyro.sample("h", dist.Bernoulli(logits=array(0.0)).mask(False))
        log_k = p("t").log_softmax(-1)[g]
        logs = dist.Bernoulli(logits=p("m")).log_prob(h[..., None].expand(*h.shape, 2))
        logs = logs + dist.Normal(h[..., None] + p("m"), 1.0).log_prob(array(0.4))
        pyro.factor("x", (log_k + logs).logsumexp(-1))

    def guide():
        g = pyro.sample("g", dist.Categorical(logits=p("a")))
        bernoulli("h", p("c") * g)

    params = {
        "a": [0.1, -0.3, 0.2],
        "b": [0.3, 0.0, 0.4],
        "c": 0.4,
        "m": [0.5, -0.8],
        "t": [[0.1, 0.4], [0.3, -0.6], [0.9, 0.0]],
    }
    return program(summed, by_hand, guide, case({"g": ((), 3), "h": ((), 2)}, params))


PROGRAMS = {
    "mixture": mixture,
    "subsampled": subsampled,
    "chain": chain,
    "masked chain": lambda: chain(True),
    "tree": tree,
    "factorial": factorial,
    "parent in the guide": parent_in_the_guide,
}
