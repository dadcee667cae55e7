"""The exact sums over the animals are right, and training finds what they say."""

import numpy as np
import pytest
from scipy.stats import binom, poisson

from pplgrad import CountDifference
from tests.examples.loading import example, program


def test_posterior_against_a_plain_sum():
    script = example("_story").model_script("n_mixture")
    params = {"log_abundance": np.log(5.0), "detection_logit": -0.3}
    counts, p = np.array([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]]), 1 / (1 + np.exp(0.3))
    evidence, probabilities = script.posterior(params, counts)
    joint = [[poisson.pmf(n, 5.0) * binom.pmf(row, n, p).prod() for n in range(100)] for row in counts]
    assert np.allclose(np.exp(evidence), np.sum(joint, 1))
    assert np.allclose(probabilities, joint / np.sum(joint, 1, keepdims=True))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_most_likely_parameters_are_near_the_true_ones():
    script = example("_story").model_script("n_mixture")
    found = script.most_likely(script.simulate({**script.OPTIONS, "places": 2000, "visits": 8}, 0)[1])
    assert abs(np.exp(found["log_abundance"]) - 6) < 0.5 and abs(found["detection_logit"] + np.log(1.5)) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "steps"), [("pyro", 400), ("numpyro", 800)])
def test_bound_comes_near_the_evidence(backend, steps):
    story = example("_story")
    script, options, _ = program("n_mixture", backend, None)
    _, counts = script.simulate(options, 0)
    script, options, made = program("n_mixture", backend, counts)
    params, losses = story.train(
        backend, made, counts, steps, 0, estimators={"unseen": CountDifference()}, learning_rate=0.02
    )
    highest = script.posterior(script.most_likely(counts), counts)[0].mean()
    assert highest - 0.15 < -losses[-100:].mean() / len(counts) < highest
    # The guide's family holds no posterior, so that the bound's best parameters are not those of the evidence; they are near.
    assert script.posterior(params, counts)[0].mean() > highest - 0.05
