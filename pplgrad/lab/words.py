"""Estimators by name, as the command line writes them: `score`, `score+loo`, `score+average+neural`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pplgrad import (
    ARM,
    ARMS,
    CARMS,
    REBAR,
    RELAX,
    RODEO,
    Auto,
    Baseline,
    DecayingAverage,
    DisARM,
    DoubleCV,
    Estimator,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    NeuralBaseline,
    OptimalConstant,
    ReinMax,
    ScoreFunction,
    StickBreakingDisARM,
    StraightThrough,
    TreeDisARM,
)
from pplgrad.lab.script import ScriptError

BASELINES: dict[str, Callable[[Callable[..., Any]], Baseline]] = {
    "average": lambda inputs: DecayingAverage(0.9),
    "neural": lambda inputs: NeuralBaseline(inputs=inputs),
    "loo": lambda inputs: LeaveOneOut(),
    "optimal": lambda inputs: OptimalConstant(),
    "optimal-past": lambda inputs: OptimalConstant(decay=0.9),
}


SIMPLE: dict[str, Callable[[], Estimator]] = {
    "samples2": lambda: ScoreFunction(samples=2),
    "samples4": lambda: ScoreFunction(samples=4),
    "local": LocalExpectation,
    "arm": ARM,
    "disarm": DisARM,
    "arms4": lambda: ARMS(4),
    "stick-breaking": StickBreakingDisARM,
    "tree": TreeDisARM,
    "carms4": lambda: CARMS(4),
    "rebar": REBAR,
    "relax": RELAX,
    "rodeo": RODEO,
    "muprop": MuProp,
    "double-cv": DoubleCV,
    "gumbel-softmax": GumbelSoftmax,
    "straight-through": StraightThrough,
    "gumbel-rao": GumbelRao,
    "reinmax": ReinMax,
    "gapped": GappedStraightThrough,
    "auto": Auto,
}
"""Estimators without a baseline."""


def estimator(word: str, inputs: Callable[..., Any] = lambda x: x) -> Estimator:
    """Return the estimator that a word stands for.

    >>> estimator("score+loo")
    ScoreFunction(baseline=LeaveOneOut())
    """
    if word in SIMPLE:
        return SIMPLE[word]()
    first, *rest = word.split("+")
    if first != "score":
        raise ScriptError(
            f"Unknown estimator '{word}'; write score, then any of +{', +'.join(BASELINES)}; or one of {', '.join(SIMPLE)}."
        )
    baseline: Baseline | None = None
    for part in rest:
        if part not in BASELINES:
            raise ScriptError(f"Unknown baseline '{part}' in '{word}'; the baselines are: {', '.join(BASELINES)}.")
        made = BASELINES[part](inputs)
        baseline = made if baseline is None else baseline + made
    return ScoreFunction(baseline)
