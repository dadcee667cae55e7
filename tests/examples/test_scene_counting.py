"""Objects are counted, placed and drawn in scenes that the guide has not seen, under the ELBO and under IWAE."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))
SMALL = {"most": 2, "scenes": 500, "hidden": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "objective"), [("pyro", "ELBO"), ("pyro", "IWAE"), ("numpyro", "IWAE")], ids=lambda x: x
)
def test_counts_are_recovered(backend, objective):
    import scene_counting

    params, bound = scene_counting.trained(backend, objective, 70, 0, SMALL)
    scenes, truth, found, canvases, _ = scene_counting.counted(params, 0, SMALL)
    # Chance is a third; before training no object is found in any scene.
    assert np.mean(found == truth) > 0.85
    assert bound[-20:].mean() > bound[:20].mean() + 20
    # What is drawn explains the scenes' ink.
    assert ((scenes - canvases) ** 2).sum() < 0.4 * (scenes**2).sum()
    before = scene_counting.model_script("scenes").initial(
        {**scene_counting.model_script("scenes").OPTIONS, **SMALL}, 0
    )
    assert np.mean(scene_counting.counted(before, 0, SMALL)[2] == truth) < 0.45


def test_scenes_are_what_they_say():
    import scene_counting

    model = scene_counting.model_script("scenes")
    (train, counts), _ = model.scenes({**model.OPTIONS, "most": 3, "scenes": 200}, 0)
    ink = (train**2).sum((1, 2))
    means = [ink[counts == n].mean() for n in range(4)]
    assert train.shape == (200, 16, 16) and np.all(np.diff(means) > 10)


def test_an_object_is_drawn_where_it_is_looked_for():
    import scene_counting

    model = scene_counting.model_script("scenes")
    eye = model.Eye(np, np.asarray, np.asarray, model.OPTIONS)
    where = np.array([0, 20, 80])
    canvas = eye.drawn(where, np.zeros((3, model.OPTIONS["components"])))
    patches = eye.patches(canvas)
    for row, place in enumerate(where):
        assert np.allclose(patches[row, place], eye.mean)
        assert np.isclose(canvas[row].sum(), eye.mean.sum())
