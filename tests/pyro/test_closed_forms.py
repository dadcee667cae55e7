"""Divergences and entropies in closed form: exact by enumeration, like the host's where it has them, refused elsewhere."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from pplgrad import IWAE, EstimatorError, Expectation, GumbelSoftmax, ProgramError, Reparam
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import (
    HOST,
    array,
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    fresh,
    gradient,
)
from pplgrad.testing.programs import CASES
from tests.closed import ESTIMATORS, REFUSED, pairs


@pytest.mark.parametrize(("name", "kinds", "short"), pairs())
def test_exact(name, kinds, short):
    case, estimator = CASES[name], ESTIMATORS[short]

    def elbo():
        return TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator), closed_form=kinds)

    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    assert_same(over(case, elbo, 1), exact_gradient(case))


@pytest.mark.parametrize("vectorized", [True, False])
def test_like_the_mean_field_elbo(vectorized):
    def model():
        with pyro.plate("data", 4, subsample_size=2):
            x = pyro.sample("x", dist.Normal(array([0.0] * 3), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(x.sum(-1), 0.7), obs=array([0.4, -1.1]))

    def guide():
        p = pyro.param("p", array([0.3, -0.2]))
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("x", dist.Normal(p[0] * torch.ones(3), p[1].exp()).to_event(1))

    def found(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        pyro.param("p", array([0.3, -0.2]))
        loss = elbo.loss_and_grads(model, guide)
        return {**gradient(), "loss": np.array(loss)}

    given = {"num_particles": 3, "vectorize_particles": vectorized, "max_plate_nesting": 1}
    assert_same(found(TraceGrad_ELBO(closed_form={"x": "kl"}, **given)), found(TraceMeanField_ELBO(**given)))


def relaxed(**given):
    def model():
        pyro.factor("f", 3.0 * pyro.sample("z", dist.Bernoulli(array(0.4))))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(0.3))))

    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    TraceGrad_ELBO(estimators={"z": GumbelSoftmax(0.5)}, **given).loss_and_grads(model, guide)
    return float(gradient()["a"])


def test_a_relaxed_site_may_have_it():
    a = array(0.3).requires_grad_()
    q = torch.sigmoid(a)
    (q * (q / 0.4).log() + (1 - q) * ((1 - q) / 0.6).log()).backward()
    plain = relaxed(objective=Expectation())
    np.testing.assert_allclose(relaxed(closed_form={"z": "kl"}), plain + float(a.grad))


@pytest.mark.parametrize(("name", "kinds", "kind", "words"), REFUSED)
def test_refusals(name, kinds, kind, words):
    fresh(CASES[name])
    model, guide = CASES[name].build(HOST)
    with pytest.raises(kind, match=words):
        TraceGrad_ELBO(closed_form=kinds).loss_and_grads(model, guide)


def test_what_has_none_is_refused():
    def program():
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(array(0.3), 1.0))
        pyro.sample("y", dist.Normal(array(0.3), 1.0))

    def other():
        pyro.sample("x", dist.Normal(array(0.3), 1.0))
        pyro.sample("y", dist.StudentT(array(3.0)), infer={"closed_form": "entropy"})

    def loss(**given):
        return TraceGrad_ELBO(**given).loss_and_grads(program, other)

    loss()
    with pytest.raises(ProgramError, match="'x' is scaled or masked differently"):
        loss(closed_form={"x": "kl"})
    with pytest.raises(EstimatorError, match="divergence of StudentT from Normal at site 'y' has no closed form here"):
        loss(closed_form={"y": "kl"})
    with pytest.raises(EstimatorError, match="weighs the densities of site 'x' differently"):
        loss(closed_form={"x": "kl"}, objective=Expectation(entropy=1.0))
    with pytest.raises(EstimatorError, match="choose one of the two"):
        loss(estimators={"y": Reparam(sticking_the_landing=True)})
    with pytest.raises(EstimatorError, match="no meaning under IWAE"):
        loss(closed_form={"x": "kl"}, objective=IWAE())


LOC = [0.3, -0.2, 0.5, 0.1]
ENTROPIES = {
    "Laplace": (lambda loc, s: dist.Laplace(loc, s.exp()), lambda s: 1 + np.log(2) + s, 1),
    "MultivariateNormal": (
        lambda loc, s: dist.MultivariateNormal(
            torch.stack([loc, -loc], -1), scale_tril=s.exp() * array([[1.0, 0.0], [0.3, 0.5]])
        ),
        lambda s: 1 + np.log(2 * np.pi) + np.log(0.5) + 2 * s,
        2,
    ),
    "event": (
        lambda loc, s: dist.Laplace(loc[:, None] * torch.ones(2), s.exp()).to_event(1),
        lambda s: 2 * (1 + np.log(2) + s),
        2,
    ),
    "expanded": (lambda loc, s: dist.Laplace(0 * loc[0], s.exp()).expand([4]), lambda s: 1 + np.log(2) + s, 1),
    "expanded event": (
        lambda loc, s: dist.Laplace(0 * loc[0], s.exp()).expand([2]).to_event(1),
        lambda s: 2 * (1 + np.log(2) + s),
        2,
    ),
}


@pytest.mark.parametrize("law", ENTROPIES)
def test_one_scale_for_many_locations_counts_for_each(law):
    make, entropy, slope = ENTROPIES[law]

    def guide():
        loc, s = pyro.param("loc", array(LOC)), pyro.param("s", array(0.2))
        with pyro.plate("data", 4):
            pyro.sample("x", make(loc, s))

    def model():
        with pyro.plate("data", 4):
            pyro.sample("x", make(array([0.0] * 4), array(0.0)).mask(False))

    loss = TraceGrad_ELBO(closed_form={"x": "entropy"}).loss_and_grads(model, guide)
    np.testing.assert_allclose(loss, -4 * entropy(0.2))
    np.testing.assert_allclose(gradient()["s"], -4 * slope)


class Die(dist.TorchDistribution):
    """A distribution on 1, 2, 3 and 4."""

    arg_constraints = {}
    has_enumerate_support = True
    support = dist.constraints.integer_interval(1, 4)

    def __init__(self, probs):
        self.probs = probs
        super().__init__(validate_args=False)

    def sample(self, sample_shape=()):
        return 1.0 + torch.multinomial(self.probs, 1)[0]

    def log_prob(self, value):
        return self.probs.log()[(value - 1).long()]

    def enumerate_support(self, expand=True):
        return torch.arange(1.0, 5.0)


def test_as_many_values_are_not_the_same_values():
    laws = {
        "binomial": lambda: dist.Binomial(3, logits=pyro.param("a", array(0.3))),
        "die": lambda: Die(array([0.1, 0.2, 0.3, 0.4])),
        "fair die": lambda: Die(array([0.25] * 4)),
        "categorical": lambda: dist.Categorical(array([0.1, 0.2, 0.3, 0.4])),
    }

    def divergence(q, p):
        elbo = TraceGrad_ELBO(closed_form={"z": "kl"})
        return elbo.loss(lambda: pyro.sample("z", laws[p]()), lambda: pyro.sample("z", laws[q]()))

    for pair in (("binomial", "die"), ("categorical", "die")):
        with pytest.raises(EstimatorError, match="at site 'z' has no closed form here"):
            divergence(*pair)
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(divergence("die", "fair die"), (weights * np.log(4 * weights)).sum())
    q = 1 / (1 + np.exp(-0.3))
    law = np.array([1, 3, 3, 1]) * q ** np.arange(4) * (1 - q) ** (3 - np.arange(4))
    np.testing.assert_allclose(divergence("binomial", "categorical"), (law * np.log(law / weights)).sum())
