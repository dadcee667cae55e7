"""Evolution strategies: mirrored pairs draw by draw, and the optimum of a black box, beside CMA-ES."""

import re

import numpy as np
import pytest

from pplgrad import EstimatorError, Expectation, Mirrored
from tests.examples.stories import double_precision, model, part, shown

D, SIGMA, ROWS = 0.7, 1.3, 2000


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_every_pair(backend):
    """For −(x − c)²: −2 d e² for μ, and −(d² + σ² e²)(e² − 1) for log σ, with e standard normal."""
    script, targets = model("quadratic"), np.full((ROWS, 1), -0.2)
    start = {"mu": np.full(ROWS, D - 0.2), "log_sigma": np.full(ROWS, np.log(SIGMA))}
    with double_precision():
        program = getattr(script, f"{backend}_program")(script.OPTIONS, targets, 0, start)
        choice = {"estimators": {"x": Mirrored()}, "objective": Expectation()}
        rows = part("_draws").gradient(backend, program, targets, 2, **choice)
    square = -rows["mu"] / (2 * D)
    assert abs(square.mean() - 1) < 4.5 * np.sqrt(2 / ROWS) and square.min() >= 0
    np.testing.assert_allclose(rows["log_sigma"], -(D**2 + SIGMA**2 * square) * (square - 1), rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_another_family_is_refused(backend):
    script = model("lottery")
    program = getattr(script, f"{backend}_program")(script.OPTIONS, np.ones((2, 4)), 0)
    with pytest.raises(EstimatorError, match="at site 'k': Categorical is not Normal; use one that fits there: "):
        part("_draws").gradient(
            backend, program, np.ones((2, 4)), 0, estimators={"k": Mirrored()}, objective=Expectation()
        )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_story(backend, tmp_path):
    text = shown("evolution", tmp_path / "a.png", "--backend", backend, "--steps", 200)
    found = {
        which: (int(evaluations), float(f), float(away))
        for which, evaluations, f, away in re.findall(r"(.+): (\d+) eval.* f = ([\d.]+), distance ([\d.]+)", text)
    }
    assert found["independent draws"][0] == 32 * 200
    # Every now and then Pyro's ELBO runs the program once more, to see that it computes the same.
    assert 32 * 200 <= found["mirrored pairs"][0] <= 1.03 * 32 * 200
    assert found["mirrored pairs"][1] <= 0.02 and found["mirrored pairs"][2] < 0.15
    assert found["CMA-ES"][1] <= 0.01
    assert found["mirrored pairs"][2] < found["independent draws"][2]
