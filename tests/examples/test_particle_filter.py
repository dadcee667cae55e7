"""The Kalman filter's evidence is right, a filter's bound is between it and the importance-weighted one, and the story runs to its picture."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from pplgrad import FIVO, IWAE
from tests.examples.loading import example, program
from tests.examples.stories import shown

BACKENDS = ["pyro", "numpyro"]


def test_kalman_filter_against_the_joint_law():
    script = example("_story").model_script("state_space")
    params, y = {"decay": 0.8, "log_move": np.log(0.6)}, np.array([[0.3, -1.0, 0.8, 1.9]])
    path = np.array([[0.8 ** (t - s) if s <= t else 0.0 for s in range(4)] for t in range(4)])
    joint = multivariate_normal(np.zeros(4), 0.36 * path @ path.T + np.eye(4))
    assert np.isclose(script.log_evidence(script.OPTIONS, params, y)[0], joint.logpdf(y[0]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_are_in_order_and_close_on_the_evidence(backend):
    script = example("_story").model_script("state_space")
    options = {**script.OPTIONS, "series": 1, "length": 12}
    y = script.simulate(options, 3)
    made, sample = (
        program("state_space", backend, y, **options)[2],
        getattr(example("particle_filter"), f"draws_{backend}"),
    )
    exact = script.log_evidence(options, script.START, y)[0]

    def bound(objective, particles):
        losses = sample(made, script.START, y, objective, particles, 100, 0)[0]
        return -losses.mean(), losses.std() / 10

    filtered, noise = bound(FIVO(resampling_gradient="drop"), 8)
    weighed, more_noise = bound(IWAE(plates=()), 8)
    assert weighed - 4 * more_noise < filtered < exact + 4 * noise
    close, noise = bound(FIVO(resampling="systematic", resampling_gradient="drop"), 100)
    assert abs(close - exact) < 0.1 + 4 * noise


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_story(backend, tmp_path):
    story = example("particle_filter")
    small = {
        "SERIES": {"series": 1, "length": 5},
        "DRAWS": 8,
        "SIZES": (2, 3),
        "TRAINED": ("IWAE", "FIVO, score dropped"),
    }
    small["OBJECTIVES"] = {name: story.OBJECTIVES[name] for name in small["TRAINED"]}
    text = shown("particle_filter", tmp_path / "picture.png", "--backend", backend, "--steps", 20, **small)
    assert "FIVO, score dropped: bound -" in text and "trained under FIVO, score dropped: bound -" in text
