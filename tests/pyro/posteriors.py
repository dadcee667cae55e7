"""The posterior of summed sites by brute force: the plain model, run once for each joint value, without any enumeration of Pyro's."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.indexing import Vindex

from pplgrad.testing.in_pyro import fresh
from tests.pyro.marginal import PROGRAMS, SUM


def _density(site, summed):
    """Return a site's log density without its scale, and without its mask if it is summed."""
    fn = site["fn"]
    while summed and isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    found = fn.log_prob(site["value"])
    return found if summed else scale_and_mask(found, mask=site["mask"])


def _run(model, values):
    given = poutine.Trace()
    for name, value in values.items():
        given.add_node(
            name, type="sample", name=name, value=value, is_observed=False, infer={}, fn=None, args=(), kwargs={}
        )
    return poutine.trace(poutine.replay(model, trace=given)).get_trace()


class Posterior:
    """Every joint value of the summed sites of a model, and its log density, given what else is drawn.

    `padding` says which elements of a summed site have no part in the most probable value of the others.
    """

    def __init__(self, model, drawn, padding=None):
        first = _run(model, drawn)
        sites = {
            name: site
            for name, site in first.nodes.items()
            if site["type"] == "sample" and site["infer"].get("enumerate") == "parallel" and name not in drawn
        }
        self.support, places = {}, []
        for name, site in sites.items():
            support = site["fn"].enumerate_support(expand=False)
            self.support[name] = support.reshape(len(support), *site["fn"].event_shape)
            places += [(name, i) for i in range(site["fn"].batch_shape.numel())]
        self.shapes = {name: site["fn"].batch_shape for name, site in sites.items()}
        self.padding = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        self.padding.update(padding or {})
        self.outcomes, logs, without = [], [], []
        for numbers in itertools.product(*(range(len(self.support[name])) for name, _ in places)):
            indices = {name: torch.zeros(shape, dtype=torch.long) for name, shape in self.shapes.items()}
            for (name, i), number in zip(places, numbers, strict=True):
                indices[name].view(-1)[i] = number
            trace = _run(model, {**drawn, **{name: self.support[name][x] for name, x in indices.items()}})
            densities = {
                name: _density(site, name in sites)
                for name, site in trace.nodes.items()
                if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
            }
            self.outcomes.append(indices)
            logs.append(sum(x.sum() for x in densities.values()))
            padded = sum(densities[name][x].sum() for name, x in self.padding.items() if x.any())
            without.append(logs[-1] - padded)
        self.logs, self.without = torch.stack(logs).detach(), torch.stack(without).detach()

    def probabilities(self):
        return self.logs.softmax(0)

    def marginals(self):
        found = {}
        for name, shape in self.shapes.items():
            hot = torch.stack([torch.nn.functional.one_hot(x[name], len(self.support[name])) for x in self.outcomes])
            found[name] = (self.probabilities().reshape(-1, *[1] * (len(shape) + 1)) * hot).sum(0)
        return found

    def most_probable(self):
        """Return the most probable joint value, of padding that given the others."""
        best = self.outcomes[int(self.without.argmax())]
        agrees = [all((x == best[name])[~self.padding[name]].all() for name, x in one.items()) for one in self.outcomes]
        best = self.outcomes[int(self.logs.where(torch.tensor(agrees), torch.tensor(-torch.inf)).argmax())]
        return {name: self.support[name][x] for name, x in best.items()}


def tiny():
    """Laws of other kinds: vectors as values, counts, one category, a support that is expanded, impossible values, a plate of one."""

    def model():
        w = pyro.sample("w", dist.Normal(0.2, 1.0))
        with pyro.plate("one", 1, dim=-2):
            hot = pyro.sample("hot", dist.OneHotCategorical(logits=torch.stack([w, -w, 0.3 * w], -1)), infer=dict(SUM))
            with pyro.plate("two", 2, dim=-1):
                n = pyro.sample("n", dist.Binomial(2, logits=hot @ torch.tensor([0.3, -0.5, 1.0])), infer=dict(SUM))
                pyro.sample("x", dist.Normal(n + w, 1.0), obs=torch.tensor([[0.3, 1.8]]))
        same = pyro.sample("same", dist.Categorical(torch.ones(1)), infer=dict(SUM))
        b = pyro.sample("b", dist.Bernoulli(0.3), infer={**SUM, "expand": True})
        table = torch.tensor([[0.0, 0.5, 0.5], [0.4, 0.6, 0.0]])
        c = pyro.sample("c", dist.Categorical(table[b.long()]), infer={**SUM, "expand": True})
        pyro.sample("y", dist.Normal(c * w + same, 0.7), obs=torch.tensor(0.6))
        pyro.sample("alone", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])), infer=dict(SUM))

    def guide():
        pyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


def left_to_right():
    """A chain in which states are left and never entered again, seen with an impossible value of one of them."""
    move = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    seen = torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.2, 0.8]])

    def model():
        pyro.sample("w", dist.Normal(0.2, 1.0))
        k = torch.tensor(0)
        for t, x in zip(pyro.markov(range(4)), [0.0, 1.0, 0.0, 1.0], strict=False):
            k = pyro.sample(f"k{t}", dist.Categorical(Vindex(move)[k]), infer=dict(SUM))
            pyro.sample(f"x{t}", dist.Categorical(Vindex(seen)[k]), obs=torch.tensor(x))

    def guide():
        pyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


def second_order():
    """A chain of order two beside a plate, whose first two states a plate of data reads."""

    def model():
        w = pyro.sample("w", dist.Normal(0.2, 1.0))
        a = b = torch.tensor(0.0)
        for t in pyro.markov(range(4), history=2):
            a, b = b, pyro.sample(f"b{t}", dist.Bernoulli(logits=0.8 * a - 1.1 * b + w), infer=dict(SUM))
            with pyro.plate(f"data{t}", 2):
                pyro.sample(f"x{t}", dist.Normal(b - a, 1.0), obs=torch.tensor([0.2, 1.1 * t]))

    def guide():
        pyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


def padded():
    """Chains of different length in a plate, whose padding would change the path of what is before it, and a masked law in one."""
    x = torch.tensor([[0.1, 1.9, 0.7], [1.4, 0.6, 0.4], [0.9, 1.6, 0.1]])
    length = torch.tensor([3, 1, 2])

    def model():
        w = pyro.sample("w", dist.Normal(0.2, 1.0))
        with pyro.plate("sequences", 3):
            k = torch.tensor(0.0)
            for t in pyro.markov(range(3)):
                law = dist.Bernoulli(probs=torch.where(k == 1, 0.6, 0.02))
                if t == 2:
                    k = pyro.sample("k2", law.mask(t < length), infer=dict(SUM))
                else:
                    with poutine.mask(mask=t < length):
                        k = pyro.sample(f"k{t}", dist.Bernoulli(0.45) if t == 0 else law, infer=dict(SUM))
                with poutine.mask(mask=t < length):
                    pyro.sample(f"x{t}", dist.Normal(k + 0.1 * w, 1.0), obs=x[:, t])

    def guide():
        pyro.sample("w", dist.Normal(0.1, 0.5))

    return model, guide


PADDING = {
    "masked chain": {"k4": torch.tensor(True)},
    "factorial": {"a2": torch.tensor([False, True]), "b2": torch.tensor([False, True])},
    "padded": {"k1": torch.tensor([False, True, False]), "k2": torch.tensor([False, True, True])},
}
"""Which elements of a program are masked, and read by none that is not."""


def _prepared(made):
    """Return what clears the param store for a program, and returns its model and guide."""

    def prepare():
        program = made()
        fresh(program.case)
        return program.summed, program.guide

    return prepare


POSTERIORS = {
    **{name: _prepared(made) for name, made in PROGRAMS.items()},
    "tiny": tiny,
    "left to right": left_to_right,
    "second order": second_order,
    "padded": padded,
}
