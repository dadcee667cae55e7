"""Programs for `Enumerate()`, the same in both libraries, and broken variants that the checks must catch.

Where every discrete site of a program has it, one step has the exact gradient, whatever is drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pplgrad import DisARM, Enumerate, Estimator, LocalExpectation, Reparam, ScoreFunction
from pplgrad.engine import joint_sums, surrogate
from pplgrad.testing.programs import CASES, Case, bernoulli, case, values

COUPLED: dict[str, Case] = {}
X = np.array([0.3, -1.1, 2.0])


def look_up(h, table, index):
    """Return the rows of a table at numbers of categories, with plain operations: sums of one-hot weights."""
    numbers = h.array(np.arange(table.shape[0]))
    weights = h.xp.where(h.xp.asarray(index)[..., None] == numbers, 1.0, 0.0)
    return (weights[..., None] * table).sum(-2)


@case({"z1": ((), 2), "z2": ((), 3), "w": ((3,), 2)}, {"m": (), "a": (), "b": (2, 3), "c": (3,)}, into=COUPLED)
def three_coupled(h):
    """Each law and the density of the data read all that was drawn before; the last site is in a plate."""

    def model():
        m = values("three_coupled", h)["m"]
        z1 = h.sample("z1", bernoulli(h, h.array(-0.8)))
        rows = look_up(h, h.array([[0.2, -0.3, 0.1], [0.1, 0.4, -0.6]]), z1)
        z2 = h.sample("z2", h.dist.Categorical(logits=rows))
        with h.plate("data", 3):
            w = h.sample("w", bernoulli(h, 0.3 * z1 - 0.2))
            h.sample("x", h.dist.Normal(m * z1 + h.xp.sin(1.0 * z2) * w + w * z1, 1.0), obs=h.array(X))

    def guide():
        p = values("three_coupled", h)
        z1 = h.sample("z1", bernoulli(h, p["a"]))
        z2 = h.sample("z2", h.dist.Categorical(logits=look_up(h, p["b"], z1)))
        with h.plate("data", 3):
            h.sample("w", bernoulli(h, p["c"] * (1.0 + z1) + 0.3 * z2))

    return model, guide


@case({"z": ((3,), 2), "w": ((3,), 2)}, {"a": (3,), "b": (3,), "m": (3,)}, into=COUPLED)
def through_a_sum(h):
    """Two sites in one plate, coupled element by element, and the elements of the first through a sum as well."""

    def model():
        m = values("through_a_sum", h)["m"]
        with h.plate("data", 3):
            z = h.sample("z", bernoulli(h, m[0]))
            w = h.sample("w", bernoulli(h, 0.4 * z - 0.1))
            h.sample("x", h.dist.Normal(z * (1.0 + w), 1.0), obs=h.array(X))
        h.sample("y", h.dist.Normal(m[1] * h.xp.sin(h.xp.sum(1.0 * z, axis=-1, keepdims=True)), 1.0), obs=h.array(0.4))

    def guide():
        p = values("through_a_sum", h)
        with h.plate("data", 3):
            z = h.sample("z", bernoulli(h, p["a"]))
            h.sample("w", bernoulli(h, p["b"] * (z - 0.3)))

    return model, guide


@case({f"z{t}": ((), 3) for t in range(4)}, {"a": (4, 3), "t": (3, 3), "m": (3,)}, into=COUPLED)
def chain_in_the_model(h):
    """Sites that are independent in the guide and neighbours in the model: sums over pairs."""

    def model():
        p = values("chain_in_the_model", h)
        before = None
        for t in range(4):
            logits = p["t"][0] if before is None else look_up(h, p["t"], before)
            before = h.sample(f"z{t}", h.dist.Categorical(logits=logits))
            loc = look_up(h, p["m"][:, None], before)[..., 0]
            h.sample(f"x{t}", h.dist.Normal(loc, 1.0), obs=h.array(0.3 * t - 0.2))

    def guide():
        a = values("chain_in_the_model", h)["a"]
        for t in range(4):
            h.sample(f"z{t}", h.dist.Categorical(logits=a[t]))

    return model, guide


@case({"g": ((), 2), "z": ((2,), 2), "w": ((2,), 2)}, {"a": (3,), "b": (4,)}, subsamples={"data": (3, 2)}, into=COUPLED)
def minibatch_under_a_scale(h):
    """A global site and two local ones in a subsampled plate, under a scale and a mask: costs are scaled, probabilities are not."""

    def model():
        b = values("minibatch_under_a_scale", h)["b"]
        g = h.sample("g", bernoulli(h, b[0]))
        with h.scale(1.7), h.plate("data", 3, subsample_size=2) as index:
            z = h.sample("z", bernoulli(h, b[1] * g))
            with h.mask(np.array([True, False])):
                w = h.sample("w", bernoulli(h, b[2] * z))
            data = h.array(X)[index]
            h.sample("x", h.dist.Normal(b[3] * z + w - g, 1.0), obs=data)

    def guide():
        a = values("minibatch_under_a_scale", h)["a"]
        g = h.sample("g", bernoulli(h, a[0]))
        with h.scale(1.7), h.plate("data", 3, subsample_size=2):
            z = h.sample("z", bernoulli(h, a[1] * (1 + g)))
            with h.mask(np.array([True, False])):
                h.sample("w", bernoulli(h, a[2] + 0.5 * z - g))

    return model, guide


@case({"z": ((), 2), "k": ((), 3)}, {"a": (), "b": (2, 3)}, into=COUPLED)
def possible_after_one(h):
    """Which values the second site can take depends on the first; the cost is infinite where it cannot go."""
    never = np.array([[0.0, -np.inf, 0.0], [-np.inf, 0.0, -np.inf]])

    def model():
        z = h.sample("z", bernoulli(h, h.array(0.2)))
        k = h.sample("k", h.dist.Categorical(logits=h.array([0.1, 0.3, -0.2])))
        allowed = h.xp.where((z == 0) == (k == 1), -np.inf, 0.7 * k - z)
        h.factor("f", allowed)

    def guide():
        p = values("possible_after_one", h)
        z = h.sample("z", bernoulli(h, p["a"]))
        table = p["b"]
        rows = h.xp.where(h.xp.asarray(z)[..., None] == 0, table[0] + h.array(never[0]), table[1] + h.array(never[1]))
        h.sample("k", h.dist.Categorical(logits=rows))

    return model, guide


def loss_after_one(h, p):
    """Return the loss of `possible_after_one`: the sum over its three outcomes, written out."""
    z0, z1 = -h.xp.log1p(h.xp.exp(p["a"])), -h.xp.log1p(h.xp.exp(-p["a"]))
    first, last = p["b"][0, 0], p["b"][0, 2]
    whole = h.xp.logaddexp(first, last)
    prior_z = (-np.log1p(np.exp(0.2)), -np.log1p(np.exp(-0.2)))
    prior_k = np.array([0.1, 0.3, -0.2]) - np.log(np.exp([0.1, 0.3, -0.2]).sum())
    total = 0.0
    for z, k, log_q in ((0, 0, z0 + first - whole), (0, 2, z0 + last - whole), (1, 1, z1)):
        total = total - h.xp.exp(log_q) * (float(prior_z[z] + prior_k[k]) + 0.7 * k - z - log_q)
    return total


@case(
    {"s": ((), 2), "e": ((), 2), "f": ((), 2), "t": ((), 2), "u": ((), 2)},
    {"a": (9,), "b": (6,)},
    noise={"x": np.array(0.37)},
    into=COUPLED,
)
def beside_others(h):
    """A sampled site in front, two that are summed over, a continuous one between them, and sampled ones behind and beside."""

    def model():
        b = values("beside_others", h)["b"]
        s = h.sample("s", bernoulli(h, b[0]))
        e = h.sample("e", bernoulli(h, b[1] * s))
        x = h.sample("x", h.dist.Normal(b[2] * e, 1.0))
        f = h.sample("f", bernoulli(h, b[3] * x))
        t = h.sample("t", bernoulli(h, 0.3 * f - 0.2 * e))
        u = h.sample("u", bernoulli(h, h.array(0.1)))
        h.sample("obs", h.dist.Normal(b[4] * t * e + f * u * s + b[5] * x * u, 1.0), obs=h.array(0.9))

    def guide():
        a = values("beside_others", h)["a"]
        u = h.sample("u", bernoulli(h, a[7]))
        s = h.sample("s", bernoulli(h, a[0] + 0.2 * u))
        e = h.sample("e", bernoulli(h, a[1] * (1 + s)))
        x = h.sample("x", h.dist.Normal(a[2] + a[3] * e, h.xp.exp(0.3 * a[4])))
        f = h.sample("f", bernoulli(h, a[5] * x + e))
        h.sample("t", bernoulli(h, a[6] * f - a[8] * e))

    return model, guide


ALONE = [name for name, one in {**COUPLED, **CASES}.items() if not one.noise and name != "possible_after_one"]
"""Programs of which every site is summed over."""

USUAL = {*COUPLED, "single", "hierarchy", "event", "one_hot"}


def marked(name: str) -> Any:
    """Return a program's name, as slow if it is not one of the usual ones."""
    return pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive)


BETWEEN = {
    "score": {"s": ScoreFunction(), "t": ScoreFunction(), "u": ScoreFunction()},
    "disarm": {"s": DisARM(), "t": DisARM(), "u": LocalExpectation()},
    "one": {"s": Enumerate(), "t": ScoreFunction(), "u": DisARM()},
    "front": {"s": LocalExpectation(), "t": Enumerate(), "u": ScoreFunction()},
}
"""The estimators of the other sites of `beside_others`."""


def chosen(name: str) -> dict[str, Estimator]:
    """Return the estimators of a program's sites: those of `beside_others` by their short name."""
    if name in BETWEEN:
        return {"x": Reparam(), "e": Enumerate(), "f": Enumerate(), **BETWEEN[name]}
    return {"*": Enumerate()}


@dataclass(frozen=True)
class Mutant:
    """A broken variant: `apply(monkeypatch)` breaks it, one of `ALONE` or of `BETWEEN` shows it."""

    apply: Callable[[Any], None]
    shown_by: str


MUTANTS: dict[str, Mutant] = {}


def mutant(shown_by):
    def register(apply):
        MUTANTS[apply.__name__] = Mutant(apply, shown_by)
        return apply

    return register


def patched(monkeypatch, owner, name, make):
    monkeypatch.setattr(owner, name, make(getattr(owner, name)))


@mutant("three_coupled")
def one_combination_dropped(monkeypatch):
    def make(real):
        def table(self, at_draw, rows, places):
            if rows is not None and len(self._sum.sizes) > 2:
                rows = (
                    rows.at[:, -1].set(0.0)
                    if hasattr(rows, "at")
                    else self._ops.xp.concat([rows[:, :-1], 0 * rows[:, -1:]], axis=1)
                )
            return real(self, at_draw, rows, places)

        return table

    patched(monkeypatch, joint_sums._Averages, "_table", make)


@mutant("three_coupled")
def later_probability_left_out(monkeypatch):
    patched(
        monkeypatch,
        joint_sums._Averages,
        "_weight",
        lambda real: lambda self, places: real(self, places[:-1]) if len(places) > 1 else real(self, places),
    )


@mutant("minibatch_under_a_scale")
def scale_dropped(monkeypatch):
    """The costs of rows are divided by the scale of their plate."""

    def make(real):
        def of(self, number, places, held):
            found = real(self, number, places, held)
            return found / 1.7 if len(places) > 1 else found

        return of

    patched(monkeypatch, joint_sums._Averages, "of", make)


@mutant("through_a_sum")
def elements_at_once(monkeypatch):
    """All elements of a plate change at once, although a cost mixes them."""
    patched(
        monkeypatch,
        joint_sums,
        "_draw",
        lambda real: lambda ops, run, host, number, site, plates: real(ops, run, host, number, site, site.plates),
    )


@mutant("three_coupled")
def probabilities_are_constant(monkeypatch):
    patched(
        monkeypatch,
        joint_sums._Averages,
        "_weight",
        lambda real: lambda self, places: self._ops.stop_gradient(real(self, places)),
    )


@mutant("score")
def what_follows_gets_the_average(monkeypatch):
    """A draw that follows a sum gets the averaged cost, which does not depend on it."""
    monkeypatch.setattr("pplgrad.engine.layout.Layout.follows_sum", lambda self, site: False)


@mutant("three_coupled")
def costs_are_constant(monkeypatch):
    def make(real):
        return lambda ops, joints, sites, run, host, held, finite: real(
            ops, joints, sites, run, host, [True] * len(held), finite
        )

    patched(monkeypatch, surrogate, "summed", make)
