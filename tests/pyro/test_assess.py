"""`assess_fit` on what Pyro alone has: `markov` loops, sequential plates, its autoguides, sites that differ from draw to draw."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

from pplgrad.errors import ProgramError
from pplgrad.pyro import assess_fit
from tests.assessed import normal

X = torch.tensor([0.3, 1.2, -0.4], dtype=torch.float64)
MOVES = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
FEW = {"samples": 100, "replicates": 0}


@pytest.fixture(autouse=True)
def empty_store():
    pyro.clear_param_store()


def chain(x):
    before = 0
    for t in pyro.markov(range(len(x))):
        before = pyro.sample(f"z{t}", dist.Categorical(MOVES[before]))
        pyro.sample(f"x{t}", dist.Normal(2.0 * before, 1.0), obs=x[t])


def guide_of_chain(x):
    before = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        logits = torch.stack([0 * x[t], x[t] + 0.5 * before], -1)
        before = pyro.sample(f"z{t}", dist.Categorical(logits=logits))


@pytest.mark.slow
def test_a_markov_loop():
    dream = {"dream": lambda drawn, x: (torch.stack([drawn[f"x{t}"] for t in range(3)]),)}
    found = assess_fit(chain, guide_of_chain, (X,), samples=100, replicates=20, simulations=20, **dream)
    total = 0.0
    for z in itertools.product((0, 1), repeat=3):
        steps = zip((0, *z[:-1]), z, X.numpy(), strict=True)
        total += np.exp(sum(np.log(MOVES[a, b].item()) + normal(x, 2.0 * b) for a, b, x in steps))
    assert found.evidence.exact == pytest.approx(np.log(total), abs=1e-9)
    assert [check.name for check in found.checks] == ["x0: mean", "x1: mean", "x2: mean"]
    assert {x.site for x in found.calibration} == {"z0", "z1", "z2"}


def shared(x):
    w = pyro.sample("w", dist.Normal(X.new_tensor(0.0), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


@pytest.mark.slow
def test_autoguides():
    guide = AutoMultivariateNormal(shared)
    guide(X)
    scale = 1 / np.sqrt(1 / 4 + 3)
    with torch.no_grad():
        guide.loc.copy_(X.sum().reshape(1) * scale**2)
        guide.scale = torch.tensor([scale], dtype=guide.scale.dtype)
    found = assess_fit(shared, guide, (X,), samples=200, replicates=100)
    covariance = np.eye(3) + 4.0
    x = X.numpy()
    exact = -0.5 * (x @ np.linalg.solve(covariance, x) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose([found.evidence.bound, found.evidence.elbo], exact, rtol=1e-5)
    assert found.passed and np.isneginf(found.khat)
    with pytest.raises(ProgramError, match="Site 'w' of the guide is a point mass"):
        assess_fit(shared, AutoDelta(shared), (X,), **FEW)


def test_sites_that_differ_from_draw_to_draw_are_refused():
    def sites():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        if z > 0:
            pyro.sample("w", dist.Bernoulli(torch.tensor(0.4)))
        return z

    def model(x):
        pyro.sample("x", dist.Normal(sites(), 1.0), obs=x[0])

    with pytest.raises(ProgramError, match="differ from draw to draw \\('w'\\)"):
        assess_fit(model, lambda x: sites(), (X,), **FEW)
