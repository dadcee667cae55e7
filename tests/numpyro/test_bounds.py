"""Objectives that combine particles: exact over all tuples of outcomes."""

import pytest

from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import (
    assert_same,
    exact_bound_gradient,
    expected_gradient,
)
from pplgrad.testing.programs import CASES
from tests.bounds import OBJECTIVES, PROGRAMS, SCORES, bound


@pytest.mark.parametrize("short", SCORES)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact(objective, name, short):
    spec, power = OBJECTIVES[objective]
    case = CASES[name]
    elbo = TraceGrad_ELBO(2, True, estimators=dict.fromkeys(case.latents, SCORES[short]), objective=spec)
    found = expected_gradient(case, elbo, 2, shared=True)
    assert_same(found, exact_bound_gradient(case, bound(power), 2, PROGRAMS[name]))
