"""The stories of latent structure run from the command line to their picture; what they find is tested beside."""

import pytest

from tests.examples.stories import shown

STORIES = {
    "spike_slab": ("--backend", "pyro"),
    "change_points": ("--backend", "pyro"),
    "telegraph": ("--backend", "pyro"),
    "dirichlet_process": ("--backend", "pyro"),
    "n_mixture": ("--backend", "pyro"),
    "feature_selection": (),
    "learning_to_rank": (),
    "topics": ("--backend", "pyro"),
    "hmm": (),
    "switching": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_story(name, tmp_path):
    out = tmp_path / "picture.png"
    assert f"written: {out}" in shown(name, out, *STORIES[name], "--steps", 2, "--seed", 1)
