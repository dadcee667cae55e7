"""Hard attention learns more from as many evaluations as soft attention, and looks at the whole digit."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from pplgrad import ELBO, LeaveOneOut, ScoreFunction


@pytest.fixture(scope="module")
def story():
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    import hard_attention

    yield hard_attention
    sys.path.remove(folder)
    for name in ("hard_attention", "_story"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_hard_attention_is_ahead_at_equal_evaluations(backend, story):
    script = story.model_script("attention")
    data, new = script.load(script.OPTIONS, 0)
    windows, labels = script.split(new)
    found = {}
    for kind in ("hard, leave-one-out", "soft"):
        found[kind], place = story.judged(kind, story.trained(backend, kind, data, 300, 0), new)
        if kind != "soft":
            assert (place == script.whole(windows)).mean() > 0.9
    accuracy = {kind: (labels_found == labels).mean() for kind, labels_found in found.items()}
    assert accuracy["hard, leave-one-out"] > accuracy["soft"] + 0.02 and accuracy["hard, leave-one-out"] > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_the_gradient_is_that_of_all_places(backend, story):
    """Two scenes have 81 outcomes; the terms of the place in the ELBO cancel."""
    script = story.model_script("attention")
    data, _ = script.load(script.OPTIONS, 0)
    options = {**script.OPTIONS, "hidden": 4, "scorer": 3}
    model, guide = getattr(script, f"{backend}_program")(options, data, 0)
    scenes = data[:2].astype(np.float32)
    if backend == "pyro":
        import pyro
        import torch

        pyro.clear_param_store()
        scenes = torch.tensor(scenes)
    plug_in = importlib.import_module(f"pplgrad.{backend}")
    choice = {"place": ScoreFunction(LeaveOneOut())}
    settings = dict(estimators=choice, num_particles=2, objective=ELBO(), draws=400, tolerance=0.3)
    check = plug_in.check_gradients(model, guide, (scenes,), **settings)
    assert "enumerated" in check.reference and check.status == "unbiased", str(check)
