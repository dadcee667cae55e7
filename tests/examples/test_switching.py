"""The exact smoother is right by enumeration, and training finds drifts and regimes."""

import numpy as np
import pytest

from pplgrad import LeaveOneOut, Reparam, ScoreFunction
from tests.examples.loading import example, program

CHOICE = {"s*": ScoreFunction(LeaveOneOut()), "x*": Reparam()}


def test_smoother_is_the_sum_over_all_regimes():
    script = example("_story").model_script("switching")
    options = {**script.OPTIONS, "series": 3, "length": 6}
    _, y = script.simulate(options, 0)
    evidence, regimes = script.exact_log_evidence(options, (-0.9, 0.1, 1.2), y)
    found = script.smoother(options, (-0.9, 0.1, 1.2), y)
    assert np.allclose(found[0], evidence, atol=1e-5) and np.allclose(found[1], regimes, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "length", "steps", "rate"), [("numpyro", 12, 150, 0.08), ("pyro", 8, 200, 0.03)])
def test_drifts_and_regimes(backend, length, steps, rate):
    story = example("_story")
    script = story.model_script("switching")
    options = {**script.OPTIONS, "length": length}
    regimes, y = script.simulate(options, 0)
    script, options, made = program("switching", backend, y, length=length)
    params, losses = story.train(backend, made, y, steps, 0, estimators=CHOICE, learning_rate=rate, particles=4)
    before, reached, best = (
        script.smoother(options, drifts, y)
        for drifts in (script.initial(options, y, 0)["drifts"], params["drifts"], script.DRIFTS)
    )
    assert np.abs(params["drifts"] - script.DRIFTS).max() < 0.2
    assert reached[0].mean() > best[0].mean() - 0.2 > before[0].mean() + 0.5
    bound = -losses[-50:].mean() / len(y)
    assert reached[0].mean() - 0.25 * length < bound < reached[0].mean() + 0.2
    assert np.mean(reached[1].argmax(-1) == regimes) > np.mean(best[1].argmax(-1) == regimes) - 0.02
