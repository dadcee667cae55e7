"""`assess_fit` on what NumPyro alone has: scans, masks inside of them, its autoguides, Python control flow."""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from pplgrad.errors import ProgramError
from pplgrad.numpyro import assess_fit
from pplgrad.testing.in_numpyro import isolated
from tests.assessed import normal

X = np.array([0.3, 1.2, -0.4])
MOVES = np.array([[0.7, 0.3], [0.2, 0.8]])
FEW = {"samples": 100, "replicates": 0}


@pytest.fixture(autouse=True)
def doubles():
    with isolated():
        yield


def chain(mask=None, guide_mask=None):
    """Return a hidden Markov model and a guide; a mask leaves out steps of one or both."""

    def model(x):
        def step(before, now):
            value, kept = now
            with numpyro.handlers.mask(mask=kept):
                z = numpyro.sample("z", dist.Categorical(jnp.asarray(MOVES)[before]))
                numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=value)
            return z, None

        scan(step, 0, (x, jnp.ones(3, bool) if mask is None else jnp.asarray(mask)))

    def guide(x):
        def step(before, now):
            value, kept = now
            with numpyro.handlers.mask(mask=kept):
                logits = jnp.stack([0.0 * value, value + 0.5 * before], -1)
                return numpyro.sample("z", dist.Categorical(logits=logits)), None

        scan(step, 0, (x, jnp.ones(3, bool) if guide_mask is None else jnp.asarray(guide_mask)))

    return model, guide


def chain_by_hand(z, steps=3):
    """Return log p and log q of the first steps of the chain."""
    log_p = log_q = 0.0
    before = np.zeros(z.shape[:-1], int)
    for t in range(steps):
        now = z[..., t]
        log_p = log_p + np.log(MOVES[before, now]) + normal(X[t], 2.0 * now)
        odds = X[t] + 0.5 * before
        log_q = log_q + now * odds - np.log1p(np.exp(odds))
        before = now
    return log_p, log_q


@pytest.mark.slow
def test_a_scan():
    found = assess_fit(*chain(), (jnp.asarray(X),), samples=200, replicates=50, simulations=20)
    log_p, log_q = chain_by_hand(found._draws.latents["z"].values)
    np.testing.assert_allclose(found._draws.log_weights, log_p - log_q, rtol=1e-9)
    every = np.array(list(itertools.product((0, 1), repeat=3)))
    assert found.evidence.exact == pytest.approx(np.log(np.exp(chain_by_hand(every)[0]).sum()), abs=1e-9)
    assert [check.name for check in found.checks] == ["x: mean", "x: spread"]
    assert found.calibration[0].ranks == 20 and found.calibration[0].elements == 3


@pytest.mark.slow
def test_padding_in_a_scan():
    kept = [True, True, False]
    found = assess_fit(*chain(kept, kept), (jnp.asarray(X),), **FEW)
    log_p, log_q = chain_by_hand(found._draws.latents["z"].values, 2)
    np.testing.assert_allclose(found._draws.log_weights, log_p - log_q, rtol=1e-9)
    with pytest.raises(ProgramError, match="'z' is masked differently"):
        assess_fit(*chain(kept, None), (jnp.asarray(X),), **FEW)


def shared(x):
    w = numpyro.sample("w", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(w, 1.0), obs=x)


@pytest.mark.slow
def test_autoguides():
    scale = 1 / np.sqrt(1 / 4 + 3)
    params = {"w_auto_loc": jnp.asarray(X.sum() * scale**2), "w_auto_scale": jnp.asarray(scale)}
    guide = AutoNormal(shared, prefix="auto")
    found = assess_fit(shared, guide, (jnp.asarray(X),), params=params, samples=200, replicates=100)
    # One number is between its parts: the evidence of three data with a common mean.
    covariance = np.eye(3) + 4.0
    exact = -0.5 * (X @ np.linalg.solve(covariance, X) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose([found.evidence.bound, found.evidence.elbo], exact, rtol=1e-6)
    assert found.passed and np.isneginf(found.khat)
    with pytest.raises(ProgramError, match="Site 'w' of the guide is a point mass"):
        assess_fit(shared, AutoDelta(shared), (jnp.asarray(X),), **FEW)


@pytest.mark.slow
def test_python_control_flow():
    def model(x):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(1.0 if z > 0 else -1.0, 1.0), obs=x)

    def guide(x):
        numpyro.sample("z", dist.Bernoulli(logits=2.0 * x))

    # Draws are made one by one here: few, for each simulation.
    few = {"samples": 100, "replicates": 20, "simulations": 20, "rank_draws": 9}
    found = assess_fit(model, guide, (jnp.asarray(0.3),), **few)
    exact = np.log(0.5 * np.exp(normal(0.3, 1.0)) + 0.5 * np.exp(normal(0.3, -1.0)))
    np.testing.assert_allclose([found.evidence.exact, found.evidence.bound], exact, rtol=1e-9)
    assert found.passed
