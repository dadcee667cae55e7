"""A cost that jumps in a reparameterized draw, or is cut off from it: refused, where the estimate would be biased without a word."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.optim import Adam

from pplgrad import EstimatorError, Reparam, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO

TABLE = torch.tensor([0.0, 3.0])


def without_gradient(z):
    with torch.no_grad():
        return 2 * z


LOST = {
    "where": lambda z: torch.where(z > 0, 3.0, 0.0),
    "detach": lambda z: z.detach(),
    "an index": lambda z: TABLE[(z > 0).long()],
    "sign of a comparison": lambda z: (z * 2 > z + 1).double(),
    "no_grad": without_gradient,
}
WHOLE = {
    "itself": lambda z: z,
    "a ramp": lambda z: torch.where(z > 0, z, 0.3 * z),
    "relu": torch.relu,
    "clamp": lambda z: z.clamp(-1.0, 1.0),
    "softplus": torch.nn.functional.softplus,
    "straight through": lambda z: z + (z.round() - z).detach(),
    "not at all": lambda z: torch.zeros(()),
    "printed": lambda z: z * (1.0 if str(z.item()) else 2.0),
}


def program(change):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(change(z), 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0))

    return model, guide


@pytest.mark.parametrize("estimators", [None, {"z": Reparam()}], ids=["default", "Reparam"])
@pytest.mark.parametrize("name", LOST)
def test_a_cost_without_a_derivative_is_refused(name, estimators):
    with pytest.raises(
        EstimatorError, match=r"at site 'z' takes the derivative .* density of 'x' .*use ScoreFunction\(\) at 'z'"
    ):
        TraceGrad_ELBO(estimators=estimators).loss_and_grads(*program(LOST[name]))
    TraceGrad_ELBO(estimators={"z": ScoreFunction()}).loss_and_grads(*program(LOST[name]))


@pytest.mark.parametrize("name", WHOLE)
def test_a_cost_with_a_derivative_is_not(name):
    TraceGrad_ELBO().loss_and_grads(*program(WHOLE[name]))


def test_a_draw_without_a_parameter_has_nothing_to_lose():
    model, _ = program(LOST["where"])
    TraceGrad_ELBO().loss_and_grads(model, lambda: pyro.sample("z", dist.Normal(0.3, 1.0)))


def test_a_step_without_gradients_is_no_matter():
    with torch.no_grad():
        TraceGrad_ELBO().loss(*program(LOST["detach"]))


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoDelta])
def test_densities_compare_values_with_their_bounds(auto):
    """A Uniform prior and the Delta sites of guides read a value by comparisons of their own, in which no derivative is lost."""

    def model():
        z = pyro.sample("z", dist.Uniform(0.0, 4.0))
        w = pyro.sample("w", dist.Uniform(-1.0, 4.0).mask(True))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=torch.tensor(2.0))

    for elbo in (TraceGrad_ELBO(), Trace_ELBO()):
        pyro.clear_param_store()
        svi = SVI(model, auto(model), Adam({"lr": 0.01}), elbo)
        assert all(svi.step() for _ in range(3))
