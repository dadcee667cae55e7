"""The closed form is the law of the simulated reactions, and training finds its rates."""

import numpy as np
import pytest

from pplgrad import LeaveOneOut, Reparam, ScoreFunction
from tests.examples.loading import example, program

RATES = (1.2, 2.4, 30.0)


def test_law_of_the_reactions():
    script = example("_story").model_script("telegraph")
    n = np.arange(120)
    law = np.exp(script.log_law(RATES, n))
    mean = 30 * 1.2 / 3.6
    # Mean and variance of Poisson counts whose mean is 30 times a Beta(1.2, 2.4) number.
    assert np.isclose(law.sum(), 1) and np.isclose(law @ n, mean)
    assert np.isclose(law @ (n - mean) ** 2, mean + 30**2 * 1.2 * 2.4 / (3.6**2 * 4.6))
    on, counts = script.simulate(4000, *RATES, np.random.default_rng(0))
    # Kolmogorov's distance of 4,000 draws exceeds 1.95 / √4000 once in 1,000 times, and less often for counts.
    assert np.abs(np.cumsum(np.bincount(counts, minlength=120)[:120]) / 4000 - np.cumsum(law)).max() < 0.031
    few = counts < 5
    expected = (law * script.promoter_on(RATES, n))[:5].sum() / law[:5].sum()
    assert abs(on[few].mean() - expected) < 4.5 * np.sqrt(expected * (1 - expected) / few.sum())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_rates_are_those_of_the_exact_law(backend):
    story = example("_story")
    _, counts = story.model_script("telegraph").simulate(600, *RATES, np.random.default_rng(1))
    data = counts[:, None].astype(float)
    script, options, made = program("telegraph", backend, data)
    estimators = {"promoter": ScoreFunction(LeaveOneOut()), "share": Reparam()}
    params, losses = story.train(backend, made, data, 150, 0, estimators=estimators, learning_rate=0.08, particles=2)
    learned, (best, highest) = np.exp(params["log_rates"]), script.most_likely(counts)
    before = np.exp(script.initial(options, data, 0)["log_rates"])
    reached, begun = (script.log_law(rates, counts).mean() for rates in (learned, before))
    assert begun < highest - 0.1 and highest - 0.02 < reached <= highest + 1e-6
    # From few cells only how often a burst comes and how large it is are known well.
    frequency, size = learned[0] / best[0], (learned[2] / learned[1]) / (best[2] / best[1])
    assert abs(np.log(frequency)) < 0.25 and abs(np.log(size)) < 0.3
    # The bound is below the exact law, and close to it.
    assert -0.05 < -losses[-50:].mean() / len(data) - reached < 0.01
