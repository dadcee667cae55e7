"""Programs whose guide never draws some of the values, and what is proved on them, the same in both libraries.

What is exact is the gradient of the objective that is enumerated over the values of positive probability.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pplgrad import (
    ARM,
    ARMS,
    CARMS,
    ELBO,
    IWAE,
    OVIS,
    REBAR,
    RELAX,
    RODEO,
    VIMCO,
    DisARM,
    DoubleCV,
    Enumerate,
    Estimator,
    Expectation,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    LocalExpectation,
    MeasureValued,
    MuProp,
    ReinMax,
    ScoreFunction,
    StickBreakingDisARM,
    StraightThrough,
    SumAndSample,
    TreeDisARM,
    UnorderedSet,
)
from pplgrad.core import draw
from pplgrad.core.objectives import CostWeights
from pplgrad.engine import branches
from pplgrad.estimators import antithetic_categorical, without_replacement
from pplgrad.testing.programs import Case

NEVER = np.array([[0, 1, 0], [1, 0, 0], [1, 0, 1]], dtype=bool)
"""Which of three categories are impossible: one in the middle, the first one, all but one."""
NEVER_BINARY = np.array([[0, 0], [0, 1], [1, 0]], dtype=bool)
"""Which of two values are impossible: neither, the second (a probability of 0), the first (a probability of 1)."""

PARAMS = {"a": np.array([[0.3, -0.2, 0.5], [-0.4, 0.1, 0.7], [0.2, 0.6, -0.1]]), "c": np.array([0.4, -0.3])}
MASK = np.where(NEVER, -np.inf, 0.0)
TABLE = np.where(NEVER, -np.inf, np.array([[0.3, -0.7, 1.1], [0.9, 0.2, -0.4], [0.5, -1.2, 0.8]]))
"""The costs of the values: infinite where the guide never goes."""

CASES = {}


def case(latents, impossible, params=PARAMS, one_hot=()):
    def register(build):
        name = build.__name__
        CASES[name] = Case(name, params, latents, build, one_hot=one_hot, impossible=impossible)
        return build

    return register


def given(h, params=PARAMS):
    return {name: h.param(name, h.array(value)) for name, value in params.items()}


def by_probs(h, logits, never):
    """Return probabilities some of which are exactly 0."""
    kept = h.xp.exp(logits) * h.array(~never)
    return kept / h.xp.sum(kept, axis=-1, keepdims=True)


def looked_up(h, table, k):
    return h.xp.take_along_axis(h.array(table), k[..., None], axis=-1)[..., 0]


def elementwise(law):
    """Return a program with three sites in a plate, each with its own impossible values, and their costs in the plate."""

    def build(h):
        def model():
            p = given(h)
            with h.plate("data", 3):
                k = h.sample("k", h.dist.Categorical(probs=by_probs(h, h.array(np.ones((3, 3))) * p["c"][0], NEVER)))
                h.factor("f", looked_up(h, TABLE, k) * (1 + p["c"][1] ** 2))

        def guide():
            with h.plate("data", 3):
                h.sample("k", law(h, given(h)["a"]))

        return model, guide

    return build


def register_elementwise(name, law):
    build = elementwise(law)
    build.__name__ = name
    case({"k": ((3,), 3)}, {"k": NEVER})(build)


register_elementwise("logits", lambda h, a: h.dist.Categorical(logits=a + h.array(MASK)))
register_elementwise("probs", lambda h, a: h.dist.Categorical(probs=by_probs(h, a, NEVER)))


@case({"k": ((2,), 3), "w": ((), 2)}, {"k": NEVER[:2]})
def joint(h):
    """Two elements that share a cost that does not separate, and a site that follows."""

    def model():
        p = given(h)
        k = h.sample("k", h.dist.Categorical(probs=by_probs(h, h.array(np.zeros((2, 3))), NEVER[:2])).to_event(1))
        x = looked_up(h, TABLE[:2], k)
        w = h.sample("w", h.dist.Bernoulli(logits=p["c"][0] * x[..., 1]))
        # A sum, and a product that is never one of 0 and −inf.
        h.factor("f", x[..., 0] * (0.3 + w) + p["c"][1] * x[..., 1] + x[..., 0] * h.xp.exp(x[..., 1]))

    def guide():
        p = given(h)
        k = h.sample("k", h.dist.Categorical(logits=(p["a"] + h.array(MASK))[:2]).to_event(1))
        h.sample("w", h.dist.Bernoulli(logits=0.5 * k[..., 0] - p["c"][0]))

    return model, guide


@case({"k": ((3,), 3)}, {"k": NEVER}, one_hot=("k",))
def one_hot(h):
    def model():
        p = given(h)
        with h.plate("data", 3):
            k = h.sample("k", h.one_hot(h.array(MASK) + p["c"][0]))
            x = (k * h.array(np.where(NEVER, 7.0, TABLE))).sum(-1)
            h.factor("f", x * x * (1 + p["c"][1]))

    def guide():
        with h.plate("data", 3):
            h.sample("k", h.one_hot(given(h)["a"] + h.array(MASK)))

    return model, guide


def binary_probs(h, logits):
    """Return probabilities of which the second is exactly 0 and the third exactly 1."""
    return h.array([1.0, 0.0, 0.0]) / (1 + h.xp.exp(-logits)) + h.array([0.0, 0.0, 1.0])


def cost_of_three(h, z, p):
    return (z[..., 0] - 0.3) * (z[..., 1] + 0.8) * (z[..., 2] + p["c"][0]) + z[..., 0] * p["c"][1]


@case({"z": ((3,), 2), "w": ((), 2)}, {"z": NEVER_BINARY})
def binary(h):
    def model():
        p = given(h)
        z = h.sample("z", h.dist.Bernoulli(probs=binary_probs(h, p["c"][0])).to_event(1))
        w = h.sample("w", h.dist.Bernoulli(logits=z[..., 0] - 0.4))
        h.factor("f", cost_of_three(h, z, p) * (1 + w))

    def guide():
        p = given(h)
        z = h.sample("z", h.dist.Bernoulli(probs=binary_probs(h, p["a"][0])).to_event(1))
        h.sample("w", h.dist.Bernoulli(logits=0.3 * z[..., 0] + p["a"][1, 0]))

    return model, guide


@case({"z": ((3,), 2)}, {"z": NEVER_BINARY})
def binary_cost(h):
    """Costs that are −inf at what the guide never draws, in a plate."""

    def model():
        p = given(h)
        with h.plate("data", 3):
            z = h.sample("z", h.dist.Bernoulli(probs=binary_probs(h, p["c"][0])))
            never = h.array([0.0, 1.0, 0.0]) * z + h.array([0.0, 0.0, 1.0]) * (1 - z)
            h.factor("f", h.xp.log(1 - never) + z * p["c"][1])

    def guide():
        with h.plate("data", 3):
            h.sample("z", h.dist.Bernoulli(probs=binary_probs(h, given(h)["a"][0])))

    return model, guide


@case({"z": ((3,), 2)}, {"z": NEVER_BINARY})
def binary_logits(h):
    """Log odds of −inf and inf."""
    sure = np.array([0.0, -np.inf, np.inf])

    def model():
        p = given(h)
        z = h.sample("z", h.dist.Bernoulli(probs=binary_probs(h, p["c"][0])).to_event(1))
        h.factor("f", cost_of_three(h, z, p))

    def guide():
        h.sample("z", h.dist.Bernoulli(logits=given(h)["a"][0] + h.array(sure)).to_event(1))

    return model, guide


@case(
    {"k": ((), 5)}, {"k": np.array([1, 0, 1, 0, 0], dtype=bool)}, params={"a": np.arange(5) / 4, "c": np.array([0.4])}
)
def five(h):
    """More categories than are gone through one by one; the model knows fewer of them than the guide."""
    never = np.array([1, 0, 1, 0, 0], dtype=bool)
    params = {"a": np.arange(5) / 4, "c": np.array([0.4])}
    table = np.where(never, np.nan, [0.0, 0.7, 0.0, -0.4, 1.3])

    def model():
        p = given(h, params)
        k = h.sample("k", h.dist.Categorical(logits=h.array(np.zeros(5))))
        h.factor("f", h.xp.reshape(h.xp.take(h.array(table), h.xp.reshape(k, (-1,))), k.shape) * p["c"][0])

    def guide():
        h.sample("k", h.dist.Categorical(logits=given(h, params)["a"] + h.array(np.where(never, -np.inf, 0.0))))

    return model, guide


@case({"k": ((), 3)}, {"k": NEVER[1]}, one_hot=("k",))
def alone(h):
    """A single one-hot vector whose first category is impossible."""

    def model():
        p = given(h)
        k = h.sample("k", h.one_hot(h.array(MASK[1]) + p["c"][0]))
        x = (k * h.array([7.0, 0.2, -0.4])).sum(-1)
        h.factor("f", x * x * (1 + p["c"][1]))

    def guide():
        h.sample("k", h.one_hot(given(h)["a"][0] + h.array(MASK[1])))

    return model, guide


@case({"z": ((2,), 2)}, {"z": NEVER_BINARY[:2]})
def binary_alone(h):
    """Two binary elements, the second of which is never 1."""

    def draw(logits):
        probs = h.array([1.0, 0.0]) / (1 + h.xp.exp(-logits))
        return h.sample("z", h.dist.Bernoulli(probs=probs).to_event(1))

    def model():
        p = given(h)
        z = draw(p["c"])
        h.factor("f", (z[..., 0] - 0.3) * (z[..., 1] + 0.8) * p["c"][0])

    def guide():
        draw(given(h)["a"][0, :2])

    return model, guide


FITS = {"five": {"five"}, "alone": {"one_hot"}, "binary_alone": {"binary"}}
"""An estimator fits a small program if it is proved on one of these."""
CATEGORICAL = ["logits", "probs", "joint", "five", "one_hot"]
BINARY = ["binary", "binary_cost"]
ANY = [*CATEGORICAL, *BINARY]

EXACT = {
    "score": (ScoreFunction(), ANY),
    "local": (LocalExpectation(), ANY),
    "enumerate": (Enumerate(), ANY),
    "measure": (MeasureValued(), ANY),
    "samples": (ScoreFunction(samples=2), ["logits", "five", "binary"]),
    "set": (UnorderedSet(2), ANY),
    "set3": (UnorderedSet(3), ["logits", "five"]),
    "sum": (SumAndSample(2), ANY),
    "sum3": (SumAndSample(3), ["probs", "five"]),
    "stick": (StickBreakingDisARM(), ["logits", "five", "one_hot", "binary"]),
    "tree": (TreeDisARM(), ["probs", "five", "one_hot", "binary"]),
    "disarm": (DisARM(), BINARY),
    "muprop": (MuProp(), ["one_hot", "binary"]),
    "double-cv": (DoubleCV(2, scale=0.7, learn=False), ["one_hot", "binary"]),
    "double-cv-learns": (DoubleCV(2, scale=0.7), ["one_hot"]),
    "rodeo": (RODEO(2, learn=False), ["one_hot", "binary"]),
    "rodeo-learns": (RODEO(2), ["one_hot"]),
}
"""Estimators with finite noise."""

RANDOM = {
    "arm": (ARM(), BINARY),
    "arms": (ARMS(3), BINARY),
    "carms": (CARMS(3), ["logits", "probs", "joint", "five", "one_hot", "binary"]),
    "rebar": (REBAR(0.5, 0.8, learn=False), ["one_hot", "binary"]),
    "rebar-learns": (REBAR(0.5, 0.8), ["one_hot", "binary"]),
    "relax": (RELAX(0.5, hidden=4), ["one_hot", "binary"]),
}
"""Estimators with uniform noise."""

BIASED = {
    "softmax": GumbelSoftmax(0.01),
    "hard": GumbelSoftmax(2.0, hard=True),
    "straight": StraightThrough(),
    "rao": GumbelRao(3, 0.5),
    "reinmax": ReinMax(1.5),
    "gapped": GappedStraightThrough(0.7, 0.4),
}
"""Relaxations, whose gradient is finite, and zero along what is impossible."""

OBJECTIVES = {
    "elbo": (ELBO(), 1, CostWeights(1.0, 1.0, 1.0)),
    "expectation": (Expectation(), 1, CostWeights(1.0, 0.0, 0.0)),
    "iwae": (IWAE(plates=()), 2, None),
}
"""Objectives, their particles, and how the densities count in them."""

SMALL = ["five", "alone", "binary_alone"]
"""Programs of few outcomes, for objectives of two particles."""
COMBINED = {
    "vimco": (VIMCO(), [*SMALL, "probs"]),
    "ovis": (OVIS(), SMALL),
    "ovis-samples": (OVIS(samples=1), SMALL),
}
"""Estimators of objectives that combine particles."""
MANY = {("set", "joint"), ("sum", "joint"), ("samples", "binary"), ("double-cv", "binary"), ("rodeo", "binary")}
MANY |= {(short, name) for short in ("stick", "tree") for name in ("logits", "probs", "one_hot", "binary")}
MANY |= {("set3", "logits"), ("sum3", "probs")}
"""Whose outcomes go into the thousands, for the library that goes through them one by one."""
QUICK = {
    ("local", "logits"),
    ("sum", "probs"),
    ("set", "five"),
    ("disarm", "binary_cost"),
    ("muprop", "one_hot"),
    ("score", "probs"),
}


def table(objective, with_infinite_odds=False, left_out=()):
    """Return every estimator with finite noise and each of its programs: (short, estimator, program)."""
    rows = {**EXACT, **COMBINED} if objective == "iwae" else EXACT
    found = []
    for short, (estimator, names) in rows.items():
        if objective != "iwae" and with_infinite_odds and "binary" in names:
            names = [*names, "binary_logits"]
        if objective == "iwae":
            fits = not estimator.enumerates  # A bound has no joint sum.
            names = [name for name in SMALL if fits and (short in COMBINED or set(names) & FITS[name])]
        found += [(short, estimator, name) for name in names if (short, name) not in left_out]
    return found


def infinite_at_what_is_drawn(h):
    """Return a program whose cost is −inf at a value that the guide does draw, though seldom."""

    def model():
        k = h.sample("k", h.dist.Categorical(logits=h.array([0.0, 0.0, 0.0])))
        h.factor("f", h.array([0.3, 0.7, -np.inf])[k])

    def guide():
        h.sample("k", h.dist.Categorical(logits=h.param("a", h.array([0.0, 0.2, -40.0]))))

    return model, guide


@dataclass(frozen=True)
class Mutant:
    """A guard that is missing: `apply(monkeypatch)` takes it away, `case` under `estimator` shows it."""

    apply: Callable[[Any], None]
    case: str
    estimator: Estimator


MUTANTS: dict[str, Mutant] = {}


def mutant(case_, estimator):
    def register(apply):
        MUTANTS[apply.__name__] = Mutant(apply, case_, estimator)
        return apply

    return register


@mutant("logits", LocalExpectation())
def programs_run_at_impossible_values(patch):
    """Their infinite costs meet probabilities of 0."""
    patch.setattr(draw, "is_possible", lambda xp, log_probs: log_probs == log_probs)


@mutant("one_hot", LocalExpectation())
def log_probabilities_stay_infinite(patch):
    patch.setattr(draw, "bounded", lambda xp, log_probs: log_probs)
    patch.setattr(draw.Draw, "embed", lambda self, index: self._host.embed(self._axes.scatter(self.ops.xp, index, 2)))


@mutant("binary", MuProp())
def slopes_along_impossible_categories_count(patch):
    """Whatever the program's slope is there: here as if it were infinite."""
    patch.setattr(
        branches, "_where_possible", lambda draw, slopes: draw.ops.xp.where(draw.possible[:, None], slopes, np.inf)
    )


@mutant("five", StickBreakingDisARM())
def decisions_about_impossible_categories_are_open(patch):
    """A partner may then end at an impossible category, and the decisions on the way are credited."""
    plain = antithetic_categorical._log_odds

    def log_odds(ops, log_probs, table):
        odds, yes, no = plain(ops, log_probs, table)
        return odds, yes | True, no | True

    patch.setattr(antithetic_categorical, "_log_odds", log_odds)


@mutant("five", UnorderedSet(5))
def sets_that_hold_all_that_is_possible_are_never_drawn(patch):
    """The rest of a set that nothing more can join has probability 0 instead of 1."""
    plain = without_replacement._rest_probabilities

    def rest(ops, probs):
        found = plain(ops, probs)
        return (found[0] * 0, *found[1:])

    patch.setattr(without_replacement, "_rest_probabilities", rest)
