"""The reward of an order is right, and training finds orders that are better than those of least squares."""

import numpy as np
import pytest

from pplgrad import Expectation, LeaveOneOut, ScoreFunction
from tests.examples.loading import example, loss_and_gradients, program


def test_reward_by_hand():
    script = example("_story").model_script("learning_to_rank")
    gains = np.array([[3.0, 0.0, 1.0]])
    best, worst = 3 + 1 / np.log2(3), 1 / np.log2(3) + 3 / 2
    assert np.allclose(script.ndcg(np.array([[2.0, 0.0, 1.0]]), gains), 1.0)
    assert np.allclose(script.ndcg(np.array([[0.0, 2.0, 1.0]]), gains), worst / best)


@pytest.mark.parametrize("ranking", ["numbers", "matrix"])
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_program_rewards_what_the_script_says(backend, ranking):
    """With weights as large as these the policy is sure of its order."""
    script, options, _ = program("learning_to_rank", backend, None, ranking=ranking)
    groups = script.load(options, 0)[0][:8]
    weights = 1000 * np.random.default_rng(0).normal(size=10).astype(np.float32)
    made = program("learning_to_rank", backend, groups, ranking=ranking)[2]
    loss, _ = loss_and_gradients(backend, made, groups, {"weights": weights}, {}, objective=Expectation())
    x, gains = script.parts(groups)
    assert np.isclose(-loss, script.ndcg(x @ weights, gains).sum(), rtol=1e-5)


@pytest.mark.slow
def test_policy_is_better_than_a_random_order():
    script, options, _ = program("learning_to_rank", "numpyro", None)
    groups, others = script.load(options, 0)
    made = program("learning_to_rank", "numpyro", groups)[2]
    chosen = {"ranking": ScoreFunction(LeaveOneOut())}
    params, _ = example("_story").train(
        "numpyro", made, groups, 300, 0, estimators=chosen, particles=4, learning_rate=0.02, objective=Expectation()
    )
    x, gains = script.parts(others)
    assert script.ndcg(x @ params["weights"], gains).mean() > 0.9
