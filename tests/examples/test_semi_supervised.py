"""Labels are summed out where they are missing, and only there; their posterior is that of quadrature; a few of them suffice."""

import re
from itertools import product

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import norm

from pplgrad import LocalExpectation
from tests.examples.loading import example, loss_and_gradients, program
from tests.examples.stories import double_precision, shown

SMALL = {"style": 1, "strokes": 2, "hidden": 3}


def small(backend):
    rng = np.random.default_rng(2)
    x = np.column_stack([[3, -1, 0, -1], rng.random((4, 6)) < 0.5]).astype(float)
    script, options, made = program("semi_supervised", backend, x, **SMALL)
    params = {name: rng.normal(size=value.shape) for name, value in script.initial(options, x, 0).items()}
    return script, made, params, x


def log_likelihood(script, params, pixels, s, b):
    """Return log p(y, x | s, b) of each image and digit."""
    found = []
    for y in range(10):
        on = 1 / (1 + np.exp(-script.decoded(params, y, s, b)))
        found.append(np.log(np.where(pixels > 0, on, 1 - on)).sum(-1) - np.log(10))
    return np.stack(found, -1)


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
@pytest.mark.parametrize("together", [{}, {"num_particles": 2, "vectorize_particles": True}], ids=["one", "two"])
def test_labels_are_summed_out_where_they_are_missing(backend, together):
    with double_precision():
        script, made, params, x = small(backend)
        rng = np.random.default_rng(3)
        s, sites = rng.normal(size=(4, 1)), {"strokes": LocalExpectation()}
        _, _, logits = script.encoded(params, x[:, 1:].mean(0), x[:, 1:])
        # Strokes that are all but certain: nothing is random.
        params["strokes_w"] *= 300 / np.abs(logits).min()
        b = (logits > 0).astype(float)
        joint = log_likelihood(script, params, x[:, 1:], s, b)
        each = np.where(x[:, 0] >= 0, joint[np.arange(4), x[:, 0].astype(int)], logsumexp(joint, -1))
        wanted = each.sum() + norm.logpdf(s).sum() + b.size * np.log(0.5)
        loss, found = loss_and_gradients(backend, made, x, params, {"style": s}, estimators=sites, **together)
        assert abs(loss + wanted) < 1e-9
        # Along the gradient of the decoder, by differences.
        for name in ("decode_class", "decode_b"):
            slope = 0.0
            for sign in (1, -1):
                moved = {**params, name: params[name] + sign * 1e-5 * found[name]}
                joint = log_likelihood(script, moved, x[:, 1:], s, b)
                each = np.where(x[:, 0] >= 0, joint[np.arange(4), x[:, 0].astype(int)], logsumexp(joint, -1))
                slope -= sign * each.sum() / 2e-5
            assert np.isclose(slope, (found[name] ** 2).sum(), rtol=1e-7)


def test_posterior_of_a_label_is_that_of_quadrature():
    script, _, params, x = small("numpyro")
    params["decode_class"] *= 2
    at, weight = np.polynomial.hermite_e.hermegauss(60)
    whole = []
    for bits in product((0.0, 1.0), repeat=2):
        for s, w in zip(at, weight, strict=True):
            b = np.broadcast_to(bits, (4, 2))
            whole.append(log_likelihood(script, params, x[:, 1:], np.full((4, 1), s), b) + np.log(w))
    exact = softmax(logsumexp(whole, 0), -1)
    # Draws as wide as the posterior, or the weights have no variance: log scales of about 0.4.
    params |= {
        "encode_w": 0.1 * params["encode_w"],
        "encode_b": np.full(3, 2.0),
        "strokes_w": 0.3 * params["strokes_w"],
    }
    params["style_w"] = np.column_stack([0.2 * params["style_w"][:, 0], np.full(3, 0.3)])
    found = script.label_probabilities(params, x[:, 1:].mean(0), x[:, 1:], np.random.default_rng(0), 20_000)
    assert np.abs(found - exact).max() < 0.01 and exact.max() > 0.2


def test_posterior_given_the_style_is_what_pyro_is_told():
    """`summed_posterior` at its own draws of the style: p(y | x, s, b) where the label is missing."""
    import pyro
    import torch

    from pplgrad.pyro import summed_posterior

    with double_precision():
        script, (model, guide), params, x = small("pyro")
        pyro.clear_param_store()
        for name, value in params.items():
            pyro.get_param_store()[name] = torch.tensor(value)
        found = summed_posterior(model, guide, torch.tensor(x), kind="marginals", num_samples=3, draws=True)
    for draw in range(3):
        s, b = (found[name][0, draw].numpy() for name in ("style", "strokes"))
        wanted = softmax(log_likelihood(script, params, x[:, 1:], s, b), -1)
        missing = x[:, 0] < 0
        assert np.abs(found["y"][0, draw].numpy() - wanted)[missing].max() < 1e-9


def test_each_digit_keeps_as_many_labels():
    script = example("_story").model_script("semi_supervised")
    train, test = script.load({**script.OPTIONS, "labels": 50, "copies": 3}, 0)
    labelled = train[train[:, 0] >= 0]
    assert train.shape == (1600, 65) and (test[:, 0] == -1).all()
    assert (np.bincount(labelled[:, 0].astype(int)) == 15).all()
    whole, _ = script.split(0)
    kept = train[:1500, 0] >= 0
    assert (train[:1500][kept] == whole[kept]).all() and (train[:1500, 1:] == whole[:, 1:]).all()
    with pytest.raises(ValueError, match="labels is 10 to 1500"):
        script.load({**script.OPTIONS, "labels": 5}, 0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_story(backend, tmp_path):
    text = shown("semi_supervised", tmp_path / "a.png", "--backend", backend, "--steps", 150, LABELS=(100,))
    shares = {name: float(share) for name, share in re.findall(r"(?:: |, )([a-z ]+) ([\d.]+)%", text)}
    assert shares["all images"] > shares["labelled images alone"] > 50
    assert shares["all images"] > 78 and shares["logistic regression"] > 70
