"""The mirrored score function in a subsampled plate: exact, and every broken one is caught."""

import numpy as np
import pytest
import torch

from pplgrad import Mirrored
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import HOST, Drive, array, fresh, gradient, worst
from pplgrad.testing.programs import Case
from tests.mirroring import MUTANTS, PARAMS, SUBSETS, apply, exact_loss, noise_of, program, quadrature

CASE = Case("mirrored", PARAMS, {}, program)
NODES, WEIGHTS = quadrature()


def expected(vectorized):
    """Return E[estimate] over noise and minibatches."""
    model, guide = program(HOST)
    elbo = TraceGrad_ELBO(vectorize_particles=vectorized, max_plate_nesting=1, estimators={"*": Mirrored()})
    total = {name: np.zeros(value.shape) for name, value in PARAMS.items()}
    for subset in SUBSETS:
        for node, weight in zip(NODES, WEIGHTS, strict=True):
            fresh(CASE)
            with Drive([{"data": np.array(subset)}], noise_of(node)):
                elbo.loss_and_grads(model, guide)
            for name, value in gradient().items():
                total[name] += weight / len(SUBSETS) * value
    return total


def exact():
    """Return the gradient of the loss of all data."""
    params = {name: array(value).requires_grad_() for name, value in PARAMS.items()}
    exact_loss(torch, params, array(NODES), array(WEIGHTS)).backward()
    return {name: value.grad.numpy() for name, value in params.items()}


@pytest.mark.parametrize(
    "vectorized", [pytest.param(False, marks=pytest.mark.slow), True], ids=["one-by-one", "at-once"]
)
def test_exact_in_a_subsampled_plate(vectorized):
    wanted = exact()
    assert worst(expected(vectorized), wanted) < 1e-9
    assert all(np.abs(value).min() > 1e-2 for value in wanted.values())


@pytest.mark.grid(together="mutants of mirrored draws")
@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, monkeypatch):
    apply(mutant, monkeypatch)
    assert worst(expected(True), exact()) > 1e-2
