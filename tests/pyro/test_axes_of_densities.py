"""Densities of the usual distributions keep particles and elements of a plate apart, so that none is compared or charged for nothing."""

import pyro.distributions as dist
import pytest
import torch

from pplgrad.pyro._tracing.provenance import PlateAxis, Provenance


def p(*shape):
    return torch.rand(*shape) + 0.3


DISTRIBUTIONS = {
    "Normal": lambda: dist.Normal(p(2), p(2)),
    "Bernoulli": lambda: dist.Bernoulli(logits=p(2)),
    "Binomial": lambda: dist.Binomial(3, torch.tensor([0.3, 0.5])),
    "Categorical": lambda: dist.Categorical(p(2, 3)),
    "OneHotCategorical": lambda: dist.OneHotCategorical(p(2, 3)),
    "Dirichlet": lambda: dist.Dirichlet(p(2, 3)),
    "Gamma": lambda: dist.Gamma(p(2), p(2)),
    "LKJCholesky": lambda: dist.LKJCholesky(3, torch.tensor(1.0)).expand([2]),
    "LogisticNormal": lambda: dist.LogisticNormal(p(2, 2), p(2, 2)),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(p(2, 3), p(2, 3, 1), p(2, 3)),
    "MixtureSameFamily": lambda: dist.MixtureSameFamily(dist.Categorical(p(2, 3)), dist.Normal(p(2, 3), p(2, 3))),
    "Multinomial": lambda: dist.Multinomial(3, p(2, 3)),
    "MultivariateNormal": lambda: dist.MultivariateNormal(p(2, 2), scale_tril=torch.eye(2)),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(torch.tensor(4.0), p(2, 2), torch.eye(2)),
    "Poisson": lambda: dist.Poisson(p(2)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.5), p(2, 3)),
    "StudentT": lambda: dist.StudentT(torch.tensor(3.0), p(2), p(2)),
    "VonMises": lambda: dist.VonMises(p(2), p(2)),
    "ZeroInflatedPoisson": lambda: dist.ZeroInflatedPoisson(p(2), gate=torch.tensor([0.3, 0.4])),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_elements_stay_apart(name):
    with Provenance() as provenance, torch.no_grad():
        fn = DISTRIBUTIONS[name]()
        plates = [PlateAxis("particles", -2 - fn.event_dim), PlateAxis("data", -1 - fn.event_dim)]
        z = provenance.tag("z", fn.sample((4,)), plates)
        assert not provenance.mixed(fn.log_prob(z), "z", [("particles", -2), ("data", -1)])
