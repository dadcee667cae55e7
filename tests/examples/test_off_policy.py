"""Off-policy gradients: every draw against plain NumPy, unbiased with known propensities, biased by its closed form else."""

import re

import numpy as np
import pytest

from pplgrad import Expectation, ScoreFunction
from tests.examples.stories import double_precision, model, part, shown, story_module

ROWS, X = 4000, 0.6
THETA = np.array([[0.2, -0.1], [0.0, 0.3], [-0.3, 0.1]])


def by_hand(script, options):
    """Return the chance of each (u, a) under the log, and the estimate r w ∇ log π at it, from the formulas alone."""
    logits = THETA @ [1.0, X]
    policy = np.exp(logits) / np.exp(logits).sum()
    logged = script.behaviour(options)
    propensity = logged if options["source"] == "known" else np.tile(logged.mean(0), (2, 1))
    estimates = np.zeros((2, 3, 3, 2))
    for u in range(2):
        for a in range(3):
            reward = script.MEANS[a] + script.SLOPES[a] * X + 0.5 * u
            estimates[u, a] = reward * policy[a] / propensity[u, a] * np.outer(np.eye(3)[a] - policy, [1.0, X])
    return logged / 2, estimates


@pytest.mark.slow
@pytest.mark.parametrize("source", ["known", "hidden"])
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_every_draw(backend, source):
    script = model("offpolicy")
    options, contexts = {**script.OPTIONS, "source": source, "confounding": 0.8}, np.full((ROWS, 1), X)
    with double_precision():
        program = getattr(script, f"{backend}_program")(options, contexts, 0, np.tile(THETA, (ROWS, 1, 1)))
        choice = {"estimators": dict.fromkeys("ua", ScoreFunction()), "objective": Expectation()}
        rows = part("_draws").gradient(backend, program, contexts, 1, **choice)["theta"]
    chances, estimates = by_hand(script, options)
    distance = np.abs(rows[:, None] - estimates.reshape(1, 6, 3, 2)).max((-1, -2))
    assert distance.min(1).max() < 1e-9
    counts, chances = np.bincount(distance.argmin(1), minlength=6), chances.ravel()
    assert np.abs((counts - ROWS * chances) / np.sqrt(ROWS * chances * (1 - chances))).max() < 4.5

    exact = story_module("off_policy").exact
    mean = np.tensordot(chances, estimates.reshape(6, 3, 2), 1)
    wanted = exact(script, {**options, "source": "own"}, contexts[:1], THETA)[1]
    np.testing.assert_allclose(mean, exact(script, options, contexts[:1], THETA)[1], atol=1e-12)
    bias = np.linalg.norm(mean - wanted) / np.linalg.norm(wanted)
    assert bias < 1e-9 if source == "known" else bias > 1.0


@pytest.mark.slow
def test_the_exact_gradient_is_the_derivative():
    script, exact = model("offpolicy"), story_module("off_policy").exact
    contexts, step = np.array([[X], [-0.4]]), 1e-6
    for source in script.SOURCES:
        options = {**script.OPTIONS, "source": source}
        for place in np.ndindex(3, 2):
            shift = np.zeros((3, 2))
            shift[place] = step
            rise = (
                exact(script, options, contexts, THETA + shift)[0] - exact(script, options, contexts, THETA - shift)[0]
            )
            assert abs(rise / (2 * step) - exact(script, options, contexts, THETA)[1][place]) < 1e-8


@pytest.mark.slow
def test_story(tmp_path):
    text = shown("off_policy", tmp_path / "a.png", "--backend", "pyro", "--steps", 200, DRAWS=500)
    scores = re.findall(r"(.+): against .* \|z\| ([\d.]+), against its own closed form ([\d.]+)", text)
    assert [float(z) < 4.5 for _, z, _ in scores] == [True, True, False]
    assert all(float(z) < 4.5 for *_, z in scores)
    own, known, hidden = (float(x) for x in re.findall(r"learned policy ([\d.]+)", text))
    assert own > 0.6 and known > 0.58 and hidden < 0.55
