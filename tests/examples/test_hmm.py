"""Fisher's identity exactly, and training by gradients reaches what expectation maximisation reaches."""

from itertools import product

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from pplgrad import LeaveOneOut, ScoreFunction
from tests.examples.loading import example, program


def small():
    """Return the script, parameters and two short texts."""
    script = example("_story").model_script("hmm")
    rng = np.random.default_rng(3)
    x = np.array([[1, 5, 1], [0, 20, 5]], float)
    sizes = {"start": 2, "change": (2, 2), "emit": (2, 27)}
    return script, {name: rng.normal(size=size) for name, size in sizes.items()}, x


def log_likelihood(params, x):
    """Return log p(x) by a sum over all chains."""
    start, change, emit = (log_softmax(params[name], -1) for name in ("start", "change", "emit"))
    total = 0.0
    for letters in x.astype(int):
        chains = [
            start[z[0]]
            + sum(change[a, b] for a, b in zip(z, z[1:], strict=False))
            + sum(emit[s, letter] for s, letter in zip(z, letters, strict=True))
            for z in product(range(2), repeat=len(letters))
        ]
        total += logsumexp(chains)
    return total


def test_forward_backward_is_the_sum_over_all_chains():
    script, params, x = small()
    log_prob, counts = script.forward_backward(params, x)
    assert np.isclose(log_prob.sum(), log_likelihood(params, x), atol=1e-12)
    assert np.isclose(counts["emit"].sum(), x.size) and np.isclose(counts["change"].sum(), 4)
    gradient = script.fisher_gradient(params, x)
    for name, value in params.items():
        for place in list(np.ndindex(value.shape))[:6]:
            moved = {sign: {n: v.copy() for n, v in params.items()} for sign in (-1, 1)}
            for sign in moved:
                moved[sign][name][place] += sign * 1e-5
            slope = (log_likelihood(moved[1], x) - log_likelihood(moved[-1], x)) / 2e-5
            assert np.isclose(gradient[name][place], slope, atol=1e-8)
    better = script.em_step(params, x)
    assert script.forward_backward(better, x)[0].sum() > log_prob.sum() + 1


def test_gradient_in_scan_is_the_posterior_weighted_sum():
    """With the posterior for a guide the expected estimate is Fisher's identity, enumerated in float64."""
    from pplgrad.numpyro import TraceGrad_ELBO
    from pplgrad.testing.in_numpyro import array, expected_gradient, isolated
    from pplgrad.testing.programs import Case

    script, params, x = small()
    with isolated():
        _, _, (model, guide) = program("hmm", "numpyro", x, guide="exact", length=3)
        data = array(x)
        case = Case("hmm", params, {"z": ((3, 2), 2)}, lambda host: (lambda: model(data), lambda: guide(data)))
        found = expected_gradient(case, TraceGrad_ELBO(estimators={"z": ScoreFunction()}), 1)
    wanted = script.fisher_gradient(params, x)
    for name in params:
        assert np.abs(-found[name] - wanted[name]).max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpyro", "pyro"])
def test_gradients_reach_what_em_reaches(backend):
    story = example("_story")
    script = story.model_script("hmm")
    data, _ = script.load({**script.OPTIONS, "length": 8, "pieces": 40}, 0)
    script, options, made = program("hmm", backend, data, length=8)
    start = script.initial(options, data, 0)
    begin = script.forward_backward(start, data)[0].mean()
    em = start
    for _ in range(60):
        em = script.em_step(em, data)
    params, losses = story.train(
        backend, made, data, 150, 0, estimators={"z*": ScoreFunction(LeaveOneOut())}, learning_rate=0.1, particles=4
    )
    reached, best = (script.forward_backward(p, data)[0].mean() for p in (params, em))
    assert reached > begin + 0.8 * (best - begin)
    # What is trained is a lower bound of it.
    assert -losses[-20:].mean() / len(data) < reached + 0.1
