"""Discrete sites inside `scan`: exact, and a cost is charged to its own step and the steps before it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from pplgrad import LeaveOneOut, ProgramError, ScoreFunction
from pplgrad.core.plates import AFTER, BEFORE, SAME
from pplgrad.core.program import Program
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.numpyro._evaluation import laid_out
from pplgrad.testing.in_numpyro import array, assert_same, exact_gradient, expected_gradient
from tests.numpyro.scans import CASES, DATA, PARAMS, T, as_case, bern


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_exact(name):
    case = as_case(name)
    elbo = TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, ScoreFunction()))
    assert_same(expected_gradient(case, elbo, 1), exact_gradient(case))


@pytest.mark.slow
def test_exact_with_two_particles():
    case = as_case("forward")
    elbo = TraceGrad_ELBO(2, estimators={"z": ScoreFunction(LeaveOneOut())})
    assert_same(expected_gradient(case, elbo, 2), exact_gradient(case))


def weights(name):
    """Return the flags with which costs are charged to the scanned site z, by cost name and sign."""
    model, guide, latents = CASES[name]
    elbo = TraceGrad_ELBO(estimators=dict.fromkeys(latents, ScoreFunction()))
    params = {key: array(value) for key, value in PARAMS.items()}
    ((arrays, static, reads),), _ = elbo._runs(jax.random.key(0), params, Program(model, guide, (), {}))
    layout, _ = laid_out(static, arrays, reads, None)
    (group,) = [i for i, g in enumerate(layout.site_groups) if layout.sites[g.members[0]].name == "z"]
    row = [layout.sites[i].name for i in layout.site_groups[group].members].index("z")
    found = {}
    for link in layout.links[group]:
        costs = layout.cost_groups[link.costs]
        for flag, sums in link.sums.items():
            for column, part in enumerate(costs.parts):
                for number in part if sums.included[row, column] else ():
                    spec = layout.costs[costs.members[number]]
                    found.setdefault((spec.name, spec.sign), set()).add(flag)
    return found


@pytest.mark.parametrize(
    ("name", "later"),
    [("forward", AFTER), ("both-reverse", BEFORE), ("guide-reverse", BEFORE), ("model-reverse", AFTER)],
)
def test_reward_to_go(name, later):
    """No cost of an earlier step is charged to a draw, in whichever direction the guide runs."""
    found = weights(name)
    assert found[("z", -1.0)] == {SAME, later}
    if name in ("forward", "model-reverse"):
        assert found[("x", 1.0)] == {SAME, AFTER}
    if name == "forward":
        assert found[("z", 1.0)] == {SAME, AFTER}


def test_wrapped_and_inside_jit():
    model, guide, _ = CASES["forward"]
    wrapped = config_estimators(guide, {"z": ScoreFunction(LeaveOneOut())})
    elbo = TraceGrad_ELBO(4)
    params = {key: array(value) for key, value in PARAMS.items()}
    grads = jax.jit(jax.grad(lambda p: elbo.loss(jax.random.key(0), p, model, wrapped)))(params)
    assert all(np.isfinite(g).all() for g in grads.values())


@pytest.mark.slow
def test_continuous_site_in_a_scan_under_the_score_function():
    """Without its reparameterized path: the gradient is the score's alone, at one draw."""

    def model():
        def step(c, x):
            y = numpyro.sample("y", dist.LogNormal(c, 1.0))
            numpyro.sample("x", dist.Normal(y, 1.0), obs=x)
            return jnp.log(y), None

        scan(step, jnp.zeros(()), array(DATA))

    def guide():
        m = numpyro.param("m", array(0.2))

        def step(c, _):
            y = numpyro.sample("y", dist.LogNormal(m + 0.5 * c, 0.7))
            return jnp.log(y), None

        scan(step, jnp.zeros(()), None, length=T)

    key = jax.random.key(3)
    elbo = TraceGrad_ELBO(estimators={"y": ScoreFunction()})
    found = jax.grad(lambda m: elbo.loss(key, {"m": m}, model, guide))(array(0.2))

    sites = numpyro.handlers.trace(
        numpyro.handlers.seed(numpyro.handlers.substitute(guide, {"m": array(0.2)}), jax.random.split(key)[1])
    ).get_trace()
    y = sites["y"]["value"]
    previous = jnp.concatenate([jnp.zeros(1), jnp.log(y)[:-1]])

    def log_q(m):
        return dist.LogNormal(m + 0.5 * previous, 0.7).log_prob(y)

    log_p = dist.LogNormal(previous, 1.0).log_prob(y) + dist.Normal(y, 1.0).log_prob(array(DATA))
    cost = log_p - log_q(0.2)
    to_go = jnp.cumsum(cost[::-1])[::-1]
    wanted = -(jax.jacobian(log_q)(0.2) * to_go).sum()
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_subsampled_plate_inside_a_scan_is_refused():
    def program():
        def step(c, x):
            with numpyro.plate("data", 4, subsample_size=2):
                z = bern("z", jnp.zeros(()))
            return c, z

        scan(step, jnp.zeros(()), array(DATA))

    with pytest.raises(ProgramError, match="Plate 'data' is subsampled inside a scan"):
        TraceGrad_ELBO().loss(jax.random.key(0), {}, program, program)


def test_log_odds_of_exactly_zero_have_the_right_gradient():
    """The host differentiates the density of such a site wrongly there, also in a body."""

    def model():
        a = numpyro.param("a", jnp.zeros(2))
        scan(lambda c, x: (c, numpyro.sample("x", dist.Bernoulli(logits=a[0] + x), obs=1.0)), 0.0, jnp.zeros(3))

    elbo = TraceGrad_ELBO()
    found = jax.grad(lambda p: elbo.loss(jax.random.key(0), p, model, lambda: None))({"a": jnp.zeros(2)})
    np.testing.assert_allclose(found["a"], [-1.5, 0.0], rtol=1e-12)
