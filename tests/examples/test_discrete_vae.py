"""Small discrete autoencoders, whose latents can be enumerated, against their exact likelihood."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from pplgrad import DisARM, LeaveOneOut, ScoreFunction

SMALL = {"Bernoulli": {"latents": 7, "hidden": 32}, "categorical": {"variables": 3, "categories": 5, "hidden": 32}}
CHOICE = {"Bernoulli": (DisARM(), 1), "categorical": (ScoreFunction(LeaveOneOut()), 2)}


@pytest.fixture
def story(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import discrete_vae

    yield discrete_vae
    for name in ("discrete_vae", "_story"):
        sys.modules.pop(name, None)


def outcomes(kind, shape):
    """Return all values of the latents of a datum."""
    if kind == "Bernoulli":
        return np.array(list(itertools.product([0.0, 1.0], repeat=shape[0])))
    return np.eye(shape[1])[np.array(list(itertools.product(range(shape[1]), repeat=shape[0])))]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "kind"), [("pyro", "categorical"), ("numpyro", "Bernoulli")])
def test_the_bound_is_below_the_exact_likelihood_and_above_independent_pixels(backend, kind, story, tmp_path):
    script = story.model_script("sbn")
    data, held_out = script.load({**script.OPTIONS, "binarize": "threshold"}, 0)
    found = story.fitted(backend, kind, *CHOICE[kind], data, 500, 0, SMALL[kind])
    z = outcomes(kind, found.shape)
    log_weights = np.stack([found.log_weight(held_out, np.broadcast_to(v, (len(held_out), *v.shape))) for v in z])
    log_q = np.stack([found.log_mass(found.encoded(held_out), v) for v in z])
    assert np.allclose(np.exp(log_q).sum(0), 1)
    exact = np.logaddexp.reduce(log_weights + log_q, 0)
    bound = (np.exp(log_q) * log_weights).sum(0)
    mean = data.mean(0).clip(1e-3, 1 - 1e-3)
    alone = (held_out * np.log(mean) + (1 - held_out) * np.log(1 - mean)).sum(-1).mean()
    assert np.all(bound <= exact + 1e-9) and exact.mean() - bound.mean() < 2
    assert bound.mean() > alone + 4
    assert found.elbo(held_out, np.random.default_rng(0), 200) == pytest.approx(bound.mean(), abs=0.1)
    # The samples that the picture shows follow the prior.
    prior = np.broadcast_to(found.params["prior"], (20_000, *found.shape))
    expected = story.sigmoid(prior[0]) if kind == "Bernoulli" else np.exp(story.log_softmax(prior[0]))
    assert np.allclose(found.drawn(prior, np.random.default_rng(1)).mean(0), expected, atol=0.02)


def test_the_story_compares_estimators_at_equal_evaluations(story):
    for estimators in story.ESTIMATORS.values():
        for estimator, particles in estimators.values():
            further = 0 if isinstance(estimator, ScoreFunction) else estimator.declaration.evaluations
            assert particles * (1 + further) == 2
