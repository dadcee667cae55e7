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
    "round": lambda z: z.round(),
    "floor": lambda z: 3.0 * z.floor(),
    "heaviside": lambda z: torch.heaviside(z.detach(), torch.zeros(())),
    "bucketize": lambda z: torch.bucketize(z, torch.zeros(1)).float(),
    "argsort": lambda z: TABLE[torch.stack([z, -z]).argsort()[0]],
    "sign": lambda z: z.sign(),
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


@pytest.mark.grid
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


def test_a_jump_in_the_guide():
    def guide():
        z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0))
        pyro.sample("y", dist.Normal(torch.where(z > 0, 1.0, -1.0), 1.0))

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", 0.7 * pyro.sample("y", dist.Normal(0.0, 1.0)))

    with pytest.raises(EstimatorError, match="at site 'z' .* density of 'y'"):
        TraceGrad_ELBO().loss_and_grads(model, guide)


def test_a_point_mass_stands_for_the_draws_behind_it():
    """What an automatic guide hands out is a point mass at a function of its draw: the draw is what is at fault, if there is one."""

    def model():
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.where(t > 0, 3.0, 0.0), 1.0), obs=torch.tensor(2.0))

    with pytest.raises(EstimatorError, match=r"use ScoreFunction\(\) at '_AutoDiagonalNormal_latent'"):
        SVI(model, AutoDiagonalNormal(model), Adam({"lr": 0.01}), TraceGrad_ELBO()).step()
    pyro.clear_param_store()
    chosen = TraceGrad_ELBO(estimators={"_AutoDiagonalNormal_latent": ScoreFunction()})
    assert SVI(model, AutoDiagonalNormal(model), Adam({"lr": 0.01}), chosen).step() > 0
    pyro.clear_param_store()
    assert SVI(model, AutoDelta(model), Adam({"lr": 0.01}), TraceGrad_ELBO()).step() > 0
