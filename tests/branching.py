"""Which estimators that run branches are proved on which programs, the same in both libraries."""

import pytest

from pplgrad import (
    ARM,
    ARMS,
    CARMS,
    REBAR,
    RELAX,
    RODEO,
    CountDifference,
    DisARM,
    DoubleCV,
    LocalExpectation,
    MeasureValued,
    Mirrored,
    MuProp,
    ScoreFunction,
    StickBreakingDisARM,
    SumAndSample,
    TreeDisARM,
    UnorderedSet,
)
from pplgrad.testing.programs import CASES

# Without nested_plates: its cells go into the thousands.
FINITE = [name for name in CASES if name not in ("nested_plates", "five")]
BINARY = [name for name in FINITE if all(size == 2 for _, size in CASES[name].latents.values())]
RELAXABLE = [*BINARY, "one_hot"]
SETS = ["single", "hierarchy", "event", "subsampled", "mixed", "categorical_index", "one_hot", "counts"]

EXACT = {
    "local": (LocalExpectation(), [*FINITE, "five"]),
    "disarm": (DisARM(), BINARY),
    "samples2": (ScoreFunction(samples=2), [*FINITE, "five"]),
    "samples3": (ScoreFunction(samples=3), ["single", "independent", "categorical_index"]),
    "muprop": (MuProp(), RELAXABLE),
    "double-cv": (DoubleCV(2, scale=1.0, learn=False), RELAXABLE),
    "double-cv3": (DoubleCV(3, scale=0.7), ["single", "independent"]),
    "rodeo": (RODEO(2, learn=False), RELAXABLE),
    "rodeo3": (RODEO(3), ["single", "independent"]),
    "set2": (UnorderedSet(2), [*SETS, "five"]),
    "set3": (UnorderedSet(3), ["categorical_index", "event"]),
    "sum2": (SumAndSample(2), [*SETS, "five"]),
    "sum3": (SumAndSample(3), ["categorical_index", "event"]),
    "stick": (StickBreakingDisARM(), ["single", "categorical_index", "one_hot", "counts", "hierarchy"]),
    "tree": (TreeDisARM(), ["single", "categorical_index", "one_hot", "counts", "mixed"]),
    "measure": (MeasureValued(), ["single", "categorical_index"]),
    "disarm-all": (DisARM(differentiate="all"), BINARY),
    "samples2-all": (ScoreFunction(samples=2, differentiate="all"), [*FINITE, "five"]),
    "samples3-all": (ScoreFunction(samples=3, differentiate="all"), ["single", "independent", "categorical_index"]),
    "double-cv-all": (
        DoubleCV(2, scale=1.0, learn=False, differentiate="all"),
        ["single", "hierarchy", "subsampled", "one_hot"],
    ),
    "rodeo-all": (
        RODEO(2, learn=False, differentiate="all"),
        ["single", "hierarchy", "subsampled", "event", "one_hot"],
    ),
    "stick-all": (StickBreakingDisARM(differentiate="all"), ["single", "counts", "hierarchy", "subsampled"]),
    "tree-all": (TreeDisARM(differentiate="all"), ["single", "categorical_index", "mixed", "subsampled"]),
}
"""Estimators with finite noise, by a short name: the expectation is a finite sum."""

RANDOM = {
    "arm": (ARM(), BINARY),
    "local-part": (LocalExpectation(elements=1), ["event", "five"]),
    "arms2": (ARMS(2), BINARY),
    "arms4": (ARMS(4), BINARY),
    "carms": (CARMS(4), ["hierarchy", "subsampled", "categorical_index", "one_hot", "five"]),
    "carms3": (CARMS(3), ["categorical_index"]),
    "rebar": (REBAR(0.5, 0.8, learn=False), RELAXABLE),
    "relax": (RELAX(0.5, hidden=4), ["single", "hierarchy", "one_hot", "event", "subsampled"]),
    "relax-alone": (RELAX(0.5, through_cost=False, hidden=4), ["single", "hierarchy", "event", "subsampled"]),
    "rebar-cold": (REBAR(0.1, 1.0, learn=False), RELAXABLE),
    "arm-all": (ARM(differentiate="all"), ["hierarchy", "event", "subsampled", "reparameterized_parent"]),
    "arms4-all": (ARMS(4, differentiate="all"), ["hierarchy", "mixed", "subsampled", "reparameterized_parent"]),
    "carms-all": (CARMS(4, differentiate="all"), ["categorical_index", "subsampled", "five"]),
}
"""Estimators with uniform noise: z-tests."""

HARD = [
    "hierarchy",
    "categorical_index",
    "five",
    "mixed",
    "event",
    "subsampled",
    "reparameterized_parent",
    "one_hot",
    "nested_plates",
]
"""The programs of the z-tests: dependent sites, both kinds, a joint event, a minibatch, plates."""


NUMBERS = {
    "normal": MeasureValued(),
    "gamma": MeasureValued(),
    "poisson": MeasureValued(),
    "normal-mirrored": Mirrored(),
    "normal-samples": ScoreFunction(samples=3),
    "normal-samples-all": ScoreFunction(samples=3, differentiate="all"),
    "poisson-samples": ScoreFunction(samples=2),
}
"""Estimators of sites with infinitely many values, by the site's family: see `numbers`."""

OF_ELEMENTS = {
    "binary": LocalExpectation(),
    "one-hot": LocalExpectation(),
    "categorical": LocalExpectation(),
    "counts": CountDifference(),
    "counts, head": LocalExpectation(head=6),
    "counts, measure": MeasureValued(),
}
"""Estimators whose branches change one element each, by the family of the latents in test_changed_elements.py."""


def numbers(h, family):
    """Return a program with two joint numbers of a family over a binary site, under a cost that does not separate."""

    def site(loc, scale):
        laws = {
            "normal": lambda: h.dist.Normal(loc, scale),
            "gamma": lambda: h.dist.Gamma(h.xp.exp(loc) + 0.5, scale),
            "poisson": lambda: h.dist.Poisson(h.xp.exp(0.5 * loc)),
        }
        return h.sample("x", laws[family.split("-")[0]]().to_event(1))

    def model():
        x = site(h.array([0.0, 0.3]), h.array([1.0, 1.2]))
        w = h.sample("w", h.dist.Bernoulli(logits=0.2 * x[..., 1]))
        h.factor("f", h.xp.cos(x[..., 0]) * (x[..., 1] - 0.4 + w))

    def guide():
        loc, scale = h.param("m", h.array([0.3, -0.5])), h.param("s", h.array([0.1, -0.2]))
        x = site(loc, h.xp.exp(scale))
        h.sample("w", h.dist.Bernoulli(logits=0.3 * x[..., 0] - loc[0]))

    return model, guide


TOO_MANY = {(short, name) for short in ("stick", "tree") for name in ("categorical_index", "one_hot", "hierarchy")}
TOO_MANY |= {
    (short, name) for short in ("carms", "relax") for name in ("hierarchy", "one_hot", "nested_plates", "event")
}
TOO_MANY |= {(short, "five") for short in ("samples2", "set2", "sum2")}
TOO_MANY |= {("relax-alone", name) for name in ("hierarchy", "nested_plates")}
"""Whose outcomes go into the thousands, or whose branches are many: for the library that goes through them all at once."""


USUAL = {"single", "hierarchy", "event", "one_hot", "mixed", "subsampled"}
ALIKE = {(short, name) for short in ("rodeo", "double-cv") for name in RELAXABLE if name not in USUAL}
ALIKE |= {
    (short, name) for short in ("arms2", "rebar-cold") for name in HARD if name not in ("hierarchy", "subsampled")
}
"""What Pyro's tests prove, and NumPyro's need not again: there another estimator runs the same branches on these programs."""


def exact_pairs(left_out=(), quick=tuple(EXACT)):
    """Return every estimator with finite noise and each of its programs; a quick one for those named."""
    return [
        pytest.param(short, name, marks=() if name == "single" and short in quick else pytest.mark.slow)
        for short, (_, names) in EXACT.items()
        for name in names
        if (short, name) not in left_out
    ]


def random_pairs(left_out=()):
    """Return every estimator with uniform noise and each program of the z-tests that it fits."""
    fitting = {
        short: [*names, *(["nested_plates"] if "single" in names else [])] for short, (_, names) in RANDOM.items()
    }
    return [
        (short, name)
        for short, names in fitting.items()
        for name in HARD
        if name in names and (short, name) not in left_out
    ]
