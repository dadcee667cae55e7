"""A truncated Dirichlet process keeps the components that scikit-learn's mixture finds, and empties the others."""

import numpy as np
import pytest

from pplgrad import LeaveOneOut, ScoreFunction
from tests.examples.loading import example, program


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_components_are_those_of_scikit_learn(backend):
    from sklearn.metrics import adjusted_rand_score
    from sklearn.mixture import GaussianMixture

    story = example("_story")
    script = story.model_script("dirichlet_process")
    data, kinds = script.measurements(script.OPTIONS)
    script, options, made = program("dirichlet_process", backend, data, components=6)
    start = script.assignment_logits(np, data, script.initial(options, data, 0)["assign"])
    params, _ = story.train(
        backend, made, data, 300, 0, estimators={"k": ScoreFunction(LeaveOneOut())}, learning_rate=0.05, particles=8
    )
    found = np.argmax(script.assignment_logits(np, data, params["assign"]), -1)
    peer = GaussianMixture(n_components=3, covariance_type="diag", n_init=3, random_state=0).fit(data)
    assert adjusted_rand_score(found, peer.predict(data)) > 0.9 > 0.7 > adjusted_rand_score(np.argmax(start, -1), kinds)
    used = np.flatnonzero(np.bincount(found, minlength=6) >= 5)
    assert len(used) == 3
    off = np.linalg.norm(params["means_loc"][used][:, None] - peer.means_, axis=-1)
    assert sorted(off.argmin(1)) == [0, 1, 2] and off.min(1).max() < 0.35
