"""Assignments are summed out exactly in both libraries, the bounds of the story are those of the programs, and the story says what it shows."""

import re

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import multivariate_normal, norm

from pplgrad import LocalExpectation
from tests.examples.loading import example, loss_and_gradients, program
from tests.examples.stories import double_precision, shown


def small(backend, **options):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 2))
    script, options, made = program("summed_mixture", backend, x, **options)
    params = {name: rng.normal(size=value.shape) for name, value in script.initial(options, x, 0).items()}
    return script, made, params, x, rng.normal(size=(3, 2))


def by_hand(script, params, means, x):
    """Return log p(x_i, k | means, spread) for every spread, by the densities of SciPy."""
    return np.array(
        [
            [
                log_softmax(params["prior"]) + [multivariate_normal.logpdf(one, mean, spread**2) for mean in means]
                for one in x
            ]
            for spread in script.SPREADS
        ]
    )


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
@pytest.mark.parametrize("together", [{}, {"num_particles": 3, "vectorize_particles": True}], ids=["one", "three"])
def test_assignments_are_summed_out(backend, together):
    """With the spread all but certain nothing is random; LocalExpectation is exact for any q(which_spread)."""
    with double_precision():
        script, made, params, x, means = small(backend)
        joint = by_hand(script, params, means, x)
        assert np.allclose(joint[2], script.joint(params, means, script.SPREADS[2], x), atol=1e-12)
        options = {"estimators": {"which_spread": LocalExpectation()}, **together}
        _, found = loss_and_gradients(backend, made, x, params, {"means": means}, **options)
        log_q = log_softmax(params["spread"])
        gain = logsumexp(joint, -1).sum(-1) - log_q
        wanted = np.exp(log_q) * (gain - np.exp(log_q) @ gain)
        assert np.abs(found["spread"] + wanted).max() < 1e-9

        params["spread"] = 60.0 * (np.arange(len(script.SPREADS)) == 3)
        loss, found = loss_and_gradients(backend, made, x, params, {"means": means}, **options)
        prior = norm.logpdf(means, 0, 3).sum() - np.log(len(script.SPREADS))
        assert abs(loss + prior + logsumexp(joint[3], -1).sum()) < 1e-9
        wanted = softmax(joint[3], -1).sum(0) - len(x) * softmax(params["prior"])
        assert np.abs(found["prior"] + wanted).max() < 1e-9


def test_bounds_are_those_of_drawn_assignments():
    script, _, params, x, _ = small("numpyro", assignments="sampled")
    params["means_log_scale"] -= 40
    params["spread"] = 60.0 * (np.arange(len(script.SPREADS)) == 1)
    joint = by_hand(script, params, params["means_loc"], x)[1]
    log_q = log_softmax(x @ params["assign_w"] + params["assign_b"], -1)
    summed, sampled = script.bounds(params, x, np.random.default_rng(0), 3)
    assert np.isclose(summed, logsumexp(joint, -1).mean()) and summed > sampled
    assert np.isclose(sampled, (np.exp(log_q) * (joint - log_q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_story(backend, tmp_path):
    text = shown("summed_mixture", tmp_path / "a.png", "--backend", backend, "--steps", 250, DRAWS=25)
    summed, sampled = (float(re.search(rf"{kind}: (-[\d.]+) nats", text)[1]) for kind in ("summed", "sampled"))
    assert -4.4 < summed < -3.6 and summed > sampled
    start = {
        name: (float(a), float(b))
        for name, a, b in re.findall(r"of (\w+) at the start: .*?([\d.e+]+), summed ([\d.e+]+)", text)
    }
    assert set(start) == {"means_loc", "prior", "spread"} and all(a > b for a, b in start.values())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_training_is_looked_at_and_gradients_have_their_variance(backend):
    """A normal guide, reparameterized: the gradient of the loss for its mean m is m plus the noise."""
    story, looks = example("_story"), []
    if backend == "pyro":
        import pyro as ppl
        import pyro.distributions as dist
        import torch

        zero = torch.tensor(0.0)
    else:
        import numpyro as ppl
        import numpyro.distributions as dist

        zero = 0.0

    def model(x):
        ppl.sample("z", dist.Normal(0.0, 1.0))

    def guide(x):
        ppl.sample("z", dist.Normal(ppl.param("m", zero), 1.0))

    data = np.zeros((2, 1))
    fit = story.train(backend, (model, guide), data, 7, 0, every=3, at=lambda *look: looks.append(look))
    assert [step for step, *_ in looks] == [1, 3, 6] and len(fit.losses) == 7
    assert looks[0][1] == 0 and 0 < looks[1][1] < looks[2][1] and len({float(p["m"]) for *_, p in looks}) == 3
    params = {"m": np.array(0.5, np.float32)}
    for particles in (1, 4):
        found = story.gradient_variances(
            backend, (model, guide), data, params, estimators={}, particles=particles, draws=400
        )
        assert abs(found["m"] * particles - 1) < 0.3
