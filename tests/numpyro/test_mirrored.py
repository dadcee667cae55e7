"""The mirrored score function in a subsampled plate: exact, and every broken one is caught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pplgrad import Mirrored
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import HOST, KEY, array, driven
from tests.mirroring import MUTANTS, PARAMS, SUBSETS, apply, exact_loss, noise_of, program, quadrature

NODES, WEIGHTS = quadrature()


def parameters():
    return {name: array(value) for name, value in PARAMS.items()}


def expected():
    """Return E[estimate] over noise and minibatches."""
    model, guide = program(HOST)
    elbo = TraceGrad_ELBO(estimators={"*": Mirrored()})

    def loss(params, node, subset):
        run = driven(guide, {"data": subset[None]}, noise_of(node), 1)
        return elbo.loss(jax.random.key(KEY), params, model, run)

    over_noise = jax.vmap(jax.grad(loss), (None, 0, None))
    found = jax.jit(jax.vmap(over_noise, (None, None, 0)))(parameters(), array(NODES), jnp.asarray(SUBSETS))
    return jax.tree.map(lambda g: np.tensordot(WEIGHTS, np.asarray(g).mean(0), 1), found)


def error():
    """Return how far that is from the gradient of the loss of all data."""
    wanted = jax.grad(lambda params: exact_loss(jnp, params, array(NODES), array(WEIGHTS)))(parameters())
    assert all(np.abs(value).min() > 1e-2 for value in wanted.values())
    found = expected()
    return max(np.abs(found[name] - value).max() for name, value in wanted.items())


@pytest.mark.slow
def test_exact_in_a_subsampled_plate():
    assert error() < 1e-9


@pytest.mark.grid(together="mutants of mirrored draws")
@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, monkeypatch):
    apply(mutant, monkeypatch)
    assert error() > 1e-2
