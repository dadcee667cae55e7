"""Second derivatives: exact by enumeration with higher_order=True, refused without."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import (
    Constant,
    DisARM,
    EstimatorError,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    Reparam,
    ScoreFunction,
)
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.cells import cells
from pplgrad.testing.in_pyro import (
    HOST,
    Drive,
    Force,
    array,
    exact_loss,
    fresh,
    log_weight_and_objective,
    outcomes,
    probabilities,
    subsamples,
)
from pplgrad.testing.programs import CASES


def second(loss):
    """Return the matrix of second derivatives with respect to all parameters in the store."""
    store = [value for _, value in sorted(pyro.get_param_store().named_parameters())]
    first = torch.autograd.grad(loss, store, create_graph=True, materialize_grads=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in first]):
        found = [torch.zeros_like(x) for x in store]
        if entry.requires_grad:
            found = torch.autograd.grad(entry, store, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows).detach().numpy()


def expected_hessian(case, estimator, particles, vectorized):
    fresh(case)
    model, guide = case.build(HOST)
    elbo = TraceGrad_ELBO(
        particles,
        vectorize_particles=vectorized,
        max_plate_nesting=2,
        estimators=dict.fromkeys(case.latents, estimator),
        higher_order=True,
    )
    total, subsets = 0.0, subsamples(case)
    for subset in subsets:
        for picked in itertools.product(outcomes(case), repeat=particles):
            with torch.no_grad():
                logs = [log_weight_and_objective(case, model, guide, o | subset)[0] for o in picked]
            with Force([o | subset for o in picked], case.noise):
                loss = elbo.differentiable_loss(model, guide)
            total = total + float(torch.stack(logs).sum().exp()) * second(loss) / len(subsets)
    return total


def expected_hessian_over_cells(case, vectorized):
    """Local expectation has no noise of its own: over all draws, and those of the branches."""
    fresh(case)
    model, guide = case.build(HOST)
    elbo = TraceGrad_ELBO(
        vectorize_particles=vectorized,
        max_plate_nesting=2,
        estimators=dict.fromkeys(case.latents, LocalExpectation()),
        higher_order=True,
    )
    total = 0.0
    for uniforms, size in cells(probabilities(case, guide, list(outcomes(case)))):
        with Drive([uniforms], case.noise):
            total = total + size * second(elbo.differentiable_loss(model, guide))
    return total


def exact_hessian(case):
    fresh(case)
    return second(exact_loss(case, *case.build(HOST)))


QUICK = ("shared_parameter", "mixed")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES if n != "nested_plates"]
)
def test_hessian_exact(name):
    found = expected_hessian(CASES[name], ScoreFunction(Constant(0.7)), 1, False)
    np.testing.assert_allclose(found, exact_hessian(CASES[name]), atol=1e-9)


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("name", ["single", "shared_parameter"])
def test_hessian_with_leave_one_out_exact(name, vectorized):
    found = expected_hessian(CASES[name], ScoreFunction(LeaveOneOut()), 2, vectorized)
    np.testing.assert_allclose(found, exact_hessian(CASES[name]), atol=1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize(
    "name", ["shared_parameter", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixed", "event"))]
)
def test_hessian_by_local_expectation_exact(name, vectorized):
    found = expected_hessian_over_cells(CASES[name], vectorized)
    np.testing.assert_allclose(found, exact_hessian(CASES[name]), atol=1e-9)


def loss_of(estimator, **given):
    def model():
        z = pyro.sample("z", dist.Bernoulli(array(0.3)))
        pyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=array(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(0.2))))

    pyro.clear_param_store()
    return TraceGrad_ELBO(estimators={"z": estimator}, **given).differentiable_loss(model, guide)


@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation(), GumbelSoftmax()])
def test_wrong_second_derivatives_are_refused(estimator):
    loss_of(estimator).backward()
    with pytest.raises(EstimatorError, match="right for first ones alone; pass higher_order=True"):
        second(loss_of(estimator))


def test_estimators_of_first_order_are_refused():
    words = r"DisARM\(\) at site 'z' is right for first derivatives alone.*ScoreFunction\(\)"
    with pytest.raises(EstimatorError, match=words):
        loss_of(DisARM(), higher_order=True)


def test_reparameterized_programs_need_nothing():
    def guide():
        pyro.sample("x", dist.Normal(pyro.param("m", array(0.1)), 1.3))

    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(estimators={"x": Reparam()})
    loss = elbo.differentiable_loss(lambda: pyro.sample("x", dist.Normal(array(0.0), 1.0)), guide)
    np.testing.assert_allclose(second(loss), [[1.0]])
