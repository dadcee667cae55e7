"""The stories of latent structure run from the command line to their picture; what they find is tested beside."""

from functools import partial

import pytest

from tests.examples.stories import part, shown

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
MEASURING = {"n_mixture", "learning_to_rank"}
"""Those that measure variances, of which a few draws are enough here."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_story(name, tmp_path):
    out = tmp_path / "picture.png"
    few = {"gradient_variances": partial(part("_story").gradient_variances, draws=4)} if name in MEASURING else {}
    assert f"written: {out}" in shown(name, out, *STORIES[name], "--steps", 2, "--seed", 1, **few)
