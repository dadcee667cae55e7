"""How far the posterior of summed sites is from brute force: marginals, most probable values, and the frequencies of samples."""

import math

import jax
import numpy as np
from numpyro import handlers

from pplgrad.numpyro import summed_posterior
from tests.numpyro.posteriors import PADDING, POSTERIORS, Posterior

KEY = jax.random.key(4)
DRAWS = 4000


def given_the_same_draws(name, kinds, num_samples=1):
    """Return a program, what its draws are, and the posterior of each kind given them."""
    model, guide, params = POSTERIORS[name]()
    found, rows = {}, []
    for kind in kinds:
        given = {"kind": kind, "num_samples": num_samples, "draws": True}
        # Compiled as one function: by itself each of its operations would be compiled alone.
        every = jax.jit(lambda key, given=given: summed_posterior(key, params, model, guide, **given))(KEY)
        summed = [key for key in every if key not in _drawn(model, guide, params)]
        found[kind] = {key: every.pop(key) for key in summed}
        rows = [{key: x[0, i] for key, x in every.items()} for i in range(num_samples)]
    return model, params, rows, found


def _drawn(model, guide, params):
    """Return the names of what a guide draws, and of minibatches."""
    sites = handlers.trace(handlers.substitute(handlers.seed(guide, KEY), data=params)).get_trace()
    return {name for name, site in sites.items() if site["type"] in ("sample", "plate")}


_FOUND = {}


def by_brute_force(name, model, params, drawn):
    """Return the posterior of a program given its draws, which is made once for all tests and mutants that compare with it."""
    given = (name, *((key, np.asarray(x).tobytes()) for key, x in sorted(drawn.items())))
    if given not in _FOUND:
        _FOUND[given] = Posterior(model, params, drawn, PADDING.get(name))
    return _FOUND[given]


def off(name, num_samples=1, kinds=("marginals", "map")):
    """Return by how much a program's marginals are off, and its most probable values."""
    model, params, rows, found = given_the_same_draws(name, kinds, num_samples)
    worst = dict.fromkeys(kinds, 0.0)
    for i, drawn in enumerate(rows):
        right = by_brute_force(name, model, params, drawn)
        for kind in kinds:
            wanted = right.marginals() if kind == "marginals" else right.most_probable()
            assert wanted.keys() == found[kind].keys()
            for key, x in wanted.items():
                assert found[kind][key].shape == (1, num_samples, *x.shape)
                worst[kind] = max(worst[kind], float(np.abs(x - found[kind][key][0, i]).max()))
    return worst


def excess(name, draws=DRAWS):
    """Return how far the frequencies of joint samples are from their probabilities: χ² less its mean, in its standard deviations."""
    model, guide, params = POSTERIORS[name]()
    drawn = {
        key: site["value"]
        for key, site in handlers.trace(handlers.substitute(handlers.seed(guide, KEY), data=params)).get_trace().items()
        if site["type"] in ("sample", "plate")
    }
    right = by_brute_force(name, model, params, drawn)
    fixed = handlers.substitute(guide, data=drawn)
    found = jax.jit(lambda key: summed_posterior(key, params, model, fixed, num_samples=draws))(KEY)
    assert {key: x.shape[2:] for key, x in found.items()} == {
        key: site["value"].shape for key, site in right.sites.items()
    }
    rows = np.concatenate([np.asarray(found[key][0]).reshape(draws, -1) for key in right.shapes], 1)
    outcomes = np.concatenate([right.support[k][x].reshape(len(x), -1) for k, x in right.outcomes.items()], 1)
    numbers = {tuple(outcome): i for i, outcome in enumerate(outcomes)}
    counts = np.bincount([numbers[tuple(row)] for row in rows], minlength=len(outcomes))
    expected = right.probabilities() * draws
    assert not counts[expected == 0].any()
    order = np.argsort(-expected)[: int((expected > 0).sum())]
    cells = max(2, int((expected > 5).sum()))
    seen = np.append(counts[order[: cells - 1]], counts[order[cells - 1 :]].sum())
    wanted = np.append(expected[order[: cells - 1]], expected[order[cells - 1 :]].sum())
    return float(((seen - wanted) ** 2 / wanted).sum() - (cells - 1)) / math.sqrt(2 * (cells - 1))
