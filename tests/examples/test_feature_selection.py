"""The exact bound of the script is that of the program, and training chooses measurements that tell the tumours."""

import numpy as np
import pytest

from pplgrad import LocalExpectation, ScoreFunction
from tests.examples.loading import example, loss_and_gradients, program


def test_exact_sums():
    script = example("_story").model_script("feature_selection")
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.normal(size=(6, 10)), rng.integers(0, 2, 6)])
    params = {"logits": rng.normal(size=10), "weights": rng.normal(size=10), "bias": 0.3}
    bound, evidence, guide, posterior = script.exact(params, rows, 2)
    assert len(guide) == 45 and np.isclose(guide.sum(), 1) and np.isclose(posterior.sum(), 1)
    assert np.isclose(bound, evidence - guide @ np.log(guide / posterior)) and bound < evidence


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_loss_is_the_bound(backend):
    """With weights of zero all draws cost the same, and the guide is the prior."""
    script, options, _ = program("feature_selection", backend, None)
    rows, _ = script.load(options, 0)
    made = program("feature_selection", backend, rows)[2]
    start = {"logits": np.zeros(10, np.float32), "weights": np.zeros(10, np.float32), "bias": np.float32(0.7)}
    loss, _ = loss_and_gradients(backend, made, rows, start, {}, estimators={"chosen": ScoreFunction()})
    assert np.isclose(-loss, script.exact(start, rows, 3)[0], rtol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_chosen_measurements_tell_the_tumours():
    script, options, _ = program("feature_selection", "numpyro", None)
    rows, others = script.load(options, 0)
    made = program("feature_selection", "numpyro", rows)[2]
    params, _ = example("_story").train(
        "numpyro", made, rows, 200, 0, estimators={"chosen": LocalExpectation()}, learning_rate=0.05
    )
    posterior = script.exact(params, rows, 3)[3]
    chosen = script.subsets(3)[posterior.argmax()]
    assert example("feature_selection").accuracy(params, chosen, others) > 0.9
