"""The documentation's table of names in papers: where it says that two things are one, they are, on the same draws."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import Constant, DisARM, LeaveOneOut, LocalExpectation, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import array, gradient

LOGITS = np.array([0.7, -0.4, 0.1])


def cost(z):
    return z @ array([1.0, -2.0, 0.5]) + 2.0 * z[..., 0] * z[..., 1] - z.prod(-1) ** 2


def step(estimator, particles=1, sites=3):
    """Return a step's gradient and every value at which the cost was asked for, in order; the cost is all there is."""
    seen = []

    def guide():
        a = pyro.param("a", array(LOGITS[:sites]))
        return [pyro.sample(f"z{i}", dist.Bernoulli(logits=a[i])) for i in range(sites)]

    def model():
        a = pyro.param("a", array(LOGITS[:sites])).detach()
        # The same as in the guide: nothing is left of the densities but the score.
        z = torch.stack([pyro.sample(f"z{i}", dist.Bernoulli(logits=a[i])) for i in range(sites)])
        z = torch.cat([z, z.new_zeros(3 - sites)])
        seen.append(z.detach().numpy().copy())
        pyro.factor("cost", cost(z))

    pyro.clear_param_store()
    TraceGrad_ELBO(particles, estimators={"*": estimator}).loss_and_grads(model, guide)
    return -gradient()["a"], seen


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def asked(z):
    return float(cost(array(z)))


@pytest.mark.parametrize("seed", range(4))
def test_indecater_is_local_expectation(seed):
    """Σ_v ∂p(z_i = v) f(z with z_i = v), at one draw of the other sites."""
    pyro.set_rng_seed(seed)
    found, seen = step(LocalExpectation())
    drawn = seen[0]
    wanted = []
    for i in range(3):
        low, high = drawn.copy(), drawn.copy()
        low[i], high[i] = 0.0, 1.0
        slope = sigmoid(LOGITS[i]) * sigmoid(-LOGITS[i])
        wanted.append(slope * asked(high) - slope * asked(low))
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_u2g_is_disarm():
    """½ σ(|a|) [f(z₁) − f(z₂)] (z₁ − z₂), with z₁ and z₂ of one antithetic pair."""
    apart = 0
    for seed in range(20):
        pyro.set_rng_seed(seed)
        found, seen = step(DisARM(), sites=1)
        first, second = seen[0], seen[-1]
        apart += first[0] != second[0]
        wanted = 0.5 * sigmoid(abs(LOGITS[0])) * (asked(first) - asked(second)) * (first[0] - second[0])
        np.testing.assert_allclose(found, [wanted], atol=1e-12)
    assert 3 < apart < 18


@pytest.mark.slow
def test_the_rate_of_pairs_is_that_of_u2g():
    """z₁ = 1[u > σ(−a)] and z₂ = 1[u < σ(a)] differ with probability 1 − |2 σ(a) − 1|."""
    count = 0
    for seed in range(400):
        pyro.set_rng_seed(1000 + seed)
        _, seen = step(DisARM(), sites=1)
        count += seen[0][0] != seen[-1][0]
    chance = 1 - abs(2 * sigmoid(LOGITS[0]) - 1)
    assert abs(count - 400 * chance) < 4 * np.sqrt(400 * chance * (1 - chance))


@pytest.mark.parametrize("particles", [2, 4])
def test_rloo_is_leave_one_out(particles):
    """1/K Σ_k [f_k − mean of the others] ∇ log q_k, which is also 1/(K − 1) Σ_k [f_k − mean] ∇ log q_k."""
    found, seen = step(ScoreFunction(LeaveOneOut()), particles)
    draws = np.stack(seen[:particles])
    f = np.array([asked(z) for z in draws])
    scores = draws - sigmoid(LOGITS)
    others = (f.sum() - f) / (particles - 1)
    # The costs of sites above cancel in the model: the cost of every site is the factor, and log p − log q = 0.
    np.testing.assert_allclose(found, ((f - others)[:, None] * scores).mean(0), atol=1e-12)
    np.testing.assert_allclose(found, ((f - f.mean())[:, None] * scores).sum(0) / (particles - 1), atol=1e-12)


def test_reinforce_is_the_plain_score_function():
    """f(z) ∇ log q(z)."""
    found, seen = step(ScoreFunction(Constant(0.0)))
    np.testing.assert_allclose(found, asked(seen[0]) * (seen[0] - sigmoid(LOGITS)), atol=1e-12)
