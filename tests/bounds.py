"""What is proved of objectives that combine particles, the same in both libraries."""

import math

import pytest

from pplgrad import (
    IWAE,
    OVIS,
    REBAR,
    VIMCO,
    BaselineError,
    DisARM,
    DReG,
    EstimatorError,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    Renyi,
    Reparam,
    ReweightedWakeSleep,
    ScoreFunction,
    UnorderedSet,
)
from pplgrad.core.objectives import log_sum_exp


def bound(power):
    """Return the bound of log weights along their first axis."""

    def combine(xp, logs):
        return (log_sum_exp(xp, power * logs, 0) - math.log(logs.shape[0])) / power

    return combine


KEPT = {
    "single": 0,
    "hierarchy": 0,
    "mixed": 0,
    "event_in_plate": 1,
    "masked": 1,
    "minibatch": 1,
    "categorical_index": 1,
}
"""Programs with the number of batch dimensions whose elements have weights of their own."""

OBJECTIVES = {"iwae": (IWAE(), 1.0), "renyi": (Renyi(0.4), 0.6), "renyi2": (Renyi(2.0), -1.0)}

SCORES = {
    "score": ScoreFunction(),
    "vimco": VIMCO(),
    "vimco-arithmetic": VIMCO("arithmetic"),
    "ovis": OVIS(),
}
"""Estimators without noise and branches."""

BRANCHES = {
    "local": LocalExpectation(),
    "disarm": DisARM(),
    "ovis-samples": OVIS(samples=1),
    "samples2": ScoreFunction(samples=2),
    "set2": UnorderedSet(2),
    "muprop": MuProp(),
}
"""Estimators that run the program at other values, with finite noise."""

RANDOM = REBAR(0.5, 0.8, learn=False)


REFUSED = {
    "reads the other particles": (BaselineError, ScoreFunction(LeaveOneOut()), IWAE(), 2),
    "use DReG": (EstimatorError, Reparam(sticking_the_landing=True), IWAE(), 2),
    "combines no particles": (EstimatorError, DReG(), None, 2),
    "at least 2 are needed": (EstimatorError, VIMCO(), IWAE(), 1),
    "no site has an estimator": (EstimatorError, GumbelSoftmax(), ReweightedWakeSleep(), 2),
}
"""What is refused, by words of the error: its kind, the estimator of one site, the objective and the number of particles."""

AMBIGUOUS = [
    ("subsampled", IWAE(), r"Site 'g' is shared by the elements of plate 'data'.*plates=\(\)"),
    ("coupled_plate", IWAE(), r"Site 'f' stands outside of plate 'data'.*plates=\(\)"),
    ("event_in_plate", IWAE(plates=("nobody",)), "names plate 'nobody'.*'data'"),
]
"""Programs in which it is not clear what one weight stands for, with objectives and words of the error."""


def score_pairs():
    """Return objectives, programs and estimators; the quick ones are few."""
    quick = {("iwae", "event_in_plate", "vimco"), ("renyi", "mixed", "score")}
    every = [("iwae", name, short) for name in KEPT for short in SCORES]
    every += [(o, name, short) for o in ("renyi", "renyi2") for name in ("mixed", "event_in_plate") for short in SCORES]
    return [pytest.param(*row, marks=() if row in quick else pytest.mark.slow) for row in every]


def branch_pairs():
    """Return objectives, programs and estimators that run branches."""
    every = [("iwae", "single", short) for short in BRANCHES] + [("renyi2", "single", "local")]
    every += [("iwae", "shared_parameter", "disarm"), ("iwae", "reparameterized_parent", "local")]
    quick = {("iwae", "single", "local"), ("iwae", "single", "disarm")}
    return [pytest.param(*row, marks=() if row in quick else pytest.mark.slow) for row in every]


def wake(fixed):
    """Return what reweighted wake-sleep follows: Σ w̃ log w with the weights held by `fixed`."""

    def combine(xp, logs):
        shares = fixed(xp.exp(logs - log_sum_exp(xp, logs, 0)))
        return (shares * logs).sum(0)

    return combine
