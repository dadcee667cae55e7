"""Objectives other than the bound: exact for every estimator, by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from pplgrad import ELBO, ConfigurationError, DisARM, Expectation, LocalExpectation, Reparam, ScoreFunction
from pplgrad.core.objectives import CostWeights
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import (
    array,
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    log_weight_and_objective,
    outcomes,
    parameters,
    stacked,
    with_fixed_noise,
)
from pplgrad.testing.programs import CASES, Case

OBJECTIVES = {
    "annealed": (ELBO(kl_weight=0.3), CostWeights(1.0, 0.3, 0.3)),
    "likelihood": (ELBO(kl_weight=0.0), CostWeights(1.0, 0.0, 0.0)),
    "entropy": (Expectation(entropy=lambda: jnp.array(0.7)), CostWeights(1.0, 0.0, 0.7)),
}


# The entropy's three weights differ, and none of the others shows more of a program.
@pytest.mark.grid
@pytest.mark.parametrize(
    ("short", "name"),
    [*((short, "hierarchy") for short in OBJECTIVES), ("entropy", "mixed"), ("entropy", "subsampled")],
)
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation(), DisARM()], ids=["score", "local", "disarm"])
@pytest.mark.slow
def test_exact(short, estimator, name):
    objective, weights = OBJECTIVES[short]
    case = CASES[name]
    elbo = TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator), objective=objective)
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    assert_same(over(case, elbo, 1), exact_gradient(case, weights))


class Weighed:
    """An ELBO whose weight is the parameter b, that the program is given as an argument."""

    def __init__(self, **options):
        self.elbo = TraceGrad_ELBO(**options)

    def loss_with_mutable_state(self, key, params, model, guide):
        of_argument = [lambda weight, program=program: program() for program in (model, guide)]
        return self.elbo.loss_with_mutable_state(key, params, *of_argument, params["b"])


def weighing(scaled):
    """Return a program whose latent site may be scaled by a parameter."""

    def latent(law):
        with handlers.scale(scale=numpyro.param("b", 0.7) if scaled else 1.0):
            return numpyro.sample("z", law)

    def model():
        numpyro.sample("x", dist.Normal(2 * latent(dist.Bernoulli(array(0.4))), 1.0), obs=1.4)

    def guide():
        latent(dist.Bernoulli(logits=numpyro.param("a", 0.3)))

    return Case("weighing", {"a": np.array(0.3), "b": np.array(0.7)}, {"z": ((), 2)}, lambda host: (model, guide))


LEARNED = {
    "kl": (ELBO(kl_weight=lambda b: b), lambda b: CostWeights(1.0, b, b)),
    "entropy": (Expectation(entropy=lambda b: b), lambda b: CostWeights(1.0, 0.0, b)),
    "scale": (ELBO(), lambda b: CostWeights(1.0, 1.0, 1.0)),
}


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation()], ids=["score", "local"])
@pytest.mark.parametrize("kind", LEARNED)
def test_a_weight_may_be_learned(kind, estimator):
    """The guide's density has no gradient of its own in a sum of costs; its weight has."""
    objective, weights = LEARNED[kind]
    case = weighing(kind == "scale")
    every = stacked(list(outcomes(case)))

    def loss(params):
        weighed = weights(params["b"])
        log_w, value = jax.vmap(lambda o: log_weight_and_objective(case, params, o, weighed))(every)
        return -(jnp.exp(log_w) * value).sum()

    wanted = jax.jit(jax.grad(loss))(parameters(case))
    elbo = Weighed(estimators={"z": estimator}, objective=objective)
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    assert abs(wanted["b"]) > 1e-3
    assert_same(over(case, elbo, 1), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "scale"])
def test_sticking_the_landing_leaves_a_learned_weight_its_gradient(kind):
    """At given noise: the weight's gradient is the bound's, and the mean's is that of the path alone."""

    def scaled():
        return handlers.scale(scale=numpyro.param("b", 0.7) if kind == "scale" else 1.0)

    def model():
        with scaled():
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(w, 1.0), obs=0.5)

    def guide():
        with scaled():
            numpyro.sample("w", dist.Normal(numpyro.param("m", 0.4), 0.6))

    case = Case("landing", {}, {}, None, {"w": np.array(1.3)})
    elbo = Weighed(estimators={"w": Reparam(sticking_the_landing=True)}, objective=LEARNED[kind][0])

    def loss(params):
        run = with_fixed_noise(guide, case)
        return elbo.loss_with_mutable_state(jax.random.key(0), params, model, run)["loss"]

    def by_hand(params):
        w = params["m"] + 0.6 * 1.3
        held = jax.lax.stop_gradient(params["m"])
        latent = dist.Normal(0.0, 1.0).log_prob(w) - dist.Normal(held, 0.6).log_prob(w)
        return -dist.Normal(w, 1.0).log_prob(0.5) - params["b"] * latent

    params = {"m": jnp.array(0.4), "b": jnp.array(0.7)}
    assert_same(jax.grad(loss)(params), jax.grad(by_hand)(params))


def test_the_weight_may_follow_an_argument_under_jit():
    def model(step):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=0.5)

    def guide(step):
        numpyro.sample("z", dist.Normal(1.0, 0.5))

    objective = TraceGrad_ELBO(objective=ELBO(kl_weight=lambda step: jnp.minimum(1.0, step / 10)))
    loss = jax.jit(lambda step: objective.loss(jax.random.key(0), {}, model, guide, step))
    losses = [loss(step) for step in (0.0, 5.0, 10.0)]
    np.testing.assert_allclose(losses[1], (losses[0] + losses[2]) / 2)


def test_refusals():
    with pytest.raises(ConfigurationError, match=r"write an objective, such as Expectation\(\)"):
        TraceGrad_ELBO(objective=Expectation)
    objective = TraceGrad_ELBO(multi_sample_guide=True, objective=Expectation())
    with pytest.raises(ConfigurationError, match="multi_sample_guide=True computes the evidence lower bound alone"):
        objective.loss(jax.random.key(0), {}, lambda: None, lambda: None)


def landing(params, key, estimator):
    """Return the gradient for a guide over a conjugate model whose posterior is N(0.25, 1/2)."""

    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=0.5)

    def guide():
        loc, scale = numpyro.param("m", 0.0), jnp.exp(numpyro.param("s", 0.0))
        numpyro.sample(
            "z", dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(loc, scale))
        )

    objective = TraceGrad_ELBO(estimators={"z": estimator})
    return jax.grad(lambda p: objective.loss(key, p, model, guide))(params)


@pytest.mark.slow
def test_sticking_the_landing():
    """No variance at the posterior; the same mean elsewhere."""
    at, off = {"m": 0.25, "s": -0.5 * np.log(2.0)}, {"m": -0.4, "s": 0.3}
    keys = jax.random.split(jax.random.key(0), 20_000)
    plain, stuck = (jax.jit(jax.vmap(lambda k, e=e: landing(off, k, e)))(keys) for e in (Reparam(), Reparam(True)))
    for name in off:
        spread = np.sqrt((plain[name].var() + stuck[name].var()) / len(keys))
        assert abs(plain[name].mean() - stuck[name].mean()) < 4.5 * spread
    assert all(np.abs(g).max() < 1e-12 for g in jax.vmap(lambda k: landing(at, k, Reparam(True)))(keys).values())
    assert jax.vmap(lambda k: landing(at, k, Reparam()))(keys)["s"].std() > 0.1


def test_a_weight_that_reads_a_parameter_by_itself_is_refused():
    """No handler stands around the function, and the parameter would keep its first value without a word."""
    elbo = TraceGrad_ELBO(objective=ELBO(kl_weight=lambda: numpyro.param("b", 0.7)))

    def program():
        numpyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ConfigurationError, match="reads the parameter 'b' with numpyro.param"):
        elbo.loss(jax.random.key(0), {}, program, program)
