"""Estimators by name, as the command line writes them: `score`, `score+loo`, `score+average+neural`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pplgrad import Baseline, DecayingAverage, Estimator, LeaveOneOut, NeuralBaseline, OptimalConstant, ScoreFunction
from pplgrad.lab.script import ScriptError

BASELINES: dict[str, Callable[[Callable[..., Any]], Baseline]] = {
    "average": lambda inputs: DecayingAverage(0.9),
    "neural": lambda inputs: NeuralBaseline(inputs=inputs),
    "loo": lambda inputs: LeaveOneOut(),
    "optimal": lambda inputs: OptimalConstant(),
    "optimal-past": lambda inputs: OptimalConstant(decay=0.9),
}


def estimator(word: str, inputs: Callable[..., Any] = lambda x: x) -> Estimator:
    """Return the estimator that a word stands for.

    >>> estimator("score+loo")
    ScoreFunction(baseline=LeaveOneOut())
    """
    first, *rest = word.split("+")
    if first != "score":
        raise ScriptError(f"Unknown estimator '{word}'; write score, then any of +{', +'.join(BASELINES)}.")
    baseline: Baseline | None = None
    for part in rest:
        if part not in BASELINES:
            raise ScriptError(f"Unknown baseline '{part}' in '{word}'; the baselines are: {', '.join(BASELINES)}.")
        made = BASELINES[part](inputs)
        baseline = made if baseline is None else baseline + made
    return ScoreFunction(baseline)
