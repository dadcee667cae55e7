"""Programs with sites that only the model has: each once with sites that are summed out, and once with the sum written out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp as lse
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import markov

from pplgrad.testing.in_numpyro import array
from tests.summing import SUM, case, program


def bernoulli(name, logit):
    return numpyro.sample(name, dist.Bernoulli(logits=logit))


def p(name):
    return numpyro.param(name)


def values(names):
    """Return parameters, read outside of control flow, where NumPyro has them."""
    return {name: p(name) for name in names}


def mixture():
    """A mixture in a plate, whose weights depend on a global draw, and its means on a local one."""
    x = array([0.3, -1.1, 2.0])

    def latents():
        w = bernoulli("w", array(0.4))
        return w

    def summed():
        w = latents()
        with numpyro.plate("data", 3):
            z = bernoulli("z", p("b")[2])
            k = numpyro.sample(
                "k", dist.Categorical(logits=jnp.stack([p("b")[0] * w, p("b")[1] * w, 0 * w], -1)), infer=dict(SUM)
            )
            numpyro.sample("x", dist.Normal(p("m")[k] + 0.5 * z, 1.0), obs=x)

    def by_hand():
        w = latents()
        with numpyro.plate("data", 3):
            z = bernoulli("z", p("b")[2])
            log_p = jax.nn.log_softmax(jnp.stack([p("b")[0] * w, p("b")[1] * w, 0 * w], -1))
            logs = dist.Normal(p("m") + 0.5 * z[..., None], 1.0).log_prob(x[..., None])
            numpyro.factor("x", lse(log_p + logs, -1))

    def guide():
        bernoulli("w", p("a")[0])
        with numpyro.plate("data", 3):
            bernoulli("z", p("a")[1:4])

    params = {"a": [0.3, -0.2, 0.5, 0.1], "b": [0.7, -0.4, 0.2], "m": [-1.0, 0.5, 1.5]}
    return program(summed, by_hand, guide, case({"w": ((), 2), "z": ((3,), 2)}, params))


def subsampled():
    """A mixture in a subsampled plate: the scale stays outside of the logarithm."""
    x = array([0.3, -1.1, 2.0])

    def run(inner):
        w = bernoulli("w", array(0.4))
        with numpyro.plate("data", 3, subsample_size=2) as index:
            inner(w, x[index])

    def local(w, x):
        k = numpyro.sample("k", dist.Bernoulli(logits=p("b") + w), infer=dict(SUM))
        numpyro.sample("x", dist.Normal(p("m")[k], 1.0), obs=x)

    def by_hand(w, x):
        logs = [
            dist.Bernoulli(logits=p("b") + w).log_prob(array(k)) + dist.Normal(p("m")[k], 1.0).log_prob(x)
            for k in (0, 1)
        ]
        numpyro.factor("x", lse(jnp.stack(jnp.broadcast_arrays(*logs)), 0))

    def guide():
        bernoulli("w", p("a"))
        with numpyro.plate("data", 3, subsample_size=2):
            pass

    made = case({"w": ((), 2)}, {"a": 0.3, "b": 0.2, "m": [-1.0, 0.5]}, {"data": (3, 2)})
    return program(lambda: run(local), lambda: run(by_hand), guide, made)


def chain(mask=False):
    """A hidden Markov model of five steps over a sampled regime, with masked steps if `mask`."""
    x = array([0.1, 1.4, -0.3, 0.8, 2.0])
    seen = [True, True, False, True, False] if mask else [True] * 5

    def parts(w):
        start = jax.nn.log_softmax(jnp.stack([p("b")[0] + 0 * w, p("b")[1] * w, 0 * w], -1))
        return start, jax.nn.log_softmax(p("t")), p("m") + 0.3 * w

    def summed():
        w = bernoulli("w", array(0.4))
        start, move, mean = parts(w)
        k = None
        for t in markov(range(5)):
            with handlers.mask(mask=jnp.asarray(seen[t])):
                logits = start if k is None else move[k]
                k = numpyro.sample(f"k{t}", dist.Categorical(logits=logits), infer=dict(SUM))
                numpyro.sample(f"x{t}", dist.Normal(mean[k], 1.0), obs=x[t])

    def by_hand():
        w = bernoulli("w", array(0.4))
        start, move, mean = parts(w)
        total = start
        for t in range(5):
            if t:
                total = lse(total[..., None] + move, -2)
            if seen[t]:
                total = total + dist.Normal(mean, 1.0).log_prob(x[t])
        numpyro.factor("x", lse(total, -1))

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
        k = numpyro.sample("k", dist.Bernoulli(logits=p("b")[0] + w), infer=dict(SUM))
        with numpyro.plate("rows", 2, dim=-2):
            r = numpyro.sample("r", dist.Bernoulli(logits=p("b")[1] * k), infer=dict(SUM))
            z = bernoulli("z", p("b")[3])
            with numpyro.plate("columns", 2, dim=-1):
                c = numpyro.sample("c", dist.Bernoulli(logits=p("b")[2] + r - k), infer=dict(SUM))
                numpyro.sample("x", dist.Normal(c + r * p("m") + z, 1.0), obs=x)

    def by_hand():
        w = bernoulli("w", array(0.4))
        with numpyro.plate("rows", 2, dim=-2):
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
                inner = lse(jnp.stack(over_c), 0).sum(-1, keepdims=True)
                over_r.append(dist.Bernoulli(logits=p("b")[1] * k).log_prob(r) + inner)
            total = lse(jnp.stack(over_r), 0).sum((-1, -2))
            over_k.append(dist.Bernoulli(logits=p("b")[0] + w).log_prob(k) + total)
        numpyro.factor("x", lse(jnp.stack(over_k), 0))

    def guide():
        bernoulli("w", p("a")[0])
        with numpyro.plate("rows", 2, dim=-2):
            bernoulli("z", p("a")[1:3, None])

    params = {"a": [0.3, 0.1, -0.4], "b": [0.2, 0.5, -0.3, 0.6], "m": 0.7}
    return program(summed, by_hand, guide, case({"w": ((), 2), "z": ((2, 1), 2)}, params))


def factorial():
    """Two hidden chains that are seen together, in a plate of sequences of different length."""
    x = array([[0.1, 1.4, -0.3], [0.8, 2.0, 0.2]])
    length = jnp.array([3, 2])
    states = list(itertools.product((0.0, 1.0), repeat=2))

    def summed():
        w = bernoulli("w", array(0.4))
        with numpyro.plate("sequences", 2):
            a = b = array(0.0)
            for t in markov(range(3)):
                with handlers.mask(mask=t < length):
                    a = numpyro.sample(f"a{t}", dist.Bernoulli(logits=p("b")[0] * a + w), infer=dict(SUM))
                    b = numpyro.sample(f"b{t}", dist.Bernoulli(logits=p("b")[1] - b), infer=dict(SUM))
                    numpyro.sample(f"x{t}", dist.Normal(a * p("m") + b, 1.0), obs=x[:, t])

    def by_hand():
        w = bernoulli("w", array(0.4))
        with numpyro.plate("sequences", 2):
            total = None
            for t in range(3):
                rows = []
                for a, b in states:
                    own = jnp.where(t < length, dist.Normal(a * p("m") + b, 1.0).log_prob(x[:, t]), array(0.0))

                    def move(before_a, before_b, a=a, b=b):
                        first = dist.Bernoulli(logits=p("b")[0] * before_a + w).log_prob(array(a))
                        return first + dist.Bernoulli(logits=p("b")[1] - before_b).log_prob(array(b))

                    if total is None:
                        rows.append(move(0.0, 0.0) + own)
                    else:
                        before = [x + move(*state) for state, x in zip(states, total, strict=True)]
                        rows.append(lse(jnp.stack(before), 0) + own)
                total = rows
            numpyro.factor("x", lse(jnp.stack(total), 0))

    def guide():
        bernoulli("w", p("a"))

    return program(summed, by_hand, guide, case({"w": ((), 2)}, {"a": 0.3, "b": [0.9, 0.5], "m": 0.7}))


def parent_in_the_guide():
    """A summed site whose parent is a sampled categorical one, and a prior that reads the summed site."""

    def summed():
        g = numpyro.sample("g", dist.Categorical(logits=p("b")))
        k = numpyro.sample("k", dist.Categorical(logits=p("t")[g]), infer=dict(SUM))
        h = bernoulli("h", p("m")[k])
        numpyro.sample("x", dist.Normal(h + p("m")[k], 1.0), obs=array(0.4))

    def by_hand():
        g = numpyro.sample("g", dist.Categorical(logits=p("b")))
        h = numpyro.sample("h", dist.Bernoulli(logits=array(0.0)).mask(False))
        log_k = jax.nn.log_softmax(p("t"))[g]
        logs = dist.Bernoulli(logits=p("m")).log_prob(h)
        logs = logs + dist.Normal(h[..., None] + p("m"), 1.0).log_prob(array(0.4))
        numpyro.factor("x", lse(log_k + logs, -1))

    def guide():
        g = numpyro.sample("g", dist.Categorical(logits=p("a")))
        bernoulli("h", p("c") * g)

    params = {
        "a": [0.1, -0.3, 0.2],
        "b": [0.3, 0.0, 0.4],
        "c": 0.4,
        "m": [0.5, -0.8],
        "t": [[0.1, 0.4], [0.3, -0.6], [0.9, 0.0]],
    }
    return program(summed, by_hand, guide, case({"g": ((), 3), "h": ((), 2)}, params))


def in_scan(draws=False, outer=False, mask=False):
    """The chain as a scan: with sampled sites in its body if `draws`, under a summed site before it if `outer`, with masked steps if `mask`."""
    x = array([0.1, 1.4, -0.3, 0.8])
    seen = jnp.array([True, False, True, True] if mask else [True] * 4)

    def means(v, w, z, c):
        return v["m"] + 0.3 * w + v["s"] * z - 0.6 * c

    def latent(v):
        return bernoulli("z", v["s"]) if draws else array(0.0)

    def start(v, w):
        return jnp.stack([0 * w, v["b"][1] * w, v["b"][0] + 0 * w], -1)

    def summed():
        v = values("bmst")
        w = bernoulli("w", array(0.4))
        c = numpyro.sample("c", dist.Bernoulli(logits=v["b"][0]), infer=dict(SUM)) if outer else array(0.0)

        def body(before, row):
            x, seen = row
            z = latent(v)
            k = numpyro.sample("k", dist.Categorical(logits=v["t"][before]), infer=dict(SUM))
            mean = means(v, w, z, 0)[k] - 0.6 * c
            with handlers.mask(mask=seen):
                numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
            return k, None

        first = numpyro.sample("first", dist.Categorical(logits=start(v, w)), infer=dict(SUM))
        scan(body, first, (x, seen))

    def by_hand():
        v = values("bmst")
        w = bernoulli("w", array(0.4))
        move = jax.nn.log_softmax(v["t"])

        def body(totals, row):
            x, seen = row
            z = latent(v)
            found = []
            for c, total in zip((0.0, 1.0), totals, strict=False):
                own = dist.Normal(means(v, w, z, c), 1.0).log_prob(x)
                found.append(lse(total[:, None] + move, 0) + jnp.where(seen, own, 0.0))
            return tuple(found), None

        log_c = dist.Bernoulli(logits=v["b"][0]).log_prob(jnp.arange(2)) if outer else array([0.0])
        first = jax.nn.log_softmax(start(v, w))
        totals, _ = scan(body, tuple(first + x for x in log_c), (x, seen))
        numpyro.factor("f", lse(jnp.stack(totals), (0, 1)))

    def guide():
        v = values("a")
        w = bernoulli("w", v["a"][0])
        if draws:

            def body(carry, _):
                z = bernoulli("z", v["a"][1] + w + 0.4 * carry)
                return z, None

            scan(body, 0, None, length=4)

    params = {
        "a": [0.3, -0.2],
        "b": [0.2, 0.5],
        "m": [-1.0, 0.5, 1.2],
        "s": 0.4,
        "t": [[0.3, 0.1, -0.2], [0.0, 0.4, 0.2], [-0.5, 0.1, 0.6]],
    }
    return program(summed, by_hand, guide, case({"w": ((), 2)} | ({"z": ((4,), 2)} if draws else {}), params))


def second_order():
    """A chain of which each step reads two before it, as a scan."""
    x = array([0.1, 1.4, -0.3, 0.8, 0.2])

    def summed():
        v = values("bmst")
        w = bernoulli("w", array(0.4))

        def body(carry, x):
            older, old = carry
            k = numpyro.sample("k", dist.Bernoulli(logits=v["b"][0] * older - v["b"][1] * old + w), infer=dict(SUM))
            numpyro.sample("x", dist.Normal(v["m"] * k + 0.5 * older, 1.0), obs=x)
            return (old, k), None

        scan(body, (0, 0), x, history=2)

    def by_hand():
        v = values("bmst")
        w = bernoulli("w", array(0.4))
        terms = []
        for ks in itertools.product((0, 1), repeat=5):
            total, older, old = 0.0, 0, 0
            for k, x_ in zip(ks, x, strict=True):
                total = total + dist.Bernoulli(logits=v["b"][0] * older - v["b"][1] * old + w).log_prob(k)
                total = total + dist.Normal(v["m"] * k + 0.5 * older, 1.0).log_prob(x_)
                older, old = old, k
            terms.append(total)
        numpyro.factor("f", lse(jnp.stack(terms), 0))

    def guide():
        bernoulli("w", p("a"))

    return program(summed, by_hand, guide, case({"w": ((), 2)}, {"a": 0.3, "b": [0.9, 0.5], "m": 0.7}))


def plated_scan():
    """Sequences of different length in a plate in the body of a scan; two chains, of which the second has sites of its own steps below it."""
    x = array([[0.1, 0.8], [1.4, 2.0], [-0.3, 0.2]])
    length = jnp.array([3, 2])
    states = list(itertools.product((0, 1), repeat=2))

    def summed():
        v = values("bmst")
        w = bernoulli("w", array(0.4))

        def body(carry, row):
            x, t = row
            a, b = carry
            with numpyro.plate("sequences", 2), handlers.mask(mask=t < length):
                a = numpyro.sample("first", dist.Bernoulli(logits=v["b"][0] * a + w), infer=dict(SUM))
                b = numpyro.sample("second", dist.Bernoulli(logits=v["b"][1] - b), infer=dict(SUM))
                d = numpyro.sample("d", dist.Bernoulli(logits=v["b"][1] * a), infer=dict(SUM))
                numpyro.sample("x", dist.Normal(a * v["m"] + b - d, 1.0), obs=x)
            return (a, b), None

        scan(body, (jnp.zeros(2, int), jnp.zeros(2, int)), (x, jnp.arange(3)))

    def by_hand():
        v = values("bmst")
        w = bernoulli("w", array(0.4))
        total = None
        for t in range(3):
            rows = []
            for a, b in states:
                d = jnp.arange(2)[:, None]
                own = dist.Bernoulli(logits=v["b"][1] * a).log_prob(d)
                own = lse(own + dist.Normal(a * v["m"] + b - d, 1.0).log_prob(x[t]), 0)
                own = jnp.where(t < length, own, 0.0)

                def move(before_a, before_b, a=a, b=b):
                    first = dist.Bernoulli(logits=v["b"][0] * before_a + w).log_prob(a)
                    return first + dist.Bernoulli(logits=v["b"][1] - before_b).log_prob(b)

                if total is None:
                    rows.append(move(0, 0) + own)
                else:
                    before = [x + move(*state) for state, x in zip(states, total, strict=True)]
                    rows.append(lse(jnp.stack(before), 0) + own)
            total = rows
        numpyro.factor("f", lse(jnp.stack(total), 0).sum())

    def guide():
        bernoulli("w", p("a"))

    return program(summed, by_hand, guide, case({"w": ((), 2)}, {"a": 0.3, "b": [0.9, 0.5], "m": 0.7}))


PROGRAMS = {
    "mixture": mixture,
    "subsampled": subsampled,
    "chain": chain,
    "masked chain": lambda: chain(True),
    "tree": tree,
    "factorial": factorial,
    "parent in the guide": parent_in_the_guide,
    "scan": in_scan,
    "scan with draws": lambda: in_scan(draws=True),
    "scan under a summed site": lambda: in_scan(outer=True, mask=True),
    "scan of second order": second_order,
    "scan with a plate": plated_scan,
}
