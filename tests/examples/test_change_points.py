"""The posterior of the change points is that of enumeration, and what enumerates is right by quadrature."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import gamma, poisson

from pplgrad import LeaveOneOut, Reparam, ScoreFunction
from tests.examples.loading import example, program

CHOICE = {"change_*": ScoreFunction(LeaveOneOut()), "rate": Reparam()}


def test_the_series():
    data = example("_story").model_script("change_points").series()
    # Jarrett (1979): 191 explosions; 1851 to 1962.
    assert len(data) == 112 and data[:, 1].sum() == 191 and data[-1, 0] + 1851 == 1962


@pytest.mark.slow
def test_exact_posterior_against_quadrature():
    script = example("_story").model_script("change_points")
    data = script.series()[[0, 1, 50, 51, 52]]

    def evidence(part):
        return quad(lambda rate: poisson.pmf(part[:, 1], rate).prod() * gamma.pdf(rate, 1.0), 0, 40)[0]

    places, found, log_evidence = script.exact_posterior(script.OPTIONS, data)
    joint = [evidence(data[data[:, 0] < c]) * evidence(data[data[:, 0] >= c]) / 111 for (c,) in places]
    assert np.allclose(found, np.array(joint) / np.sum(joint), atol=1e-7)
    assert np.isclose(log_evidence, np.log(np.sum(joint)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "steps"), [("pyro", 400), ("numpyro", 1000)])
def test_posterior_is_that_of_enumeration(backend, steps):
    story = example("_story")
    data = story.model_script("change_points").series()
    script, options, made = program("change_points", backend, data)
    places, exact, evidence = script.exact_posterior(options, data)

    def distance(probabilities):
        return 0.5 * np.abs(probabilities - exact).sum()

    start = {"when": np.zeros((1, 112))}
    before = script.guide_probabilities(start, places)
    # Before training the guide is the prior.
    assert np.allclose(before, 1 / len(places), atol=1e-6) and distance(before) > 0.7
    params, losses = story.train(backend, made, data, steps, 0, estimators=CHOICE, learning_rate=0.1, particles=16)
    learned = script.guide_probabilities(params, places)
    assert np.isclose(learned.sum(), 1, atol=1e-5) and distance(learned) < 0.2
    assert abs(-losses[-100:].mean() - evidence) < 0.25
