"""Programs with counts, written once for both libraries.

An infinite support is cut off where the rest has a probability below 1e-14, which is as far as sums in float64 go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pplgrad.testing.programs import ALL, Case, Host, case, values

COUNTING: dict[str, Case] = {}

counting = partial(case, into=COUNTING)

TOTALS = np.array([2, 3])


def observe(h: Host, mean: Any, data: Any, name: str = "x") -> None:
    """Observe Normal data."""
    h.sample(name, h.dist.Normal(mean, 1.0), obs=h.array(data))


def once_or_never(h: Host, logits: Any) -> Any:
    """Return a binary law that is one of counts."""
    return h.dist.Binomial(1, logits=logits)


LAWS: dict[str, tuple[int, Callable[[Host, Any], Any]]] = {
    "poisson": (15, lambda h, a: h.dist.Poisson(0.4 * h.xp.exp(0.3 * a[0]))),
    "geometric_probs": (21, lambda h, a: h.dist.Geometric(1 - 0.15 * h.xp.exp(0.3 * a[0]))),
    "geometric_logits": (21, lambda h, a: h.dist.Geometric(logits=1.7 + 0.3 * a[0])),
    "binomial_probs": (6, lambda h, a: h.dist.Binomial(5, 0.4 * h.xp.exp(0.3 * a[0]))),
    "binomial_logits": (6, lambda h, a: h.dist.Binomial(5, logits=a[0])),
    "negative_binomial_probs": (32, lambda h, a: h.dist.NegativeBinomial(2.5, 0.1 * h.xp.exp(0.3 * a[0]))),
    "negative_binomial_logits": (32, lambda h, a: h.dist.NegativeBinomial(h.array(2.5), logits=0.3 * a[0] - 1.7)),
    "negative_binomial_failures": (32, lambda h, a: h.dist.NegativeBinomial(h.xp.exp(a[1]), logits=0.3 * a[0] - 1.7)),
    "gamma_poisson_rate": (32, lambda h, a: h.dist.GammaPoisson(2.5, 8 + h.xp.exp(a[0]))),
    "gamma_poisson": (32, lambda h, a: h.dist.GammaPoisson(h.xp.exp(a[1]), 5 + h.xp.exp(a[0]))),
    "beta_binomial": (7, lambda h, a: h.dist.BetaBinomial(h.xp.exp(a[0]), h.xp.exp(a[1]), 6)),
    "zero_inflated": (
        16,
        lambda h, a: h.dist.ZeroInflatedPoisson(rate=h.xp.exp(0.3 * a[0]) / 2, gate=h.array(0.3) + a[1] ** 2 / 20),
    ),
    "zero_inflated_logits": (
        32,
        lambda h, a: h.dist.ZeroInflatedDistribution(
            h.dist.NegativeBinomial(2.5, logits=0.3 * a[0] - 1.7), gate_logits=a[1]
        ),
    ),
    "two_modes": (
        64,
        lambda h, a: h.dist.MixtureSameFamily(
            h.dist.Categorical(logits=h.xp.stack([a[1], 0 * a[1]], axis=-1)),
            h.dist.Poisson(h.xp.exp(h.xp.stack([0.2 * a[0] - 4, 3 - 0.1 * a[1]], axis=-1))),
        ),
    ),
}
"""By name: how many counts are listed, and the law of a pair of parameters.

Counts of 7 and more are rare under the negative binomials: there NumPyro's log density is right to 1.4e-6 alone (JAX's betaln), and no
normalised law, which the closed forms take it for.
"""


def _over_a_binary_site(name: str, size: int, law: Callable[[Host, Any], Any]) -> None:
    """Register a count of a law over a binary count that follows it."""

    def build(h: Host) -> tuple[Callable, Callable]:
        def model() -> None:
            b = values(name, h)["b"]
            n = h.sample("n", law(h, b))
            z = h.sample("z", once_or_never(h, b[2] + 0.1 * n))
            observe(h, 0.3 * n * (1 + z) + 0.01 * n * n, 1.3)

        def guide() -> None:
            a = values(name, h)["a"]
            n = h.sample("n", law(h, a))
            h.sample("z", once_or_never(h, a[2] - a[3] * h.xp.cos(1.0 * n)))

        return model, guide

    build.__name__ = name
    counting({"n": ((), size), "z": ((), 2)}, {"a": (4,), "b": (3,)})(build)


for _name, (_size, _law) in LAWS.items():
    _over_a_binary_site(_name, _size, _law)


@counting({"n": ((2,), 12)}, {"a": (3,), "b": (1,)}, subsamples={"data": (3, 2)})
def counts_subsampled(h):
    """A minibatch in a plate, under a scale."""
    data = np.array([0.3, -0.2, 1.1])

    def model():
        b = values("counts_subsampled", h)["b"]
        with h.plate("data", 3, subsample_size=2, dim=-1) as index, h.scale(1.5):
            n = h.sample("n", h.dist.Poisson(0.3 * h.xp.exp(0.1 * b)))
            observe(h, 0.5 * n, h.array(data)[index])

    def guide():
        a = values("counts_subsampled", h)["a"]
        with h.plate("data", 3, subsample_size=2, dim=-1) as index, h.scale(1.5):
            h.sample("n", h.dist.Poisson(0.2 * h.xp.exp(0.2 * a[index])))

    return model, guide


@counting({"n": ((2,), 23)}, {"a": (2,), "b": (2,)})
def counts_masked(h):
    """One of two elements is masked; gradient reaches both parameters of the law."""

    def site(p):
        return h.sample("n", h.dist.GammaPoisson(h.xp.exp(p), 9 + h.xp.exp(p)))

    def model():
        b = values("counts_masked", h)["b"]
        with h.plate("p", 2, dim=-1), h.mask(np.array([True, False])):
            n = site(b)
            observe(h, 0.5 * n, [0.3, -0.2])

    def guide():
        with h.plate("p", 2, dim=-1), h.mask(np.array([True, False])):
            site(values("counts_masked", h)["a"])

    return model, guide


@counting({"n": ((2,), 12), "z": ((), 2)}, {"a": (4,), "b": (3,)})
def counts_event(h):
    """Two joint counts, under a cost that does not separate, over a binary site."""

    def model():
        b = values("counts_event", h)["b"]
        n = h.sample("n", h.dist.Poisson(0.25 * h.xp.exp(0.2 * b[:2])).to_event(1))
        z = h.sample("z", once_or_never(h, b[2] + 0.1 * n[..., 0]))
        observe(h, n[..., 0] * (0.3 + n[..., 1]) + z, 0.7)

    def guide():
        a = values("counts_event", h)["a"]
        n = h.sample("n", h.dist.Poisson(0.2 * h.xp.exp(0.2 * a[:2])).to_event(1))
        h.sample("z", once_or_never(h, a[2] + a[3] * n[..., 1]))

    return model, guide


@counting({"n": ((2,), 4)}, {"a": (2,), "b": (2,)})
def counts_totals(h):
    """Binomial counts with a total of their own each, that share their cost."""

    def model():
        b = values("counts_totals", h)["b"]
        n = h.sample("n", h.dist.Binomial(h.array(TOTALS), logits=b).to_event(1))
        observe(h, n[..., 0] * (0.3 + n[..., 1]), 0.7)

    def guide():
        h.sample("n", h.dist.Binomial(h.array(TOTALS), logits=values("counts_totals", h)["a"]).to_event(1))

    return model, guide


@counting({"n": ((), 13)}, {"a": (2,), "b": (2,)})
def counts_gap(h):
    """Never, or almost always: the counts between are a million times less probable, and gradient reaches both modes."""

    def site(p):
        often = h.dist.Binomial(12, logits=3 + 0.3 * p[0])
        return h.sample("n", h.dist.ZeroInflatedDistribution(often, gate_logits=p[1]))

    def model():
        n = site(values("counts_gap", h)["b"])
        observe(h, 0.3 * n, 0.7)

    def guide():
        site(values("counts_gap", h)["a"])

    return model, guide


@counting({"n": ((), 4)}, {"a": (2,), "b": (2,)})
def counts_inflated(h):
    """Few counts, over which the weights are sums."""

    def site(p):
        return h.sample("n", h.dist.ZeroInflatedDistribution(h.dist.Binomial(3, logits=p[0]), gate_logits=p[1]))

    def model():
        n = site(values("counts_inflated", h)["b"])
        observe(h, 0.5 * n, 0.7)

    def guide():
        site(values("counts_inflated", h)["a"])

    return model, guide


@counting({"n": ((), 13)}, {"a": (5,), "b": (3,)}, noise={"x": np.array(0.4), "y": np.array(-0.7)})
def counts_between(h):
    """A continuous parent whose path the score carries on, and a continuous site that follows."""

    def model():
        b = values("counts_between", h)["b"]
        x = h.sample("x", h.dist.Normal(b[0], 1.0))
        n = h.sample("n", h.dist.Poisson(0.2 * h.xp.exp(0.2 * x)))
        y = h.sample("y", h.dist.Normal(b[1] * n, 1.0))
        observe(h, y * (1 + b[2] * n), 0.7, "d")

    def guide():
        a = values("counts_between", h)["a"]
        x = h.sample("x", h.dist.Normal(a[0], h.xp.exp(0.1 * a[1])))
        n = h.sample("n", h.dist.Poisson(0.2 * h.xp.exp(0.2 * x * a[2])))
        h.sample("y", h.dist.Normal(a[3] + a[4] * n, 1.0))

    return model, guide


@counting({"n": ((), 11), "k": ((), 20)}, {"a": (3,), "b": (2,)})
def counts_chain(h):
    """A count whose law reads a count before it."""

    def site(p):
        n = h.sample("n", h.dist.Poisson(0.1 * h.xp.exp(0.2 * p[0])))
        return n, h.sample("k", h.dist.GammaPoisson(1 + 0.1 * n, 15 + h.xp.exp(0.3 * p[1])))

    def model():
        n, k = site(values("counts_chain", h)["b"])
        observe(h, (0.3 + n) * k, 0.7)

    def guide():
        site(values("counts_chain", h)["a"])

    return model, guide


def also(name: str, into: dict[str, Case], **more: Any) -> None:
    """Add to what is known of a program."""
    into[name] = ALL[name] = replace(into[name], **more)


also("counts_totals", COUNTING, impossible={"n": np.arange(4) > TOTALS[:, None]})


VECTORS: dict[str, Case] = {}
"""Programs whose counts have a given total, of which no estimator changes one by itself."""

THROWN = np.array([(i, j, 3 - i - j) for i in range(4) for j in range(4 - i)])
"""The ways to share three counts among three categories."""


def _thrown(name: str, law: Callable[[Host, Any], Any]) -> None:
    """Register a vector of counts with a given total."""

    def build(h: Host) -> tuple[Callable, Callable]:
        def model() -> None:
            n = h.sample("n", law(h, 0.5 * values(name, h)["b"]))
            observe(h, 0.3 * n[..., 0] * n[..., 1] - 0.2 * n[..., 2], 0.7)

        def guide() -> None:
            h.sample("n", law(h, values(name, h)["a"]))

        return model, guide

    build.__name__ = name
    case({"n": ((), len(THROWN))}, {"a": (3,), "b": (3,)}, into=VECTORS)(build)
    also(name, VECTORS, vectors={"n": THROWN})


_thrown("multinomial", lambda h, a: h.dist.Multinomial(3, logits=a))
_thrown("dirichlet_multinomial", lambda h, a: h.dist.DirichletMultinomial(h.xp.exp(a), 3))
