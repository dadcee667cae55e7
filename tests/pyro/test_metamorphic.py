"""Metamorphic facts, and the known orders of variances."""

import numpy as np
import pyro
import pytest
from pyro import poutine

from pplgrad import Constant, Expectation, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import HOST, assert_same, exact_gradient, expected_gradient, fresh, gradient
from pplgrad.testing.programs import CASES
from tests.metamorphic import LINEAR, ORDERS, credited, toy


def one(elbo, model, guide):
    fresh(CASES["hierarchy"])
    pyro.set_rng_seed(0)
    elbo.loss_and_grads(model, guide)
    return gradient()


@pytest.mark.slow
@pytest.mark.parametrize("short", LINEAR)
def test_costs_times_ten(short):
    model, guide = CASES["hierarchy"].build(HOST)
    estimator, particles = LINEAR[short]
    elbo = TraceGrad_ELBO(particles, estimators={"z*": estimator})
    plain = one(elbo, model, guide)
    scaled = one(elbo, poutine.scale(model, 10.0), poutine.scale(guide, 10.0))
    assert_same(scaled, {name: 10 * value for name, value in plain.items()})


def test_a_constant_more_in_the_baseline():
    for constant in (0.0, 5.0):
        found = expected_gradient(
            CASES["hierarchy"],
            lambda c=constant: TraceGrad_ELBO(estimators={"z*": ScoreFunction(Constant(c))}),
            1,
        )
        assert_same(found, exact_gradient(CASES["hierarchy"]))


@pytest.mark.grid(together="known orders")
@pytest.mark.slow
@pytest.mark.parametrize(
    "short", ["DisARM, ARM", "ARMS, leave-one-out", "unordered set, samples", "local expectation, score"]
)
def test_known_orders(short):
    model, guide = toy(HOST)
    variances = []
    for estimator in ORDERS[short][:2]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = TraceGrad_ELBO(ORDERS[short][2], estimators={"z": estimator}, objective=Expectation())
        rows = []
        for _ in range(500):
            elbo.loss_and_grads(model, guide)
            rows.append(gradient()["a"])
        variances.append(np.var(rows, axis=0).sum())
    assert variances[0] < variances[1]


@pytest.mark.slow
def test_rao_blackwellised_costs_vary_less():
    variances = []
    for plated in (True, False):
        model, guide = credited(HOST, plated)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()})
        rows = []
        with pyro.validation_enabled(plated):  # Pyro refuses a batch that no plate declares.
            for _ in range(500):
                elbo.loss_and_grads(model, guide)
                rows.append(gradient()["a"])
        variances.append(np.var(rows, axis=0).sum())
    assert 2 * variances[0] < variances[1]
