"""The identity in a softmax lottery, against a plain NumPy implementation."""

import re

import numpy as np
import pytest
from scipy import stats

from pplgrad import Constant, Expectation, ScoreFunction
from tests.examples.stories import double_precision, model, part, shown

THETA = np.array([0.5, -0.3, 0.1, 0.0])
REWARDS = np.array([10.0, 10.4, 9.0, 11.0])
ROUNDS = 4000


def by_hand(baseline):
    """Return the chances of the outcomes, and the estimate (r_k − b) ∇ log π_k of each."""
    chances = np.exp(THETA) / np.exp(THETA).sum()
    score = np.eye(4) - chances
    return chances, (REWARDS - baseline)[:, None] * score


@pytest.mark.slow
@pytest.mark.parametrize("baseline", [0.0, 10.2])
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_every_draw_is_one_of_the_outcomes_estimates(backend, baseline):
    """The law of the estimate, hence its mean and its variance with and without a baseline, is that of plain NumPy."""
    script, data = model("lottery"), np.tile(REWARDS, (ROUNDS, 1))
    with double_precision():
        program = getattr(script, f"{backend}_program")(script.OPTIONS, data, 0, np.tile(THETA, (ROUNDS, 1)))
        choice = {"k": ScoreFunction(Constant(baseline))}
        rows = part("_draws").gradient(backend, program, data, 3, estimators=choice, objective=Expectation())["logits"]
    chances, estimates = by_hand(baseline)
    distance = np.abs(rows[:, None] - estimates).max(-1)
    assert distance.min(1).max() < 1e-9
    counts = np.bincount(distance.argmin(1), minlength=4)
    assert stats.chisquare(counts, ROUNDS * chances).pvalue > 1e-4
    np.testing.assert_allclose(chances @ estimates, chances * (REWARDS - chances @ REWARDS), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_story(backend, tmp_path):
    text = shown("lottery", tmp_path / "a.png", "--backend", backend, "--steps", 200)
    assert all(float(z) < 4.5 for z in re.findall(r"\|z\| ([\d.]+)", text))
    found = [[float(x) for x in pair] for pair in re.findall(r"variance ([\d.]+), exact ([\d.]+)", text)]
    assert len(found) == 2 and all(abs(measured / true - 1) < 0.1 for measured, true in found)
    assert found[1][1] < found[0][1] / 100
    (reached,) = re.findall(r"leave-one-out: E\[r\] after \d+ steps ([\d.]+)", text)
    assert float(reached) > 10.9
