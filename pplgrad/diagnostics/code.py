"""A specification as the Python that makes it."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from pplgrad.core.baseline import Baseline, parts_of
from pplgrad.core.estimator import arguments_of


def code(value: Any) -> str:
    """Return a specification as a user would write it, without what is at its default.

    >>> from pplgrad import ARMS, DecayingAverage, LeaveOneOut, NeuralBaseline, ScoreFunction
    >>> code(ScoreFunction(LeaveOneOut())), code(DecayingAverage(0.9) + NeuralBaseline())
    ('ScoreFunction(LeaveOneOut())', 'DecayingAverage() + NeuralBaseline()')
    >>> code(ARMS(3, differentiate="all"))
    "ARMS(3, differentiate='all')"
    """
    if isinstance(value, Baseline) and len(parts_of(value)) > 1:
        return " + ".join(code(part) for part in parts_of(value))
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    shown, positional = [], True
    for field in arguments_of(value):
        given = getattr(value, field.name)
        positional = positional and not field.kw_only
        if given is field.default or given == field.default:
            positional = False
            continue
        shown.append(code(given) if positional else f"{field.name}={code(given)}")
    return f"{type(value).__name__}({', '.join(shown)})"
