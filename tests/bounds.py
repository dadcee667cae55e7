"""What is proved of objectives that combine particles, the same in both libraries."""

from pplgrad import (
    IWAE,
    OVIS,
    VIMCO,
    DecayingAverage,
    DisARM,
    LocalExpectation,
    Renyi,
    ScoreFunction,
    UnorderedSet,
)
from pplgrad.objectives import log_sum_exp


def bound(power):
    """Return the bound of log weights along their first axis."""

    def combine(xp, logs):
        import math

        return (log_sum_exp(xp, power * logs, 0) - math.log(logs.shape[0])) / power

    return combine


PROGRAMS = {
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
}
"""Estimators that run the program at other values."""

STATEFUL = ScoreFunction(DecayingAverage(0.9))
