"""The posterior of summed sites by brute force: the plain model at each joint value, without any enumeration of NumPyro's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import markov

from pplgrad.numpyro._distributions import finite_parts
from pplgrad.testing.in_numpyro import HOST, array, parameters
from tests.numpyro.marginal import PROGRAMS, SUM

KEY = jax.random.key(7)


def bare(fn):
    """Return a distribution without its masks."""
    while isinstance(fn, (dist.distribution.MaskedDistribution, dist.ExpandedDistribution)):
        inside = bare(fn.base_dist)
        return inside.expand(fn.batch_shape) if isinstance(fn, dist.ExpandedDistribution) else inside
    return fn


class Posterior:
    """Every joint value of the summed sites of a model, and its log density, given what else is drawn.

    `padding` says which elements of a summed site have no part in the most probable value of the others.
    """

    def __init__(self, model, params, drawn, padding=None):
        self._model, self._given = model, {**params, **drawn}
        first = self._run({})
        self.sites = {
            name: site
            for name, site in first.items()
            if site["type"] == "sample" and site["infer"].get("enumerate") == "parallel" and name not in drawn
        }
        self.support = {name: np.asarray(finite_parts(bare(site["fn"]))[1]) for name, site in self.sites.items()}
        self.shapes = {
            name: site["value"].shape[: site["value"].ndim - site["fn"].event_dim] for name, site in self.sites.items()
        }
        sizes = [len(self.support[name]) for name, shape in self.shapes.items() for _ in range(int(np.prod(shape)))]
        numbers = np.array(list(itertools.product(*map(range, sizes))), dtype=int).reshape(-1, len(sizes))
        self.outcomes, at = {}, 0
        for name, shape in self.shapes.items():
            n = int(np.prod(shape))
            self.outcomes[name] = numbers[:, at : at + n].reshape(-1, *shape)
            at += n
        padding = {
            name: np.broadcast_to((padding or {}).get(name, False), shape) for name, shape in self.shapes.items()
        }
        logs, own = jax.jit(jax.vmap(self._densities))(self.outcomes)
        self.logs, self.padding = np.asarray(logs), padding
        padded = [
            np.where(padding[name], np.asarray(x), 0.0).reshape(len(numbers), -1).sum(1) for name, x in own.items()
        ]
        self.without = self.logs - sum(padded)

    def _run(self, values):
        with handlers.trace() as found, handlers.substitute(data={**self._given, **values}):
            handlers.seed(self._model, KEY)()
        return found

    def _densities(self, indices):
        values = {name: jnp.asarray(self.support[name])[i] for name, i in indices.items()}
        total, own = 0.0, {}
        for name, site in self._run(values).items():
            if site["type"] == "sample":
                density = (bare(site["fn"]) if name in self.sites else site["fn"]).log_prob(site["value"])
                total += density.sum()
                if name in self.sites:
                    own[name] = jnp.broadcast_to(density, self.shapes[name])
        return total, own

    def probabilities(self):
        weights = np.exp(self.logs - self.logs.max())
        return weights / weights.sum()

    def marginals(self):
        probs = self.probabilities()
        return {
            name: np.einsum("n,n...k->...k", probs, np.eye(len(self.support[name]))[x])
            for name, x in self.outcomes.items()
        }

    def most_probable(self):
        """Return the most probable joint value, of padding that given the others."""
        best = int(np.argmax(self.without))
        agrees = np.ones(len(self.logs), bool)
        for name, x in self.outcomes.items():
            same = (x == x[best]) | self.padding[name]
            agrees &= same.reshape(len(x), -1).all(1)
        best = int(np.argmax(np.where(agrees, self.logs, -np.inf)))
        return {name: self.support[name][x[best]] for name, x in self.outcomes.items()}


def tiny():
    """Laws of other kinds: vectors as values, counts, one category, impossible values, a plate of one, elements without a plate."""

    def model():
        w = numpyro.sample("w", dist.Normal(0.2, 1.0))
        with numpyro.plate("one", 1, dim=-2):
            hot = numpyro.sample("hot", HOST.one_hot(jnp.stack([w, -w, 0.3 * w], -1)), infer=dict(SUM))
            with numpyro.plate("two", 2, dim=-1):
                n = numpyro.sample("n", dist.Binomial(2, logits=hot @ array([0.3, -0.5, 1.0])), infer=dict(SUM))
                numpyro.sample("x", dist.Normal(n + w, 1.0), obs=array([[0.3, 1.8]]))
        same = numpyro.sample("same", dist.Categorical(jnp.ones(1)), infer=dict(SUM))
        b = numpyro.sample("b", dist.Bernoulli(0.3), infer=dict(SUM))
        table = array([[0.0, 0.5, 0.5], [0.4, 0.6, 0.0]])
        c = numpyro.sample("c", dist.Categorical(table[b]), infer=dict(SUM))
        numpyro.sample("y", dist.Normal(c * w + same, 0.7), obs=0.6)
        numpyro.sample("alone", dist.Categorical(array([0.2, 0.5, 0.3])), infer=dict(SUM))

    def guide():
        numpyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


def left_to_right(scanned=True):
    """A chain in which states are left and never entered again, seen with an impossible value of one of them."""
    move = array([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    shown, seen = array([[1.0, 0.0], [0.7, 0.3], [0.2, 0.8]]), jnp.array([0, 1, 0, 1])

    def step(k, x, suffix=""):
        k = numpyro.sample("k" + suffix, dist.Categorical(move[k]), infer=dict(SUM))
        numpyro.sample("x" + suffix, dist.Categorical(shown[k]), obs=x)
        return k, None

    def model():
        numpyro.sample("w", dist.Normal(0.2, 1.0))
        if scanned:
            scan(step, 0, seen)
        else:
            k = 0
            for t in markov(range(4)):
                k, _ = step(k, seen[t], str(t))

    def guide():
        numpyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


def padded(scanned=True):
    """Chains of different length in a plate, whose padding would change the path of what is before it, and a gap in one."""
    x = array([[0.1, 1.9, 0.7], [1.4, 0.6, 0.4], [0.9, 1.6, 0.1]])
    here = jnp.array([[True, True, True], [True, False, False], [False, True, False]])

    def step(k, row, w, suffix=""):
        x, here = row
        with numpyro.plate("sequences", 3), handlers.mask(mask=here):
            law = dist.Bernoulli(probs=jnp.where(k == 1, 0.6, jnp.where(k == 0, 0.02, 0.45)))
            k = numpyro.sample("k" + suffix, law, infer=dict(SUM))
            numpyro.sample("x" + suffix, dist.Normal(k + 0.1 * w, 1.0), obs=x)
        return k, None

    def model():
        w = numpyro.sample("w", dist.Normal(0.2, 1.0))
        k = jnp.full(3, 2)
        if scanned:
            scan(lambda k, row: step(k, row, w), k, (x.T, here.T))
        else:
            for t in markov(range(3)):
                k, _ = step(k, (x[:, t], here[:, t]), w, str(t))

    def guide():
        numpyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


def local_in_scan():
    """A chain with sites of its own steps in a plate below it, and a summed site around it."""
    x = array([[0.1, 1.9], [1.4, 0.6], [0.9, 1.6]])

    def model():
        w = numpyro.sample("w", dist.Normal(0.2, 1.0))
        c = numpyro.sample("c", dist.Bernoulli(0.3), infer=dict(SUM))

        def body(k, x):
            k = numpyro.sample(
                "k", dist.Categorical(logits=jnp.stack(jnp.broadcast_arrays(0 * c, k - c, w * k), -1)), infer=dict(SUM)
            )
            with numpyro.plate("data", 2):
                j = numpyro.sample("j", dist.Bernoulli(logits=0.5 * k - c), infer=dict(SUM))
                numpyro.sample("x", dist.Normal(k + j, 1.0), obs=x)
            return k, None

        scan(body, 0, x)
        numpyro.sample("y", dist.Normal(1.0 - c, 1.0), obs=0.3)

    def guide():
        numpyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


def short_scan(steps):
    """A scan with no rolled steps, or with one."""

    def model():
        w = numpyro.sample("w", dist.Normal(0.2, 1.0))

        def body(k, x):
            k = numpyro.sample("k", dist.Bernoulli(logits=w - 1.5 * k), infer=dict(SUM))
            numpyro.sample("x", dist.Normal(k, 1.0), obs=x)
            return k, None

        scan(body, 0, array([0.2, 1.1, 0.4])[:steps])

    def guide():
        numpyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


PADDING = {
    "masked chain": {},
    "scan under a summed site": {},
    "factorial": {"a2": [False, True], "b2": [False, True]},
    "scan with a plate": {name: [[False] * 2, [False] * 2, [False, True]] for name in ("first", "second", "d")},
    "padded": {"k": [[False, False, False], [False, True, False], [False, True, True]]},
    "padded, unrolled": {"k1": [False, True, False], "k2": [False, True, True]},
}
"""Which elements of a program are masked, and read by none that is not."""


def _prepared(made):
    """Return what returns a program's model, guide and parameters."""

    def prepare():
        program = made()
        return program.summed, program.guide, parameters(program.case)

    return prepare


POSTERIORS = {
    **{name: _prepared(made) for name, made in PROGRAMS.items()},
    "tiny": lambda: (*tiny(), {}),
    "left to right": lambda: (*left_to_right(), {}),
    "left to right, unrolled": lambda: (*left_to_right(False), {}),
    "padded": lambda: (*padded(), {}),
    "padded, unrolled": lambda: (*padded(False), {}),
    "local in scan": lambda: (*local_in_scan(), {}),
    "one step": lambda: (*short_scan(1), {}),
    "two steps": lambda: (*short_scan(2), {}),
}
