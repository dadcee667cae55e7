"""Estimators of a belief network's gradient have the published order of variances."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def story():
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    import ranking

    yield ranking
    sys.path.remove(folder)
    for name in ("ranking", "_story"):
        sys.modules.pop(name, None)


@pytest.fixture
def drawn_once(monkeypatch):
    """Each estimator is compared with the same draws of the same reference: they are made for the first one, and kept for the others."""
    from pplgrad.pyro.diagnostics import Gradients

    draws, kept = Gradients.draws, {}

    def draws_once(self, elbo, chunk=1):
        make = draws(self, elbo, chunk)

        def chunks(count, seed):
            # An ELBO that is held here is no other one's place in memory.
            key = id(elbo), count, seed
            if key not in kept:
                kept[key] = elbo, list(make(count, seed))
            return iter(kept[key][1])

        return chunks

    monkeypatch.setattr(Gradients, "draws", draws_once)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_published_order(layers, story, drawn_once):
    found = story.ranked("pyro", {"latents": 15, "layers": layers}, 60, 0, size=20)
    assert found["none"] > 5 * found["average"]
    assert found["average"] > 1.1 * found["network"] and found["average"] > 1.1 * found["leave-one-out"]
    assert found["ARM"] > 1.05 * found["DisARM"] and found["two draws a layer"] > 1.05 * found["DisARM"]


@pytest.mark.slow
def test_the_same_order_in_numpyro(story):
    chosen = {name: story.ESTIMATORS[name] for name in ("none", "leave-one-out", "ARM", "DisARM")}
    found = story.ranked("numpyro", {"latents": 15, "layers": 1}, 60, 0, size=20, estimators=chosen)
    assert found["none"] > 5 * found["leave-one-out"] > 5 * found["DisARM"] and found["ARM"] > 1.05 * found["DisARM"]
