"""What a refusal recommends is accepted at that very site."""

import pyro
import pytest
import torch

from pplgrad import IWAE
from pplgrad.core.objectives import ELBO
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import HOST
from tests.remedies import SITES, program, text_of, wrong_advice


def too_many(site, order, particles, **_):
    """Return whether there are as many branches again, with the same refusals."""
    return site == "categorical-4100" and (order or particles > 1)


@pytest.mark.grid(together="remedies", without=too_many)
@pytest.mark.parametrize(
    ("objective", "particles", "order"),
    [(ELBO(), 1, False), (ELBO(), 1, True), (ELBO(), 2, False), (IWAE(), 1, False), (IWAE(), 2, False)],
    ids=["elbo", "higher", "two", "iwae-1", "iwae-2"],
)
@pytest.mark.parametrize(
    "site", [name if name in ("one-hot", "poisson") else pytest.param(name, marks=pytest.mark.slow) for name in SITES]
)
def test_remedies_are_accepted(site, objective, particles, order):
    run = program(HOST, site)

    def refusal(estimator):
        elbo = TraceGrad_ELBO(
            particles,
            vectorize_particles=True,
            max_plate_nesting=0,
            estimators={"z": estimator},
            objective=objective,
            higher_order=order,
        )
        pyro.clear_param_store()
        torch.manual_seed(0)
        return text_of(lambda: elbo.loss_and_grads(run, run))

    assert wrong_advice(refusal) == {}
