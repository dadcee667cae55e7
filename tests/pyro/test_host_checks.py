"""What Pyro's own ELBOs accept and refuse, this one does: programs without a site, shapes, plates, validation."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pplgrad import ELBO, IWAE, Expectation, Renyi
from pplgrad.pyro import TraceGrad_ELBO, config_estimators


def nothing():
    pass


def observed():
    pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.5)), 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize("objective", [ELBO(), Expectation(), IWAE(), Renyi(0.5)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("higher_order", [False, True])
def test_a_program_without_a_site_has_loss_0(objective, particles, vectorized, higher_order):
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(
        particles, vectorize_particles=vectorized, objective=objective, higher_order=higher_order
    )
    for guide in (nothing, config_estimators(nothing, {})):
        assert SVI(nothing, guide, Adam({"lr": 0.1}), elbo).step() == 0
        assert elbo.loss(nothing, guide) == elbo.differentiable_loss(nothing, guide).item() == 0
        assert elbo.describe(nothing, guide).rows == []
        elbo.diagnose(nothing, guide)


@pytest.mark.parametrize("objective", [ELBO(), Expectation(), IWAE(), Renyi(0.5)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
def test_a_guide_without_a_site_has_the_loss_of_the_data(objective, particles, vectorized):
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, objective=objective)
    right = -dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0)).item()
    assert elbo.loss(observed, nothing) == pytest.approx(right)
    assert elbo.loss_and_grads(observed, nothing) == pytest.approx(right)
    assert pyro.param("m").unconstrained().grad.item() == pytest.approx(-0.5)


def test_a_program_without_a_site_compiles():
    pyro.clear_param_store()
    svi = SVI(nothing, nothing, Adam({"lr": 0.1}), TraceGrad_ELBO(compile={"backend": "eager"}))
    assert [svi.step() for _ in range(4)] == [0] * 4
