"""Relaxations on a choice of three numbers: each draw and each bias against plain NumPy."""

import re

import numpy as np
import pytest
from scipy import integrate

from pplgrad import Expectation, GumbelSoftmax, ReinMax, StraightThrough
from tests.examples.stories import double_precision, model, part, shown

ROWS, TARGET = 3000, 0.2
THETA = np.array([-0.2, 0.1, 0.4])
VALUES = np.array([0.0, 0.5, 1.0])


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def jacobian(p):
    return np.diag(p) - np.outer(p, p)


def by_hand(kind, power):
    """Return the chances, each outcome's estimate, and the exact gradient."""
    chances = softmax(THETA)
    slopes = np.stack([-power * (v - TARGET) ** (power - 1) * VALUES for v in VALUES])
    if kind == "straight":
        estimates = slopes @ jacobian(chances)
    else:
        middles = [(np.eye(3)[k] + chances) / 2 for k in range(3)]
        estimates = np.stack(
            [(2 * jacobian(m) - jacobian(chances) / 2) @ s for m, s in zip(middles, slopes, strict=True)]
        )
    rewards = -((VALUES - TARGET) ** power)
    return chances, estimates, chances * (rewards - chances @ rewards)


def drawn(backend, estimator, theta, data, **options):
    """Return the gradient of each row."""
    script = model("choice")
    with double_precision():
        program = getattr(script, f"{backend}_program")(
            {**script.OPTIONS, **options}, data, 0, np.tile(theta, (ROWS, 1))
        )
        choice = {"estimators": {"z": estimator}, "objective": Expectation()}
        return part("_draws").gradient(backend, program, data, 4, **choice)["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("kind", ["straight", "reinmax"])
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_every_draw(backend, kind, power):
    """Straight-through is biased at p = 2 already; ReinMax is exact there, and biased at p = 4."""
    chances, estimates, exact = by_hand(kind, power)
    estimator = StraightThrough() if kind == "straight" else ReinMax(1.0)
    rows = drawn(backend, estimator, THETA, np.full((ROWS, 1), TARGET), power=power)
    distance = np.abs(rows[:, None] - estimates).max(-1)
    assert distance.min(1).max() < 1e-9
    counts = np.bincount(distance.argmin(1), minlength=3)
    assert np.abs((counts - ROWS * chances) / np.sqrt(ROWS * chances * (1 - chances))).max() < 4.5
    bias = np.linalg.norm(chances @ estimates - exact) / np.linalg.norm(exact)
    assert bias < 1e-9 if (kind, power) == ("reinmax", 2) else bias > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_gumbel_softmax_with_two_numbers(backend):
    """Its mean is the derivative of E[f(sigmoid((l + logistic) / τ))], by quadrature, whose bias grows with τ."""
    theta, target, temperatures = np.array([0.0, 0.4]), 0.3, np.array([0.2, 1.0, 3.0])
    data = np.stack([np.full(ROWS, target), np.tile(temperatures, ROWS // 3)], 1)
    rows = drawn(backend, GumbelSoftmax(lambda x: x[:, 1:]), theta, data, numbers=2)[:, 1].reshape(-1, 3)

    def slope(u, tau):
        y = 1 / (1 + np.exp(-(theta[1] + np.log(u / (1 - u))) / tau))
        return -2 * (y - target) * y * (1 - y) / tau

    relaxed = np.array([integrate.quad(slope, 0, 1, args=(tau,), limit=400)[0] for tau in temperatures])
    assert np.abs((rows.mean(0) - relaxed) / (rows.std(0) / np.sqrt(len(rows)))).max() < 4.5
    chance = softmax(theta)[1]
    exact = chance * (1 - chance) * (target**2 - (1 - target) ** 2)
    bias = np.abs(relaxed / exact - 1)
    assert bias[0] < bias[1] < bias[2] and bias[0] < 0.1 and bias[2] > 0.5


@pytest.mark.slow
def test_story(tmp_path):
    text = shown("relaxations", tmp_path / "a.png", "--backend", "pyro", "--steps", 150, DRAWS=3000)
    found = {
        (name, float(tau)): (float(bias), float(error), float(reached))
        for name, tau, bias, error, reached in re.findall(
            r"(.+), τ = ([\d.]+): bias ([\d.]+) ± ([\d.]+) of the gradient, .* reached (-[\d.]+)", text
        )
    }
    assert len(found) == 12
    for tau in (0.1, 3.0):
        bias, error, reached = found["score function (no τ)", tau]
        assert bias < 4.5 * error and reached > -0.11
    assert found["Gumbel-softmax", 0.1][0] < 4.5 * found["Gumbel-softmax", 0.1][1]
    assert found["Gumbel-softmax", 3.0][0] > 0.5
