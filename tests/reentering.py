"""Which estimators are proved on programs whose paths leave a plate, or mix its elements, the same in both libraries."""

import pytest

from pplgrad import (
    ARM,
    ARMS,
    CARMS,
    REBAR,
    RELAX,
    RODEO,
    Constant,
    DecayingAverage,
    DisARM,
    DoubleCV,
    FunctionBaseline,
    LeaveOneOut,
    LocalExpectation,
    MeasureValued,
    MuProp,
    NeuralBaseline,
    OptimalConstant,
    ScoreFunction,
    StickBreakingDisARM,
    SumAndSample,
    TreeDisARM,
    UnorderedSet,
)
from pplgrad.testing.reentering import REENTERED

SCORED = list(REENTERED)
"""Every program, under the score function alone."""

PAIRS = ["reentered_plate", "reentered_crossed", "mixed_in_plate_sum", "mixed_in_one_of_two"]
"""The programs of which every pair of outcomes is gone through, for two particles."""

BASELINES = {
    "leave-one-out": (LeaveOneOut(), 2),
    "optimal": (OptimalConstant(), 2),
    "constant": (Constant(0.7), 1),
}

LEARNED = {
    "average": DecayingAverage(0.8),
    "average-per-element": DecayingAverage(0.8, per_element=True),
    "optimal-past": OptimalConstant(decay=0.7),
    "function": FunctionBaseline(lambda: 0.7),
    "network": DecayingAverage(0.8) + NeuralBaseline(hidden=(3,)),
}
"""Baselines that keep something from step to step."""

SHARED = ["reentered_plate", "mixed_in_one_of_two", "reentered_subsampled"]

BRANCHED = {
    "local": (
        LocalExpectation(),
        [*SHARED, "reentered_nested", "reentered_categories", "reentered_continuous", "mixed_by_site", "mixed_table"],
    ),
    "disarm": (DisARM(), [*SHARED, "reentered_crossed", "mixed_reverse", "mixed_transposed"]),
    "samples2": (ScoreFunction(samples=2), ["reentered_plate", "mixed_reverse"]),
    "muprop": (MuProp(), ["reentered_plate", "mixed_in_plate_sum"]),
    "double-cv": (DoubleCV(2, scale=1.0, learn=False), ["mixed_in_one_of_two"]),
    "rodeo": (RODEO(2, learn=False), ["mixed_in_one_of_two"]),
    "set2": (UnorderedSet(2), ["reentered_categories", "mixed_matrix"]),
    "sum2": (SumAndSample(2), ["reentered_categories", "mixed_shift"]),
    "stick": (StickBreakingDisARM(), ["reentered_categories"]),
    "tree": (TreeDisARM(), ["reentered_categories"]),
    "measure": (MeasureValued(), ["reentered_categories", "mixed_cumulative"]),
}
"""Estimators with finite noise, by a short name: the expectation is a finite sum."""

RANDOM = {
    "arm": (ARM(), ["reentered_plate", "mixed_reverse"]),
    "arms2": (ARMS(2), ["mixed_in_one_of_two"]),
    "carms": (CARMS(4), ["reentered_categories"]),
    "rebar": (REBAR(0.5, 0.8, learn=False), ["reentered_plate", "mixed_in_plate_sum"]),
    "relax": (RELAX(0.5, hidden=4), ["mixed_reverse"]),
}
"""Estimators with uniform noise: z-tests."""


def pairs(table):
    """Return every estimator of a table with each of its programs."""
    return [(short, name) for short, (_, names) in table.items() for name in names]


def scored():
    """Return every program, two of them for the quick tests."""
    quick = ("reentered_plate", "mixed_reverse")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in SCORED]


REFUSED = {
    "reentered_plate": "Site 'g' is shared by the elements of plate 'p', in which site 'z' stands",
    "mixed_in_plate_sum": "An element of site 'x' in plate 'p' depends on other elements of site 'z'",
    "mixed_by_site": "An element of site '.' in plate 'p' depends on other elements of site 'z'",
}
"""What an objective of importance weights says of a program whose elements have none of their own."""
