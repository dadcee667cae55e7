"""Natural gradient and trust region: the metric from the scores, the size of a step, and steps to a target."""

import re

import numpy as np
import pytest

from tests.examples.stories import model, shown, story_module


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_the_metric_comes_from_the_scores(backend):
    """The same draws in both calls: r_k s_k and s_k with s_k = e_k − π; the metric is diag(π) − π πᵀ on average."""
    story = story_module("natural_gradient")
    story.DRAWS = 4000
    draw = story.sampler(backend, model("lottery"))
    theta = np.linspace(0.5, -0.5, story.OUTCOMES)
    rows, scores = draw(theta, story.REWARDS, 5), draw(theta, np.ones(story.OUTCOMES), 5)
    chances = story.chances(theta)
    number = (scores + chances).argmax(1)
    np.testing.assert_allclose(scores, np.eye(story.OUTCOMES)[number] - chances, atol=1e-5)
    np.testing.assert_allclose(rows, story.REWARDS[number][:, None] * scores, atol=1e-5)
    products = scores[:, :, None] * scores[:, None, :]
    error = products.std(0) / np.sqrt(len(scores))
    assert (np.abs(products.mean(0) - np.diag(chances) + np.outer(chances, chances)) / error).max() < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_story(backend, tmp_path):
    text = shown("natural_gradient", tmp_path / "a.png", "--backend", backend, "--steps", 120)
    pattern = r"^([a-z ]+).*to 0.8 after .* steps, 0.95 after (.+) steps; KL of a step ([\d.]+) to ([\d.]+)"
    found = {rule: (taken, float(least), float(most)) for rule, taken, least, most in re.findall(pattern, text, re.M)}
    assert set(found) == {"plain", "natural", "trust region"}
    natural, region = int(found["natural"][0]), int(found["trust region"][0])
    assert natural < 12 and region < 20
    # The plain gradient stops at the second best outcome, whatever its rate.
    assert found["plain"][0].startswith("more than") or int(found["plain"][0]) > 3 * region
    assert 0.02 < found["trust region"][1] and found["trust region"][2] < 0.12
