"""Zero, one and infinity: values that the guide never draws have no part in a gradient, whatever their cost."""

import numpy as np
import pytest
from pplgrad.objectives import IWAE
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing import in_pyro as host
from tests.bounds import bound
from tests.zeros import CASES, MANY, OBJECTIVES, QUICK, table

ROWS = [
    pytest.param(o, short, estimator, name, marks=() if o == "elbo" and (short, name) in QUICK else pytest.mark.slow, id=f"{o}-{short}-{name}")
    for o in OBJECTIVES
    for short, estimator, name in table(o, left_out=MANY)
]


def wanted(case, objective):
    chosen, particles, weights = OBJECTIVES[objective]
    if isinstance(chosen, IWAE):
        return host.exact_bound_gradient(case, bound(1.0), particles, 0)
    return host.exact_gradient(case, weights)


@pytest.mark.parametrize(("objective", "short", "estimator", "name"), ROWS)
def test_exact(objective, short, estimator, name):
    case, (chosen, particles, _) = CASES[name], OBJECTIVES[objective]

    def make():
        return TraceGrad_ELBO(
            particles,
            vectorize_particles=particles > 1,
            max_plate_nesting=1,
            objective=chosen,
            estimators=dict.fromkeys(case.latents, estimator),
        )

    with host.isolated():
        over = host.expected_gradient_over_cells if estimator.uses_branches else host.expected_gradient
        host.assert_same(over(case, make, particles), wanted(case, objective))
        assert np.isfinite(wanted(case, objective)["a"]).all()
