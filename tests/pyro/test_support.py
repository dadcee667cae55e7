"""A support that moves with a parameter, or with a draw that carries gradient, is refused where E[score] = 0 is needed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints, transform_to
from torch.distributions import transforms as t

from pplgrad import EstimatorError, Reparam, ScoreFunction
from pplgrad.engine.support import Support
from pplgrad.pyro import TraceGrad_ELBO


def m():
    return pyro.param("m", torch.tensor(0.3))


def transformed(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


class Window(dist.TorchDistribution):
    """A distribution of the user's own, without a reparameterized sampler."""

    arg_constraints = {}

    def __init__(self, low):
        self.low = low
        super().__init__(low.shape)

    @constraints.dependent_property
    def support(self):
        return constraints.interval(self.low, self.low + 1)

    def sample(self, shape=torch.Size()):
        return torch.rand(self._extended_shape(shape)) + self.low.detach()

    def log_prob(self, value):
        return 0 * self.low


def mixture():
    return dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(m() - torch.ones(2), 2 + torch.zeros(2))
    )


MOVING = {
    "both bounds": lambda: dist.Uniform(m() - 2, m() + 2),
    "upper bound": lambda: dist.Uniform(0.0, m().exp()),
    "Pareto": lambda: dist.Pareto(m().exp(), 3.0),
    "event": lambda: dist.Uniform(torch.zeros(2), m().exp().expand(2)).to_event(1),
    "expanded": lambda: dist.Uniform(m(), m() + 1).expand([3]).to_event(1),
    "masked": lambda: dist.Uniform(m(), m() + 1).mask(True),
    "shifted": lambda: transformed(dist.Uniform(0.0, 1.0), t.AffineTransform(m(), 2.0)),
    "scaled": lambda: transformed(dist.Uniform(0.0, 1.0), t.AffineTransform(0.0, m().exp())),
    "shifted half-line": lambda: transformed(dist.Normal(0.0, 1.0), t.ExpTransform(), t.AffineTransform(m(), 1.0)),
    "interval": lambda: transformed(dist.Normal(0.0, 1.0), transform_to(constraints.interval(m(), 5.0))),
    "a moving base": lambda: transformed(dist.Uniform(-1.0, m().exp()), t.TanhTransform()),
    "AffineBeta": lambda: dist.AffineBeta(2.0, 2.0, m(), m().exp()),
    "own": lambda: Window(m()),
    "mixture": mixture,
    "Delta": lambda: dist.Delta(m()),
    "upstream": lambda: dist.Uniform(pyro.sample("u", dist.Normal(m(), 1.0)), 9.0),
}
FIXED = {
    "constant": lambda: dist.Uniform(m().detach() - 2, 3.0),
    "Normal": lambda: dist.Normal(m(), 1.0),
    "Weibull": lambda: dist.Weibull(m().exp(), m().exp()),
    "Kumaraswamy": lambda: dist.Kumaraswamy(m().exp(), m().exp()),
    "Gumbel": lambda: dist.Gumbel(m(), m().exp()),
    "LogNormal": lambda: dist.LogNormal(m(), 1.0),
    "HalfNormal": lambda: dist.HalfNormal(m().exp()),
    "Beta": lambda: dist.Beta(m().exp(), 1.0),
    "scaled half-line": lambda: transformed(dist.Exponential(m().exp()), t.AffineTransform(0.0, m().exp())),
    "a power": lambda: transformed(dist.Uniform(0.0, 1.0), t.PowerTransform(m().exp())),
    "Affine": lambda: transformed(dist.Normal(0.0, 1.0), t.AffineTransform(m(), m().exp())),
    "Sigmoid": lambda: transformed(dist.Normal(m(), 1.0), t.SigmoidTransform()),
    "mixture": lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(m().expand(2), 1.0)),
    "scored": lambda: dist.Uniform(
        pyro.sample("u", dist.Normal(m(), 1.0), infer={"estimator": ScoreFunction()}).clamp(-9, 2), 9.0
    ),
}


def step(make, estimator, upstream):
    """Take a step with the estimator at a site of which the model says nothing."""
    pyro.clear_param_store()

    def guide():
        pyro.sample("x", make())

    def model():
        if upstream:
            pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.poutine.block():
            shape = make().shape()
        pyro.sample("x", dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)).mask(False))

    with pyro.validation_enabled(False):  # The events of guide and model may differ here.
        TraceGrad_ELBO(estimators={"x": estimator}).loss_and_grads(model, guide)


def without_a_sampler(case, estimator):
    """Return whether a case has no reparameterized sampler to refuse."""
    return isinstance(estimator, Reparam) and case in ("own", "mixture")


@pytest.mark.grid(without=without_a_sampler)
@pytest.mark.parametrize("estimator", [ScoreFunction(), ScoreFunction(samples=2), Reparam(sticking_the_landing=True)])
@pytest.mark.parametrize("case", MOVING)
def test_moving(case, estimator):
    with pytest.raises(EstimatorError, match="at site 'x' .* needs a support that stays where it is") as caught:
        step(MOVING[case], estimator, case == "upstream")
    assert ("use Reparam() there" in str(caught.value)) == (case not in ("own", "mixture"))


@pytest.mark.parametrize("case", [case for case in MOVING if case not in ("own", "mixture")])
def test_the_remedy_runs(case):
    step(MOVING[case], Reparam(), case == "upstream")


@pytest.mark.parametrize("case", FIXED)
def test_fixed(case):
    step(FIXED[case], ScoreFunction(), case == "scored")


@pytest.mark.parametrize("total", [lambda n: n + 3, lambda n: (n + 3).long()])
def test_a_count_that_is_drawn_carries_no_gradient(total):
    def program(rate):
        n = pyro.sample("n", dist.Poisson(rate))
        pyro.sample("k", dist.Binomial(total(n), logits=rate))

    TraceGrad_ELBO().loss_and_grads(lambda: program(torch.tensor(2.0)), lambda: program(m().exp()))


def test_the_other_remedy_is_right():
    """A draw with constant bounds, moved afterwards: E[(m + 4u − 2)²] by its score alone is no gradient of m, by its path it is."""
    pyro.clear_param_store()

    def guide():
        u = pyro.sample("u", dist.Uniform(0.0, 1.0).has_rsample_(False))
        pyro.factor("f", (m() - 2 + 4 * u) ** 2)

    def model():
        pyro.sample("u", dist.Uniform(0.0, 1.0))

    elbo = TraceGrad_ELBO(20_000, vectorize_particles=True, estimators={"u": ScoreFunction()})
    elbo.loss_and_grads(model, guide)
    assert pyro.param("m").unconstrained().grad.item() == pytest.approx(0.6, abs=0.1)


MUTANTS = {
    "transforms move nothing": ("_transformed", lambda self, fn: ((0.0, 1.0), []), "shifted"),
    "the codomain says it all": ("_moved", lambda self, transform, edges: (edges, []), "interval"),
    "what it is made of does not matter": ("_parts", lambda self, fn: iter(()), "a moving base"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant, monkeypatch):
    name, broken, case = MUTANTS[mutant]
    monkeypatch.setattr(Support, name, broken)
    if name == "_parts":
        monkeypatch.setattr(Support, "_transformed", lambda self, fn: ((0.0, 1.0), []))
    step(MOVING[case], ScoreFunction(), False)
