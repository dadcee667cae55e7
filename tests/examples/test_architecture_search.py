"""The search finds the best network, which is known, and its objective is the one that can be enumerated."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pplgrad import LeaveOneOut, LocalExpectation, ScoreFunction
from pplgrad.numpyro import check_gradients


@pytest.fixture(scope="module")
def story():
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    import architecture_search

    yield architecture_search
    sys.path.remove(folder)
    for name in ("architecture_search", "_story"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def script(story):
    return story.model_script("architecture")


@pytest.fixture(scope="module")
def scores(script):
    return script.load({**script.OPTIONS, "epochs": 10}, 0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "estimator", "particles"),
    [("pyro", ScoreFunction(LeaveOneOut()), 8), ("numpyro", LocalExpectation(), 1)],
)
def test_the_search_finds_the_known_best(backend, estimator, particles, story, script, scores):
    q, reached = story.searched(backend, script, scores, estimator, particles, 300, 0)
    table, temperature = scores.reshape(script.SIZES), script.OPTIONS["temperature"]
    assert q.sum() == pytest.approx(1) and q.argmax() == table.argmax()
    entropy = -(q * np.log(q)).sum()
    exact = (q * table).sum() + temperature * entropy
    assert exact <= temperature * np.logaddexp.reduce(table.ravel() / temperature) + 1e-9
    # From the mean of all networks at the start to within two points of the best.
    assert reached[:5].mean() < exact - 5 and exact > table.max() - 2
    assert reached[-100:].mean() == pytest.approx(exact, abs=1)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_enumerated_space(script):
    scores = np.random.default_rng(0).normal(size=(1, int(np.prod(script.SIZES)))).astype(np.float32)
    model, guide = script.numpyro_program({**script.OPTIONS, "temperature": 1.0}, scores, 0)
    choice = {"width": ScoreFunction(LeaveOneOut()), "second": LocalExpectation(), "*": ScoreFunction()}
    settings = dict(estimators=choice, num_particles=2, draws=20_000, tolerance=0.3)
    check = check_gradients(model, guide, (jnp.asarray(scores),), **settings)
    assert "enumerated" in check.reference and check.status == "unbiased", str(check)
