"""Programs that draw subsets and rankings, written once for both libraries."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pplgrad.core.structures import permutations, subsets
from pplgrad.testing.programs import ALL, Case, bernoulli, case, values

STRUCTURED: dict[str, Case] = {}
structured: Any = partial(case, into=STRUCTURED)
MATRICES: dict[str, Case] = {}
matrices: Any = partial(case, into=MATRICES)

TWO_OF_THREE = subsets(3, 2)
TWO_OF_FOUR = np.asarray(subsets(4, 2))
THREE_RANKED = permutations(3)
TWO_RANKED = permutations(2)
DISCOUNT = np.array([1.0, 0.6, 0.5])


@structured({"z": ((), 6)}, {"a": (4,), "b": (4,), "w": (4,)}, vectors={"z": TWO_OF_FOUR})
def subset(h):
    def model():
        p = values("subset", h)
        z = h.sample("z", h.subset(2, p["b"]))
        h.sample("x", h.dist.Normal(h.xp.sum(z * p["w"], axis=-1) ** 2, 1.0), obs=h.array(0.7))

    def guide():
        h.sample("z", h.subset(2, values("subset", h)["a"]))

    return model, guide


@structured(
    {"g": ((), 2), "z": ((2,), 3)},
    {"a": (2, 3), "b": (3,), "c": (2,), "w": (3,)},
    vectors={"z": TWO_OF_THREE},
)
def subset_plate(h):
    """A decision, and a subset for each element of a plate, whose logits follow it."""

    def model():
        p = values("subset_plate", h)
        g = h.sample("g", bernoulli(h, p["c"][0]))
        with h.plate("p", 2, dim=-1):
            z = h.sample("z", h.subset(2, p["b"] * (1.0 + g[..., None])))
            h.sample("x", h.dist.Normal(h.xp.sum(z * p["w"], axis=-1) ** 2 + g, 1.0), obs=h.array([0.7, -1.0]))

    def guide():
        p = values("subset_plate", h)
        g = h.sample("g", bernoulli(h, p["c"][1]))
        with h.plate("p", 2, dim=-1):
            h.sample("z", h.subset(2, p["a"] * (0.5 + g[..., None])))

    return model, guide


@structured(
    {"g": ((), 2), "z": ((), 3), "s": ((), 2)},
    {"a": (3,), "b": (3,), "c": (4,), "w": (3,)},
    vectors={"z": TWO_OF_THREE},
)
def subset_chain(h):
    """A subset that follows a decision, and decides about another one."""

    def model():
        p = values("subset_chain", h)
        g = h.sample("g", bernoulli(h, p["c"][0]))
        z = h.sample("z", h.subset(2, p["b"] * (1.0 + g[..., None])))
        s = h.sample("s", bernoulli(h, h.xp.sum(z * p["w"], axis=-1)))
        h.sample("x", h.dist.Normal(s * z[..., 0] + g, 1.0), obs=h.array(0.7))

    def guide():
        p = values("subset_chain", h)
        g = h.sample("g", bernoulli(h, p["c"][1]))
        z = h.sample("z", h.subset(2, p["a"] * (0.5 + g[..., None])))
        h.sample("s", bernoulli(h, p["c"][2] + p["c"][3] * z[..., 1]))

    return model, guide


@structured({"z": ((), 6)}, {"a": (3,), "b": (4,), "w": (4,)}, vectors={"z": TWO_OF_FOUR})
def subset_impossible(h):
    """An item that the guide never chooses."""

    def model():
        p = values("subset_impossible", h)
        z = h.sample("z", h.subset(2, p["b"]))
        h.sample("x", h.dist.Normal(h.xp.sum(z * p["w"], axis=-1) ** 2, 1.0), obs=h.array(0.7))

    def guide():
        a = values("subset_impossible", h)["a"]
        h.sample("z", h.subset(2, h.xp.concat([a, h.array([-np.inf])])))

    return model, guide


STRUCTURED["subset_impossible"] = ALL["subset_impossible"] = replace(
    STRUCTURED["subset_impossible"], impossible={"z": TWO_OF_FOUR[:, 3] > 0}
)


@structured({"g": ((), 2), "r": ((), 6)}, {"a": (3,), "b": (3,), "c": (2,), "w": (3,)}, vectors={"r": THREE_RANKED})
def ranking(h):
    """A ranking that follows a decision."""

    def model():
        p = values("ranking", h)
        g = h.sample("g", bernoulli(h, p["c"][0]))
        r = h.sample("r", h.ranking(p["b"] * (1.0 + g[..., None])))
        gain = h.xp.sum(p["w"][r] * h.array(DISCOUNT), axis=-1)
        h.sample("x", h.dist.Normal(gain**2 + g, 1.0), obs=h.array(0.7))

    def guide():
        p = values("ranking", h)
        g = h.sample("g", bernoulli(h, p["c"][1]))
        h.sample("r", h.ranking(p["a"] * (0.5 + g[..., None])))

    return model, guide


@structured({"g": ((), 2), "r": ((2,), 2)}, {"a": (2, 2), "b": (2,), "c": (2,), "w": (2,)}, vectors={"r": TWO_RANKED})
def ranking_plate(h):
    """A decision, and a ranking for each element of a plate, whose logits follow it."""

    def model():
        p = values("ranking_plate", h)
        g = h.sample("g", bernoulli(h, p["c"][0]))
        with h.plate("p", 2, dim=-1):
            r = h.sample("r", h.ranking(p["b"] * (1.0 + g[..., None])))
            gain = h.xp.sum(p["w"][r] * h.array(DISCOUNT[:2]), axis=-1)
            h.sample("x", h.dist.Normal(gain + g, 1.0), obs=h.array([0.7, -1.0]))

    def guide():
        p = values("ranking_plate", h)
        g = h.sample("g", bernoulli(h, p["c"][1]))
        with h.plate("p", 2, dim=-1):
            h.sample("r", h.ranking(p["a"] * (0.5 + g[..., None])))

    return model, guide


@matrices(
    {"r": ((), 6), "s": ((), 2)},
    {"a": (3,), "b": (3,), "c": (3,), "w": (3,)},
    vectors={"r": np.eye(3)[THREE_RANKED]},
)
def permutation(h):
    """A permutation matrix, and a decision that follows it."""

    def model():
        p = values("permutation", h)
        order = h.sample("r", h.permutation(p["b"]))
        gain = h.xp.sum(h.xp.sum(order * p["w"], axis=-1) * h.array(DISCOUNT), axis=-1)
        s = h.sample("s", bernoulli(h, gain + p["c"][0]))
        h.sample("x", h.dist.Normal(gain**2 + s, 1.0), obs=h.array(0.7))

    def guide():
        p = values("permutation", h)
        order = h.sample("r", h.permutation(p["a"]))
        h.sample("s", bernoulli(h, p["c"][1] + p["c"][2] * order[..., 0, 1]))

    return model, guide


@matrices(
    {"r": ((2,), 2)},
    {"a": (3, 2), "b": (2,), "c": (2,), "w": (2,)},
    subsamples={"p": (3, 2)},
    vectors={"r": np.eye(2)[TWO_RANKED]},
)
def permutation_plate(h):
    """A permutation matrix for each element of a subsampled plate."""

    def model():
        p, x = values("permutation_plate", h), h.array([0.7, -1.0, 0.2])
        with h.plate("p", 3, subsample_size=2, dim=-1) as index:
            order = h.sample("r", h.permutation(p["b"]))
            gain = h.xp.sum(h.xp.sum(order * p["w"], axis=-1) * h.array(DISCOUNT[:2]), axis=-1)
            h.sample("x", h.dist.Normal(p["c"][1] * gain**2 + p["c"][0], 1.0), obs=x[index])

    def guide():
        a = values("permutation_plate", h)["a"]
        with h.plate("p", 3, subsample_size=2, dim=-1) as index:
            h.sample("r", h.permutation(a[index]))

    return model, guide
