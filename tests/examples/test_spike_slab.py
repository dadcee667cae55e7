"""The posterior of the inclusions is that of enumeration, and what enumerates is right by quadrature."""

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from pplgrad import LeaveOneOut, Reparam, ScoreFunction
from tests.examples.loading import example, program


def test_exact_posterior_against_quadrature():
    script = example("_story").model_script("spike_slab")
    options = {**script.OPTIONS, "features": 1, "rate": 0.3}
    data = script.standardised(options)[:20]
    w, width = np.linspace(-4, 4, 4001, retstep=True)
    residual = data[:, 1] - w[:, None] * data[:, 0]
    joint = norm.logpdf(residual, 0, 0.7).sum(-1) + norm.logpdf(w, 0, 0.5) + np.log(0.3)
    excluded = norm.logpdf(data[:, 1], 0, 0.7).sum() + np.log(0.7)
    assert np.allclose(
        script.exact_log_joint(options, data), [excluded, logsumexp(joint) + np.log(width)], rtol=0, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_posterior_inclusion_is_that_of_enumeration(backend):
    story = example("_story")
    options = {**story.model_script("spike_slab").OPTIONS, "features": 5}
    data = story.model_script("spike_slab").standardised(options)[:60]
    script, options, made = program("spike_slab", backend, data, features=5)
    estimators = {"gamma_*": ScoreFunction(LeaveOneOut()), "w": Reparam()}
    params, losses = story.train(backend, made, data, 300, 0, estimators=estimators, learning_rate=0.1, particles=16)
    joint, log_q = script.exact_log_joint(options, data), script.guide_log_prob(params)
    evidence = logsumexp(joint)
    assert np.isclose(logsumexp(log_q), 0, atol=1e-5)
    divergence = np.exp(log_q) @ (log_q - joint) + evidence
    assert 0 < divergence < 0.1
    exact = np.exp(joint - evidence) @ script.subsets(5)
    assert np.abs(np.exp(log_q) @ script.subsets(5) - exact).max() < 0.1
    # It was not so from the start: 0.52 everywhere.
    assert np.abs(exact - 0.52).max() > 0.4
    # Drawn from their posterior, the weights leave of the bound log p(y, gamma) − log q(gamma) alone.
    assert abs(-losses[-50:].mean() - (evidence - divergence)) < 0.1
