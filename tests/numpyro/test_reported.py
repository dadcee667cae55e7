"""Programs of the kinds that users have reported: the gradient is that of the sum over all joint values."""

import pytest

from pplgrad import DisARM, Enumerate, LocalExpectation
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import (
    HOST,
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
)
from tests.reported import ESTIMATORS, REPORTED, not_binary


def made(program, estimator, particles=1, **given):
    if estimator is not None:
        given["estimators"] = dict.fromkeys(program.case.latents, estimator)
    return TraceGrad_ELBO(particles, **given)


@pytest.mark.slow
@pytest.mark.grid(without=not_binary)
@pytest.mark.parametrize("short", ESTIMATORS)
@pytest.mark.parametrize("name", REPORTED)
def test_exact(name, short):
    program, estimator = REPORTED[name](HOST), ESTIMATORS[short]
    over = expected_gradient_over_cells if getattr(estimator, "uses_branches", False) else expected_gradient
    assert_same(over(program.case, made(program, estimator), 1), exact_gradient(program.by_hand))


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("name", REPORTED)
def test_particles_together(name):
    program = REPORTED[name](HOST)
    assert_same(expected_gradient(program.case, made(program, None, 2), 2), exact_gradient(program.by_hand))


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("scaled and masked", DisARM()),
        ("beside the guide's", LocalExpectation()),
        pytest.param("branches in a plate", Enumerate(), marks=pytest.mark.exhaustive),
    ],
)
def test_few_branches_at_once_are_all_of_them(name, estimator, at_once):
    program = REPORTED[name](HOST)
    found = expected_gradient_over_cells(program.case, made(program, estimator, max_parallel=at_once), 1)
    assert_same(found, exact_gradient(program.by_hand))
