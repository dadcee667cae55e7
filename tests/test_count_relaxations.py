"""`TruncatedGumbelSoftmax`: its gradient is that of the relaxed objective, in both libraries; and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from scipy.special import loggamma

from pplgrad import ConfigurationError, EstimatorError, PplgradError, ScoreFunction, TruncatedGumbelSoftmax
from pplgrad.estimators.count_relaxations import HardCount
from pplgrad.estimators.relaxed import HardDraw
from pplgrad.numpyro._tracing.relaxations import RelaxedCount as InNumPyro
from pplgrad.pyro._tracing.relaxations import RelaxedCount as InPyro
from pplgrad.testing import in_numpyro, in_pyro

HOSTS = {"pyro": in_pyro, "numpyro": in_numpyro}
LIBRARIES = list(HOSTS)
DRAWS = 10_000
AT, MOVED = 0.7, -0.4


def poisson(a, z):
    return a * z - np.exp(a) - loggamma(z + 1)


def gamma_poisson(a, z):
    """Return log q of successes before five failures, the rate of the Gamma being exp a."""
    return loggamma(z + 5) - loggamma(5) - loggamma(z + 1) + 5 * (a - np.log(1 + np.exp(a))) - z * np.log(1 + np.exp(a))


LAWS = {
    "Poisson": (lambda h, a: h.dist.Poisson(h.xp.exp(a)), poisson),
    "GammaPoisson": (lambda h, a: h.dist.GammaPoisson(h.array(5.0), h.xp.exp(a)), gamma_poisson),
}


def program(h, law, copies, cost):
    """Return model and guide: a decision, a count that follows it, and a cost of the count; a minibatch of twice as many."""
    three, half, count = h.array(3.0), h.array(0.5), len(copies)

    def guide():
        with h.plate("draws", 2 * count, subsample_size=count, dim=-1):
            g = h.sample("g", h.dist.Bernoulli(probs=half))
            h.sample("n", law(h, copies + MOVED * g))

    def model():
        with h.plate("draws", 2 * count, subsample_size=count, dim=-1):
            h.sample("g", h.dist.Bernoulli(probs=half))
            n = h.sample("n", h.dist.Poisson(three))
            h.factor("cost", -cost(h.xp, n))

    return model, guide


def draws(library, law, estimator, cost):
    """Return gradients of the loss of independent draws."""
    host = HOSTS[library]
    with host.isolated():
        if library == "pyro":
            pyro.set_rng_seed(0)
            copies = torch.full((DRAWS,), AT, requires_grad=True)
            objective = in_pyro.TraceGrad_ELBO(max_plate_nesting=1, estimators={"g": ScoreFunction(), "n": estimator})
            objective.loss_and_grads(*program(host.HOST, law, copies, cost))
            return copies.grad.numpy() / 2
        objective = in_numpyro.TraceGrad_ELBO(estimators={"g": ScoreFunction(), "n": estimator})

        def loss(copies):
            return objective.loss(jax.random.key(0), {}, *program(host.HOST, law, copies, cost))

        return np.asarray(jax.jit(jax.grad(loss))(jnp.full(DRAWS, AT))) / 2


def relaxed_draws(log_q, temperature, cost, count=40_000):
    """Return gradients of the relaxed loss with Gumbel noise of its own, by a complex step."""
    k, rng = np.arange(64.0), np.random.default_rng(0)
    a, gumbel = AT + MOVED * rng.integers(0, 2, (count, 1)) + 1e-30j, rng.gumbel(size=(count, 64))
    x = (log_q(a, k) + gumbel) / temperature
    w = np.exp(x - x.real.max(-1, keepdims=True))
    z = (w / w.sum(-1, keepdims=True)) @ k
    return (log_q(a[:, 0], z) - poisson(np.log(3.0), z) + cost(np, z)).imag / 1e-30


def linear(xp, z):
    return -0.5 * z


def curved(xp, z):
    return 0.3 * (z - 2) ** 2 + xp.sin(z)


def score(found, other):
    """Return the difference of two means in standard errors."""
    return abs(found.mean() - other.mean()) / (found.var() / len(found) + other.var() / len(other)) ** 0.5


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.4, 1.5])
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_it_is_the_gradient_of_the_relaxed_objective(library, name, temperature):
    law, log_q = LAWS[name]
    found = draws(library, law, TruncatedGumbelSoftmax(temperature), curved)
    assert score(found, relaxed_draws(log_q, temperature, curved)) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_nearly_exact_at_a_low_temperature(library):
    """For a linear cost, and a guide of the model's family: the log densities are linear too, but for the parameter's own part."""
    found = draws(library, LAWS["Poisson"][0], TruncatedGumbelSoftmax(0.1), linear)
    exact = np.mean([np.exp(a) * (a - np.log(3.0) - 0.5) for a in (AT, AT + MOVED)])
    assert abs(found.mean() - exact) < 0.05 + 4.5 * found.std() / DRAWS**0.5


def without_the_draw(self):
    """Break it: the noise has nothing to do with the draw."""
    found = plain.fget(self)
    return HardDraw(found.ops, found.log_probs, 0 * found.index, found.noise)


def at_fixed_probabilities(self):
    """Break it: the weights have no gradient."""
    found = plain.fget(self)
    return HardDraw(found.ops, found.ops.stop_gradient(found.log_probs), found.index, found.noise)


plain = HardCount.truncated


@pytest.mark.slow
@pytest.mark.parametrize("broken", [without_the_draw, at_fixed_probabilities])
def test_mutant_is_caught(broken, monkeypatch):
    monkeypatch.setattr(HardCount, "truncated", property(broken))
    found = draws("pyro", LAWS["Poisson"][0], TruncatedGumbelSoftmax(0.4), curved)
    assert score(found, relaxed_draws(poisson, 0.4, curved)) > 8


@pytest.mark.slow
def test_the_hosts_formulas_have_their_derivative_between_counts():
    z, step = np.array([0.3, 2.6, 7.1]), 1e-5
    rate, shape = np.array([1.5, 2.0, 4.0]), np.array([2.0, 5.0, 3.0])
    for law in ("Poisson", "GammaPoisson", "NegativeBinomial"):
        for wrapped, dist, array in (
            (InPyro, pyro_dist, lambda x: torch.tensor(x, requires_grad=True)),
            (InNumPyro, numpyro_dist, jnp.asarray),
        ):
            with in_numpyro.isolated():
                given = [array(rate)] if law == "Poisson" else [array(shape), array(rate)]
                if law == "NegativeBinomial":
                    given = [array(shape), array(np.array([0.3, 0.5, 0.6]))]
                fn = wrapped(getattr(dist, law)(*given))
                if dist is pyro_dist:
                    point = array(z)
                    (slope,) = torch.autograd.grad(fn.log_prob(point).sum(), point)
                else:
                    slope = jax.grad(lambda x, fn=fn: fn.log_prob(x).sum())(array(z))
                up, down = (np.asarray(_plain(fn.log_prob(array(z + move)))) for move in (step, -step))
                np.testing.assert_allclose(np.asarray(_plain(slope)), (up - down) / (2 * step), atol=1e-7)


def _plain(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else x


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_hard_draws_are_counts(library):
    seen = []

    def cost(xp, n):
        seen.append(n)
        return linear(xp, n)

    found = draws(library, LAWS["Poisson"][0], TruncatedGumbelSoftmax(0.5, hard=True), cost)
    assert np.isfinite(found).all() and found.std() > 0
    if library == "pyro":
        assert torch.allclose(seen[0], seen[0].round(), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_window_that_is_too_small_is_an_error(library):
    with pytest.raises(PplgradError, match="'n' in the guide is NaN. .* pass a larger window"):
        _first_step(library, LAWS["Poisson"][0], TruncatedGumbelSoftmax(0.5, window=2))


def _first_step(library, law, estimator):
    """Take a step that is not compiled, so that what is NaN can be looked at."""
    host = HOSTS[library]
    with host.isolated():
        if library == "pyro":
            objective = in_pyro.TraceGrad_ELBO(max_plate_nesting=1, estimators={"n": estimator})
            return objective.loss_and_grads(*program(host.HOST, law, torch.full((3,), AT), linear))
        objective = in_numpyro.TraceGrad_ELBO(estimators={"n": estimator})
        return objective.loss(jax.random.key(0), {}, *program(host.HOST, law, jnp.full(3, AT), linear))


def test_compiled_as_eager():
    with in_pyro.isolated():
        h, found = in_pyro.HOST, []

        def guide():
            with pyro.plate("draws", 3):
                pyro.sample("n", pyro_dist.Poisson(pyro.param("a", torch.tensor([1.0, 2.0, 0.5])).exp()))

        def model():
            with pyro.plate("draws", 3):
                n = pyro.sample("n", pyro_dist.Poisson(h.array(3.0)))
                pyro.sample("x", pyro_dist.Normal(n, 1.0), obs=h.array(0.3))

        for options in ({}, {"compile": {"backend": "eager"}}):
            pyro.clear_param_store()
            elbo = in_pyro.TraceGrad_ELBO(2, estimators={"n": TruncatedGumbelSoftmax()}, **options)
            for seed in range(3):
                pyro.set_rng_seed(seed)
                elbo.loss_and_grads(model, guide)
                found.append(in_pyro.gradient())
        for one, other in zip(found[:3], found[3:], strict=True):
            in_pyro.assert_same(one, other, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_refused(library):
    def binomial(h, a):
        return h.dist.Binomial(8, logits=a)

    with pytest.raises(EstimatorError, match="'n': the log density of Binomial .* CountDifference"):
        _first_step(library, binomial, TruncatedGumbelSoftmax())


@pytest.mark.parametrize("wrong", [dict(temperature=0.0), dict(window=1), dict(window=2.5)])
def test_wrong_settings(wrong):
    with pytest.raises(ConfigurationError, match="TruncatedGumbelSoftmax"):
        TruncatedGumbelSoftmax(**wrong)
