"""The posterior of summed sites against every joint value of theirs, run one by one; and the host's tools with wrapped guides."""

import jax
import numpy as np
import pytest

from pplgrad.numpyro import summed_posterior
from tests.numpyro.posteriors import PADDING, POSTERIORS, Posterior

KEY = jax.random.key(4)


def given_the_same_draws(name, num_samples=1):
    """Return a program, what its draws are, and the posterior of each kind given them."""
    model, guide, params = POSTERIORS[name]()
    found = {
        kind: summed_posterior(KEY, params, model, guide, kind=kind, num_samples=num_samples)
        for kind in ("marginals", "map", "samples")
    }
    every = summed_posterior(KEY, params, model, guide, kind="map", num_samples=num_samples, draws=True)
    drawn = {key: x for key, x in every.items() if key not in found["map"]}
    rows = [{key: x[0, i] for key, x in drawn.items()} for i in range(num_samples)]
    return model, params, rows, found


def off(name, num_samples=1):
    """Return by how much a program's marginals are off, and how many of its most probable values."""
    model, params, rows, found = given_the_same_draws(name, num_samples)
    worst = {"marginals": 0.0, "map": 0.0}
    for i, drawn in enumerate(rows):
        right = Posterior(model, params, drawn, PADDING.get(name))
        for kind, wanted in (("marginals", right.marginals()), ("map", right.most_probable())):
            assert wanted.keys() == found[kind].keys()
            for key, x in wanted.items():
                assert found[kind][key].shape == (1, num_samples, *x.shape)
                worst[kind] = max(worst[kind], float(np.abs(x - found[kind][key][0, i]).max()))
    return worst


@pytest.mark.parametrize("name", POSTERIORS)
def test_marginals_and_most_probable_values_are_those_of_brute_force(name):
    worst = off(name, 2)
    assert worst["marginals"] < 1e-9 and worst["map"] == 0.0, worst
