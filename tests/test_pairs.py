"""Relaxations of one of two values, by log odds and by the log probabilities of both: the same weights and gradients."""

import numpy as np
import pytest
import torch

import pplgrad as pg
from pplgrad.core.array_ops import linear_density, pair_density
from pplgrad.estimators.relaxed import HardDraw, HardPair, Relaxation
from pplgrad.pyro._array_ops import OPS, TorchNoise

ODDS = [-np.inf, -50.0, -3.0, -0.4, 0.0, 0.7, 2.0, 6.0, 45.0, np.inf, -1.0, 1.3]
VALUES = [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
RELAXATIONS = [
    pg.GumbelSoftmax(0.7, hard=True),
    pg.GumbelRao(3, 0.6),
    pg.StraightThrough(),
    pg.ReinMax(1.0),
    pg.ReinMax(1.7),
    pg.GappedStraightThrough(0.8, gap=0.9),
]


def log_probs(odds):
    """Return the log probabilities of both values, −inf where one is impossible."""
    finite = torch.where(torch.isfinite(odds), odds, 0.0)
    both = torch.stack([-OPS.softplus(finite), -OPS.softplus(-finite)], -1)
    certain = torch.stack([torch.where(odds > 0, -torch.inf, 0.0), torch.where(odds > 0, 0.0, -torch.inf)], -1)
    return torch.where(torch.isfinite(odds)[:, None], both, certain)


def slopes(weights, odds):
    moved = torch.linspace(0.5, 1.5, len(odds), dtype=odds.dtype)
    return torch.autograd.grad((weights * moved).sum(), odds)[0]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", RELAXATIONS, ids=repr)
def test_weights(estimator):
    odds = torch.tensor(ODDS, dtype=torch.float64, requires_grad=True)
    values = torch.tensor(VALUES, dtype=torch.float64)
    torch.manual_seed(0)
    pair = estimator.weight_of_second(HardPair(OPS, odds, values, TorchNoise()))
    torch.manual_seed(0)
    draw = HardDraw(OPS, log_probs(odds), values.long(), TorchNoise())
    both = draw.cut(estimator.weights(draw))[..., 1]
    torch.testing.assert_close(pair, both, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slopes(pair, odds), slopes(both, odds), rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("estimator", RELAXATIONS, ids=repr)
def test_a_relaxation_without_a_form_for_pairs(estimator):
    odds = torch.tensor(ODDS, dtype=torch.float64, requires_grad=True)
    found = []
    for weights in (Relaxation.weight_of_second, type(estimator).weight_of_second):
        torch.manual_seed(0)
        pair = HardPair(OPS, odds, torch.tensor(VALUES, dtype=torch.float64), TorchNoise())
        found.append(weights(estimator, pair))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(slopes(x, odds) for x in found), rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("weights", [VALUES, [0.0, 0.2, 0.4, 0.9, 0.5, 0.1, 0.3, 0.8, 0.7, 0.95, 0.6, 0.25]])
def test_densities(weights):
    odds = torch.tensor(ODDS, dtype=torch.float64, requires_grad=True)
    given = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    pair = pair_density(OPS, given, odds)
    both = linear_density(OPS.xp, given, log_probs(odds), True)
    torch.testing.assert_close(pair, both, rtol=1e-9, atol=1e-12)
    for x in (odds, given):
        torch.testing.assert_close(slopes_of(pair, x), slopes_of(both, x), rtol=1e-7, atol=1e-11)


def slopes_of(density, x):
    return torch.autograd.grad(density.sum(), x, retain_graph=True)[0]


def test_another_draw_has_the_same_law():
    odds = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64).expand(200_000, 3)
    torch.manual_seed(0)
    anew = HardPair(OPS, odds, torch.zeros_like(odds), TorchNoise()).concrete_anew(0.5)
    drawn = torch.bernoulli(torch.sigmoid(odds))
    given = HardPair(OPS, odds, drawn, TorchNoise()).concrete(0.5)
    assert ((given > 0.5) == (drawn == 1)).all()
    for power in (1, 2, 3):
        first, second = anew**power, given**power
        z = (first.mean(0) - second.mean(0)) / (first.var(0) + second.var(0)).sqrt() * len(odds) ** 0.5
        assert abs(z).max() < 4.5
