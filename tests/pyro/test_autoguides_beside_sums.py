"""Sites that are summed out beside the hosts' own autoguides of the continuous part: the same as with the sum written out by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import array

DATA = [-1.2, 0.3, 2.1, 0.7]


def weights_and_locations():
    w = pyro.sample("w", dist.Dirichlet(array([1.0, 1.0])))
    with pyro.plate("components", 2):
        return w, pyro.sample("locs", dist.Normal(array(0.0), 3.0))


def summed():
    w, locs = weights_and_locations()
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(w), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=array(DATA))


def by_hand():
    w, locs = weights_and_locations()
    with pyro.plate("data", 4):
        pyro.factor("x", torch.logsumexp(w.log() + dist.Normal(locs, 1.0).log_prob(array(DATA)[:, None]), -1))


@pytest.mark.parametrize(
    "autoguide",
    [
        AutoDelta,
        AutoDiagonalNormal,
        AutoIAFNormal,
        AutoLaplaceApproximation,
        AutoLowRankMultivariateNormal,
        AutoMultivariateNormal,
        AutoNormal,
    ],
)
def test_an_autoguide_of_the_continuous_part_is_fitted_as_to_the_sum_by_hand(autoguide):
    """AutoContinuous draws all at an auxiliary site, `_auto_latent`, that the model lacks."""
    pyro.set_rng_seed(0)
    guide = autoguide(poutine.block(summed, hide=["k"]))
    guide()
    found = []
    for model, elbo in [(summed, TraceGrad_ELBO(max_plate_nesting=1)), (by_hand, Trace_ELBO())]:
        guide.zero_grad()
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(model, guide)
        found.append([torch.as_tensor(loss), *(x.grad.clone() for x in guide.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9, check_dtype=False)
