"""Second derivatives: exact by enumeration with higher_order=True, refused without."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pplgrad import (
    IWAE,
    Constant,
    DisARM,
    EstimatorError,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    Reparam,
    ScoreFunction,
)
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import (
    exact_bound_gradient,
    exact_hessian,
    expected_gradient,
    expected_gradient_over_cells,
)
from pplgrad.testing.programs import CASES
from tests.bounds import bound
from tests.covering import mostly


def make(name, estimator, particles=1, **given):
    return TraceGrad_ELBO(
        particles, estimators=dict.fromkeys(CASES[name].latents, estimator), higher_order=True, **given
    )


def same(found, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), found, wanted)


QUICK = ("shared_parameter",)


SOME = ["shared_parameter", "hierarchy", "mixed", "subsampled", "masked", "categorical_index"]
"""Pyro's test runs every program, at a third of the time."""


@pytest.mark.parametrize(
    "name",
    mostly(
        SOME, [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES if n != "nested_plates"]
    ),
)
def test_hessian_exact(name):
    found = expected_gradient(CASES[name], make(name, ScoreFunction(Constant(0.7))), 1, derive=jax.hessian)
    same(found, exact_hessian(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "shared_parameter", "batch_without_plate"])
def test_hessian_with_leave_one_out_exact(name):
    found = expected_gradient(CASES[name], make(name, ScoreFunction(LeaveOneOut()), 2), 2, derive=jax.hessian)
    same(found, exact_hessian(CASES[name]))


LOCAL = [
    "shared_parameter",
    "hierarchy",
    "mixed",
    "event",
    "categorical_index",
    "coupled_plate",
    "reparameterized_parent",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LOCAL])
def test_hessian_by_local_expectation_exact(name):
    found = expected_gradient_over_cells(CASES[name], make(name, LocalExpectation()), derive=jax.hessian)
    same(found, exact_hessian(CASES[name]))


@pytest.mark.slow
def test_hessian_of_a_bound_exact():
    case = CASES["shared_parameter"]
    elbo = make("shared_parameter", ScoreFunction(), 2, objective=IWAE())
    found = expected_gradient(case, elbo, 2, derive=jax.hessian)
    same(found, exact_bound_gradient(case, bound(1.0), 2, 0, derive=jax.hessian))


def hessian(estimator, **given):
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x * z, 1.0), obs=0.3)

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.2)))
        numpyro.sample("x", dist.Normal(numpyro.param("m", 0.1), 1.0))

    elbo = TraceGrad_ELBO(estimators={"z": estimator}, **given)
    params = {"a": jnp.array(0.2), "m": jnp.array(0.1)}
    loss = jax.jit(lambda p: elbo.loss(jax.random.key(0), p, model, guide))
    jax.value_and_grad(loss)(params)
    jax.jvp(loss, (params,), (params,))
    return jax.hessian(loss)(params)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation(), GumbelSoftmax()])
def test_wrong_second_derivatives_are_refused(estimator):
    with pytest.raises(EstimatorError, match="right for first ones alone; pass higher_order=True"):
        hessian(estimator)


@pytest.mark.slow
def test_estimators_of_first_order_are_refused():
    words = r"DisARM\(\) at site 'z' is right for first derivatives alone.*ScoreFunction\(\)"
    with pytest.raises(EstimatorError, match=words):
        hessian(DisARM(), higher_order=True)
    hessian(ScoreFunction(), higher_order=True)


@pytest.mark.slow
def test_reparameterized_programs_need_nothing():
    def guide():
        numpyro.sample("x", dist.Normal(numpyro.param("m", 0.1), 1.3))

    def loss(m):
        elbo = TraceGrad_ELBO(estimators={"x": Reparam()})
        model = lambda: numpyro.sample("x", dist.Normal(0.0, 1.0))  # noqa: E731
        return elbo.loss(jax.random.key(0), {"m": m}, model, guide)

    np.testing.assert_allclose(jax.hessian(loss)(0.1), 1.0)
