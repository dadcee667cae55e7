"""Both closed forms of x ~ N(μ, σ²), (x − c)²: draw by draw, and as variances."""

import re

import numpy as np
import pytest

from pplgrad import Expectation, Reparam, ScoreFunction
from tests.examples.stories import double_precision, from_ratio, model, part, shown, story_module

D, SIGMA = np.array([0.0, 0.3, -1.0, 2.0]), np.array([0.2, 1.5, 1.0, 0.5])


def moments(estimate):
    """Return mean and variance over e ~ N(0, 1), exact for polynomials of e up to degree 31."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    values = estimate(nodes)
    mean = weights @ values / weights.sum()
    return mean, weights @ (values - mean) ** 2 / weights.sum()


@pytest.mark.slow
def test_the_formulas_are_the_moments():
    formulas = story_module("reparam_or_score").variances
    for d, s in zip(D, SIGMA, strict=True):
        score = [moments(lambda e: (d + s * e) ** 2 * e / s), moments(lambda e: (d + s * e) ** 2 * (e**2 - 1))]
        path = [moments(lambda e: 2 * (d + s * e)), moments(lambda e: 2 * (d + s * e) * s * e)]
        for name, found in (("score function", score), ("reparameterization", path)):
            np.testing.assert_allclose([m for m, _ in found], [2 * d, 2 * s**2], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose([v for _, v in found], formulas(name, d, s), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_every_draw(backend):
    """Each draw's gradient is the formula at some e, the same e for both parameters, and these e are standard normal."""
    script, targets = model("quadratic"), np.array([[0.4], [-1.0], [2.0], [0.0]] * 500)
    d, s = np.tile(D, 500), np.tile(SIGMA, 500)
    start = {"mu": targets[:, 0] + d, "log_sigma": np.log(s)}
    with double_precision():
        program = getattr(script, f"{backend}_program")(script.OPTIONS, targets, 0, start)
        path, score = (
            part("_draws").gradient(backend, program, targets, 5, estimators={"x": e}, objective=Expectation())
            for e in (Reparam(), ScoreFunction())
        )
    by_path = (-path["mu"] / 2 - d) / s
    np.testing.assert_allclose(-path["log_sigma"], 2 * (d + s * by_path) * s * by_path, atol=1e-9)
    by_score, error = from_ratio(score["log_sigma"] / score["mu"] / s, lambda e: (d + s * e) ** 2 * e / s + score["mu"])
    assert error.max() < 1e-6
    for e in (by_path, by_score):
        assert abs(e.mean()) < 4.5 / np.sqrt(2000) and abs(e.var() - 1) < 4.5 * np.sqrt(2 / 2000)


@pytest.mark.slow
def test_story(tmp_path):
    text = shown("reparam_or_score", tmp_path / "a.png", "--steps", 300)
    assert float(re.findall(r"draws a point: ([\d.]+)", text)[0]) < 0.5
    found = dict(re.findall(r"(\w+): after 300 steps \|d\| = ([\d.]+)", text))
    assert float(found["reparameterization"]) < 0.1 and float(found["function"]) < 1.0
