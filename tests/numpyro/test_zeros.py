"""Zero, one and infinity: values that the guide never draws have no part in a gradient, whatever their cost."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

from pplgrad import ImpossibleValueError, LocalExpectation, ScoreFunction
from pplgrad.core.objectives import IWAE
from pplgrad.numpyro import OneHotCategorical, TraceGrad_ELBO
from pplgrad.testing import in_numpyro as host
from pplgrad.testing.cells import z_of
from tests.bounds import bound
from tests.zeros import BIASED, CASES, OBJECTIVES, QUICK, RANDOM, infinite_at_what_is_drawn, table

ROWS = [
    pytest.param(
        objective,
        estimator,
        name,
        marks=() if objective == "elbo" and (short, name) in QUICK else pytest.mark.slow,
        id=f"{objective}-{short}-{name}",
    )
    for objective in OBJECTIVES
    for short, estimator, name in table(objective, with_infinite_odds=True)
]


def wanted(case, objective):
    chosen, particles, weights = OBJECTIVES[objective]
    if isinstance(chosen, IWAE):
        return host.exact_bound_gradient(case, bound(1.0), particles, 0)
    return host.exact_gradient(case, weights)


def elbo(case, objective, estimator):
    chosen, particles, _ = OBJECTIVES[objective]
    return TraceGrad_ELBO(particles, objective=chosen, estimators=dict.fromkeys(case.latents, estimator))


@pytest.mark.grid(together="impossible values")
@pytest.mark.parametrize(("objective", "estimator", "name"), ROWS)
def test_exact(objective, estimator, name):
    case, particles = CASES[name], OBJECTIVES[objective][1]
    with host.isolated():
        over = host.expected_gradient_over_cells if estimator.uses_branches else host.expected_gradient
        wrap, extra = kept(case, estimator)
        host.assert_same(over(case, elbo(case, objective, estimator), particles, wrap, extra), wanted(case, objective))


def kept(case, estimator):
    """Return what the guide registers; NumPyro's validation refuses log odds of −inf where it sees them, outside of `jit`."""
    with numpyro.validation_enabled(False):
        return host.kept_by_the_guide(case, estimator)


def drawn(case, estimator, draws, particles=1):
    """Return gradients of many draws, also with respect to what is learned."""
    model, guide = case.build(host.HOST)
    wrap, extra = kept(case, estimator)
    objective = TraceGrad_ELBO(
        particles, estimators={name: estimator if name != "w" else ScoreFunction() for name in case.latents}
    )
    guide = wrap(guide)

    def one(key):
        return jax.value_and_grad(lambda p: objective.loss(key, p, model, guide))({**host.parameters(case), **extra})

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws))


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize(("short", "name"), [(short, name) for short, (_, names) in RANDOM.items() for name in names])
def test_unbiased(short, name):
    with host.isolated():
        losses, found = drawn(CASES[name], RANDOM[short][0], 5000)
        exact = host.exact_gradient(CASES[name])
    assert np.isfinite(losses).all() and all(np.isfinite(x).all() for x in found.values())
    for parameter, value in exact.items():
        assert z_of(np.asarray(found[parameter]), value) < 4.5, parameter


@pytest.mark.grid
@pytest.mark.parametrize("name", ["one_hot", "binary"])
@pytest.mark.parametrize("short", BIASED)
def test_relaxations_are_finite(short, name):
    case = CASES[name]
    with host.isolated():
        losses, found = drawn(case, BIASED[short], 20)
    assert np.isfinite(losses).all() and all(np.isfinite(x).all() for x in found.values())
    if name == "one_hot":
        assert np.abs(found["a"])[:, case.impossible["k"]].max() == 0 < jnp.abs(found["a"]).max()


@pytest.mark.slow
def test_an_infinite_cost_in_a_branch_is_refused():
    """By name where it is known, and else by a loss that is NaN."""
    model, guide = infinite_at_what_is_drawn(host.HOST)
    elbo = TraceGrad_ELBO(estimators={"k": LocalExpectation()})
    params = {"a": jnp.array([0.0, 0.2, -40.0])}

    def loss(params):
        return elbo.loss(jax.random.key(0), params, model, guide)

    with pytest.raises(ImpossibleValueError, match="'k' is NaN or infinite although the loss is finite"):
        jax.value_and_grad(loss)(params)
    assert np.isnan(jax.jit(jax.value_and_grad(loss))(params)[0])


@pytest.mark.slow
def test_a_one_hot_draw_may_have_impossible_categories():
    for given in ({"probs": jnp.array([0.6, 0.4, 0.0])}, {"logits": jnp.array([jnp.log(0.6), jnp.log(0.4), -jnp.inf])}):
        law = OneHotCategorical(**given, validate_args=True)
        assert jnp.allclose(law.log_prob(jnp.array([1.0, 0.0, 0.0])), jnp.log(0.6))
        assert law.log_prob(jnp.array([0.0, 0.0, 1.0])) == -jnp.inf
    for wrong in ([jnp.nan, 0.0], [jnp.inf, 0.0], [-jnp.inf, -jnp.inf]):
        with pytest.raises(ValueError, match="invalid"):
            OneHotCategorical(logits=jnp.array(wrong), validate_args=True)
