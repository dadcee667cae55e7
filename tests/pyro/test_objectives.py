"""Objectives other than the bound: exact for every estimator, by enumeration."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pplgrad import ELBO, ConfigurationError, DisARM, Expectation, LocalExpectation, Reparam, ScoreFunction
from pplgrad.core.objectives import CostWeights
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import (
    Force,
    array,
    assert_same,
    exact_gradient,
    exact_loss,
    expected_gradient,
    expected_gradient_over_cells,
    fresh,
    gradient,
)
from pplgrad.testing.programs import CASES, Case

OBJECTIVES = {
    "annealed": (ELBO(kl_weight=0.3), CostWeights(1.0, 0.3, 0.3)),
    "likelihood": (ELBO(kl_weight=0.0), CostWeights(1.0, 0.0, 0.0)),
    "expectation": (Expectation(), CostWeights(1.0, 0.0, 0.0)),
    "entropy": (Expectation(entropy=lambda: 0.7), CostWeights(1.0, 0.0, 0.7)),
}


# The entropy's three weights differ, and of the other objectives the other programs show no more.
@pytest.mark.grid
@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("entropy", "hierarchy"),
        *(pytest.param(short, "hierarchy", marks=pytest.mark.slow) for short in OBJECTIVES if short != "entropy"),
        *(pytest.param("entropy", name, marks=pytest.mark.slow) for name in ("mixed", "subsampled", "masked")),
    ],
)
@pytest.mark.parametrize(
    "estimator",
    [ScoreFunction(), LocalExpectation(), pytest.param(DisARM(), marks=pytest.mark.slow)],
    ids=["score", "local", "disarm"],
)
def test_exact(short, estimator, name):
    objective, weights = OBJECTIVES[short]
    case = CASES[name]

    def elbo():
        return TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator), objective=objective)

    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    assert_same(over(case, elbo, 1), exact_gradient(case, weights))


def learned_weight():
    return pyro.param("b", array(0.7))


def weighing(scaled):
    """Return a program whose latent sites may be scaled by a parameter."""

    def latent(a=None):
        with poutine.scale(scale=learned_weight()) if scaled else poutine.scale(scale=1.0):
            return pyro.sample("z", dist.Bernoulli(array(0.4)) if a is None else dist.Bernoulli(logits=a))

    def model():
        pyro.sample("x", dist.Normal(2 * latent(), 1.0), obs=array(1.4))

    def build(host):
        return model, lambda: latent(pyro.param("a", array(0.3))) and None

    return Case("weighing", {"a": np.array(0.3), "b": np.array(0.7)}, {"z": ((), 2)}, build)


LEARNED = {
    "kl": (ELBO(kl_weight=learned_weight), lambda b: CostWeights(1.0, b, b)),
    "entropy": (Expectation(entropy=learned_weight), lambda b: CostWeights(1.0, 0.0, b)),
    "scale": (ELBO(), lambda b: CostWeights(1.0, 1.0, 1.0)),
}


@pytest.mark.grid
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation()], ids=["score", "local"])
@pytest.mark.parametrize("kind", LEARNED)
def test_a_weight_may_be_learned(kind, estimator):
    """The guide's density has no gradient of its own in a sum of costs; its weight has."""
    objective, weights = LEARNED[kind]
    case = weighing(kind == "scale")
    fresh(case)
    exact_loss(case, *case.build(None), weights(learned_weight())).backward()
    wanted = gradient()
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    found = over(case, lambda: TraceGrad_ELBO(estimators={"z": estimator}, objective=objective), 1)
    assert abs(wanted["b"]) > 1e-3
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", ["kl", "scale"])
def test_sticking_the_landing_leaves_a_learned_weight_its_gradient(kind):
    """At given noise: the weight's gradient is the bound's, and the mean's is that of the path alone."""

    def scaled():
        return poutine.scale(scale=learned_weight() if kind == "scale" else 1.0)

    def model():
        with scaled():
            w = pyro.sample("w", dist.Normal(array(0.0), 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=array(0.5))

    def guide():
        with scaled():
            pyro.sample("w", dist.Normal(pyro.param("m", array(0.4)), 0.6))

    elbo = TraceGrad_ELBO(estimators={"w": Reparam(sticking_the_landing=True)}, objective=LEARNED[kind][0])
    with Force([{}], {"w": np.array(1.3)}):
        elbo.loss_and_grads(model, guide)
    found = gradient()
    m, b = (array(x).requires_grad_() for x in (0.4, 0.7))
    w = m + 0.6 * array(1.3)
    latent = dist.Normal(array(0.0), 1.0).log_prob(w) - dist.Normal(m.detach(), 0.6).log_prob(w)
    (-dist.Normal(w, 1.0).log_prob(array(0.5)) - b * latent).backward()
    assert_same(found, {"m": m.grad.numpy(), "b": b.grad.numpy()})


def test_what_does_not_count_may_be_impossible():
    """Under Expectation the model's latent sites only take the guide's values: their density may be zero there."""

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(0.3))))

    def model():
        z = pyro.sample("z", dist.Delta(array(5.0)))
        pyro.factor("reward", 2 * z)

    objective = TraceGrad_ELBO(estimators={"z": LocalExpectation()}, objective=Expectation())
    loss = objective.loss_and_grads(model, guide)
    assert loss in (0.0, -2.0)
    p = torch.sigmoid(array(0.3))
    torch.testing.assert_close(pyro.get_param_store()._params["a"].grad, -2 * p * (1 - p))


def test_the_weight_may_follow_an_argument():
    def program(step):
        z = pyro.sample("z", dist.Normal(array(0.0), 1.0))
        return z

    def model(step):
        pyro.sample("x", dist.Normal(program(step), 1.0), obs=array(0.5))

    objective = TraceGrad_ELBO(objective=ELBO(kl_weight=lambda step: min(1.0, step / 10)))
    losses = []
    for step in (0, 5, 10):
        pyro.set_rng_seed(0)
        losses.append(objective.loss(model, lambda step: pyro.sample("z", dist.Normal(array(1.0), 0.5)), step))
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2)


def test_refusals():
    with pytest.raises(ConfigurationError, match="a weight is at least 0"):
        ELBO(kl_weight=-1.0)
    with pytest.raises(ConfigurationError, match=r"write an objective, such as Expectation\(\)"):
        TraceGrad_ELBO(objective=Expectation)


def landing(m, s, estimator, draws):
    """Return gradients for a guide over a conjugate model whose posterior is N(0.25, 1/2): many draws at once, each with its own parameters."""

    def model():
        with pyro.plate("draws", draws):
            z = pyro.sample("z", dist.Normal(array(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=array(0.5))

    def guide():
        mean, log_scale = (pyro.param(name, array(start).expand(draws)) for name, start in (("m", m), ("s", s)))
        with pyro.plate("draws", draws):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()))

    pyro.clear_param_store()
    TraceGrad_ELBO(estimators={"z": estimator}).loss_and_grads(model, guide)
    return torch.stack([pyro.get_param_store()._params[name].grad for name in "ms"], -1)


@pytest.mark.slow
def test_sticking_the_landing():
    """No variance at the posterior; the same mean elsewhere."""
    plain, stuck = landing(-0.4, 0.3, Reparam(), 3000), landing(-0.4, 0.3, Reparam(True), 3000)
    spread = ((plain.var(0) + stuck.var(0)) / 3000).sqrt()
    assert ((plain.mean(0) - stuck.mean(0)).abs() < 4.5 * spread).all()
    assert landing(0.25, -0.5 * math.log(2.0), Reparam(True), 20).abs().max() < 1e-12
    assert landing(0.25, -0.5 * math.log(2.0), Reparam(), 20).std() > 0.1
