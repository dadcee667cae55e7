"""What a study says: which estimator, how sure, and what a wrong choice costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pplgrad.lab.intervals import mean_and_half_width, with_half_width
from pplgrad.lab.results import judged
from pplgrad.lab.summaries import at_budget, budgets, curves

LIBRARIES = {"pyro": "Pyro", "numpyro": "NumPyro"}


@dataclass(frozen=True)
class Answer:
    """A study's answer for one library.

    `best` is the estimator; `behind` are the others with how far they are behind it, and half the width of that interval: in the
    unit of the test value at `budget` seconds of training, or without training as the factor of time for an equal error (as a logarithm).
    `lines` are the three lines in words.
    """

    backend: str
    best: str
    behind: dict[str, tuple[float, float]]
    budget: float | None
    seeds: int
    lines: tuple[str, str, str]

    @property
    def worse(self) -> list[str]:
        """The estimators that are worse for sure (95%, all together)."""
        return [name for name, (far, half) in self.behind.items() if far > half]


def answers(frame: pd.DataFrame) -> list[Answer]:
    """Return the answer for each library: by training where there is any, else by the gradients."""
    points = curves(frame)
    found = [_of_training(frame, points, backend, time) for backend, time in budgets(points).items()]
    if found:
        return found
    rows = frame[(frame["kind"] == "gradients") & frame["error"].isna() & (frame["part"] == "program")]
    return [_of_gradients(rows[rows["backend"] == backend], backend) for backend in dict.fromkeys(rows["backend"])]


def _of_training(frame: pd.DataFrame, points: pd.DataFrame, backend: str, budget: float) -> Answer:
    """Compare by the test value at equal time."""
    points = points[points["backend"] == backend]
    reached = at_budget(points).pivot_table(index="seed", columns="estimator", values="test", sort=False)
    what, unit = judged(frame)

    def which(best: str, compared: pd.DataFrame) -> str:
        mean, half = mean_and_half_width(compared[best])
        return (
            f"After {_time(budget)} of training steps in {LIBRARIES[backend]} it has the best test {what} of "
            f"{len(compared.columns)} estimators, {with_half_width(mean, half)} {unit} per datum."
        )

    def price(best: str, worst: str, far: float, half: float) -> str:
        behind = f"{_code(worst)} is {with_half_width(far, half)} {unit} per datum behind at that time"
        return behind + _sooner(points, best, worst, budget)

    return _answer(backend, reached, budget, which, price)


def _of_gradients(rows: pd.DataFrame, backend: str) -> Answer:
    """Compare by the time for an equal mean squared error, the snapshots' geometric mean."""
    table = rows.pivot_table(index=["estimator", "seed", "step"], columns="quantity", values="value", sort=False)
    with np.errstate(divide="ignore"):
        cost = np.log(table["mse"] * table["milliseconds"])

    def which(best: str, compared: pd.DataFrame) -> str:
        return (
            f"Of {len(compared.columns)} estimators in {LIBRARIES[backend]} its gradient has the smallest mean squared error in equal "
            "time, over all snapshots."
        )

    def price(best: str, worst: str, far: float, half: float) -> str:
        return f"{_code(worst)} needs {_factor(far)} times as long for a gradient as good"

    # More is better, as in training.
    reached = -cost.groupby(["estimator", "seed"], sort=False).mean().unstack("estimator")
    return _answer(backend, reached, None, which, price)


def _answer(
    backend: str,
    reached: pd.DataFrame,
    budget: float | None,
    which: Callable[[str, pd.DataFrame], str],
    price: Callable[[str, str, float, float], str],
) -> Answer:
    """Return the answer from what each seed (a row) reached under each estimator (a column), more being better."""
    reached, left_out = _complete(reached)
    best, behind = _ranked(reached)
    sure, cost = "there is no other estimator to compare it with.", "not known; name more estimators"
    if behind:
        sure = _sure(behind, len(reached))
        worst = max(behind, key=lambda name: behind[name][0])
        far, half = behind[worst]
        unknown = half >= far
        cost = "not known; no difference is larger than its interval" if unknown else price(best, worst, far, half)
    lines = (
        f"Which: {_code(best)}. {which(best, reached)}",
        f"How sure: {sure}{left_out}",
        f"The price of a wrong choice: {cost}.",
    )
    return Answer(backend, best, behind, budget, len(reached), lines)


def _complete(reached: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the estimators that every seed has, and in words which are left out: what some seeds failed at is no answer."""
    failed = {str(name): int(reached[name].isna().sum()) for name in reached.columns if reached[name].isna().any()}
    if not failed or len(failed) == len(reached.columns):
        return reached, ""
    told = ", ".join(f"{_code(name)} (failed with {count} of {len(reached)} seeds)" for name, count in failed.items())
    return reached.drop(columns=list(failed)), f" Left out: {told}."


def _ranked(reached: pd.DataFrame) -> tuple[str, dict[str, tuple[float, float]]]:
    """Return the best column's name, and how far the others are behind, in pairs of the same seed, best first."""
    means = reached.mean().sort_values(ascending=False)
    best, others = str(means.index[0]), [str(name) for name in means.index[1:]]
    return best, {
        name: mean_and_half_width((reached[best] - reached[name]).to_numpy(), max(len(others), 1)) for name in others
    }


def _sure(behind: dict[str, tuple[float, float]], seeds: int) -> str:
    if seeds < 2:
        return "not known, since one seed says nothing of the spread; run it with three seeds or more."
    close = [name for name, (far, half) in behind.items() if not far > half]
    count = f"95%, {seeds} seeds in pairs, " + ("1 comparison" if len(behind) == 1 else f"{len(behind)} comparisons")
    if not close:
        return f"better than {'the other' if len(behind) == 1 else f'all {len(behind)} others'} ({count})."
    told = f"better than {len(behind) - len(close)} of the {len(behind)} others" if len(close) < len(behind) else ""
    rest = f"{_names(close)} cannot be told from it"
    return f"{told + '; ' if told else ''}{rest} ({count})."


def _sooner(points: pd.DataFrame, best: str, worst: str, budget: float) -> str:
    """Return how much sooner the best estimator was where the worst one is at the end of the budget."""
    mine, theirs = (points[points["estimator"] == name].groupby("time")["test"].mean() for name in (best, worst))
    goal = float(np.interp(budget, theirs.index, theirs))
    passed = mine[mine >= goal]
    if passed.empty or passed.index[0] <= 0 or passed.index[0] >= budget:
        return ""
    return f", where {_code(best)} was after {_time(float(passed.index[0]))}"


def _names(names: Sequence[str], most: int = 4) -> str:
    """Return names as a list in words, the first ones of many."""
    shown = [_code(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _code(name: str) -> str:
    return f"`{name}`"


def _factor(log: float) -> str:
    return "infinitely many" if math.isinf(log) else f"{math.exp(log):.2g}"


def _time(seconds: float) -> str:
    """Return a time with two significant digits.

    >>> _time(0.0123), _time(0.2), _time(12.3), _time(1234.0), _time(7300.0)
    ('12 ms', '200 ms', '12 s', '21 min', '2 h')
    """
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= (2 if unit != "s" else 1) * size:
            break
    else:
        unit, size = "ms", 1e-3
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"
