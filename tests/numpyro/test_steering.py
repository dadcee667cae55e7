"""Control flow that is steered by what a relaxed value was made into, and derivatives that are cut along it: refused, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax
from numpyro.infer import SVI

from pplgrad import REBAR, RELAX, EstimatorError, GumbelSoftmax, MuProp, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, black_box, config_estimators
from pplgrad.numpyro._compat_jax import tag
from pplgrad.numpyro._tracing.control_dependence import steering
from tests.numpyro.jumps import CONTINUOUS, JUMPING, LAWS


def counted(z):
    """A loop that runs as often as the value says."""
    return lax.while_loop(lambda c: c < 3 * z + 0.5, lambda c: c + 1.0, 0.0)


def counted_inside(z):
    return jax.jit(lambda x: lax.while_loop(lambda s: s[0] < s[1], lambda s: (s[0] + 1.0, s[1] * 1.0), (0.0, x)))(
        2 * z
    )[0]


STEERED = {
    "while": counted,
    "while, through its carry": counted_inside,
    "while, after a loop of its own": lambda z: counted(lax.fori_loop(0, 3, lambda i, x: x + z, 0.0)),
    "switch": lambda z: lax.switch((2 * z + 0.5).astype(int), [lambda: 0.0, lambda: 1.0, lambda: 3.0]),
    "cond": lambda z: lax.cond(z + 1.0 > 1.5, lambda: 1.0, lambda: 2.0),
    "cond, without a gradient": lambda z: lax.cond(lax.stop_gradient(3 * z) > 1.5, lambda: 1.0, lambda: 2.0),
    "cond in a scan": lambda z: lax.scan(
        lambda c, x: (lax.cond(c > 1.5, lambda: c, lambda: c + z), x), 0.0, jnp.ones(3)
    )[0],
    "a callback": lambda z: jax.pure_callback(
        lambda x: np.asarray(x > 1.0, x.dtype), jax.ShapeDtypeStruct((), z.dtype), lax.stop_gradient(2 * z)
    ),
    "bounds of a loop": lambda z: lax.fori_loop(0, (3 * z).astype(int), lambda i, x: x + 1.0, 0.0),
}
FREE = {
    "a loop that counts": lambda z: z * lax.while_loop(lambda s: s < 3.0, lambda s: s + 1.0, 0.0),
    "a scan": lambda z: lax.scan(lambda c, x: (c + x * z, x), 0.0, jnp.ones(3))[0],
    "a branch by another value": lambda z: lax.cond(jnp.ones(()) > 0.5, lambda: z, lambda: 2 * z),
    "a comparison that a density makes": lambda z: jax.nn.softplus(2 * z) + jnp.maximum(z + 0.5, 0.2),
    "a counter out of a call": lambda z: counted(jax.jit(lambda x: (x * 2, jnp.ones(())))(z)[1]) + z,
}


def program(change):
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(change(z * 1.0), 1.0), obs=0.7)

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.array(0.3))))

    return model, guide


def step(change, estimator):
    elbo = TraceGrad_ELBO(estimators={"z": estimator})
    return jax.jit(lambda a: elbo.loss(jax.random.key(0), {"a": a}, *program(change)))(jnp.array(0.3))


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("estimator", [REBAR(learn=False), GumbelSoftmax(), MuProp()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", STEERED)
def test_what_is_steered_by_a_relaxed_value_is_refused(name, estimator):
    with pytest.raises(EstimatorError, match="Site 'z'"):
        step(STEERED[name], estimator)
    assert jnp.isfinite(step(STEERED[name], ScoreFunction()))


@pytest.mark.parametrize("name", FREE)
def test_what_is_not_steered_by_it_runs(name):
    assert jnp.isfinite(step(FREE[name], REBAR(learn=False)))


def test_state_that_holds_a_value():
    def program(x):
        held = jax.new_ref(jnp.zeros(()))
        held[...] = 2 * tag("z", x)
        return lax.cond(held[...] > 1.0, lambda: 1.0, lambda: 2.0)

    assert steering(jax.make_jaxpr(program)(1.0), {"z"})[0] == {"z": "cond"}
    assert steering(jax.make_jaxpr(program)(1.0), {"w"}) == ({}, {})


CUT = {
    "stop_gradient": lax.stop_gradient,
    "of what was computed": lambda z: lax.stop_gradient(2 * z + 1) * 0.5,
    "of a part": lambda z: lax.stop_gradient(z) + z,
    "in a call": lambda z: jax.jit(lambda x: 2 * lax.stop_gradient(x))(3 * z),
    "in a scan": lambda z: lax.scan(lambda c, x: (c + lax.stop_gradient(z), x), 0.0, jnp.ones(3))[0],
    "where": lambda z: jnp.where(2 * z > 0.7, 1.0, 0.2),
    "a truth value": lambda z: (z + 1.0 > 1.5) * 1.0,
    "rounded": lambda z: jnp.round(0.7 * z),
    "whole numbers": lambda z: (2 * z).astype(int) * 1.0,
}
WHOLE = {
    "what is printed": lambda z: jax.debug.callback(lambda x: None, 2 * z) or 2 * z,
    "what is only looked at": lambda z: z * 2.0 + 0.0 * len(LOGGED.append(lax.stop_gradient(z)) or LOGGED),
    "logsumexp": lambda z: jax.nn.logsumexp(jnp.stack([z, 2 * z])),
    "softplus and relu": lambda z: (
        jax.nn.softplus(2 * z) + jax.nn.relu(z - 0.3) + jnp.maximum(z, 0.2) + jnp.abs(z - 0.1)
    ),
    "half a normal": lambda z: dist.HalfNormal(0.3 + z).log_prob(0.4) + dist.Laplace(2 * z, 1.0).log_prob(0.4),
    "softmax": lambda z: jax.nn.softmax(jnp.stack([z, 2 * z]))[0],
    "clamped probabilities": lambda z: dist.Bernoulli(probs=0.2 + 0.5 * z).log_prob(1.0),
}
LOGGED = []


def derivative(change, estimator):
    model, guide = program(change)
    svi = SVI(model, config_estimators(guide, {"z": estimator}), numpyro.optim.Adam(0.1), TraceGrad_ELBO())
    return jax.jit(svi.update)(svi.init(jax.random.key(0)))[1]


@pytest.mark.grid
@pytest.mark.parametrize("estimator", [REBAR(learn=False), RELAX()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", CUT)
def test_a_derivative_that_is_cut_is_refused_where_it_is_needed(name, estimator):
    with pytest.raises(EstimatorError, match="Site 'z' is relaxed, but the program cuts the derivative"):
        derivative(CUT[name], estimator)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_a_derivative_that_is_cut_is_not_refused_elsewhere(name):
    """These are right whatever the derivative is, or promise nothing."""
    for other in (MuProp(), GumbelSoftmax(), ScoreFunction(), RELAX(through_cost=False)):
        assert jnp.isfinite(derivative(CUT[name], other))


@pytest.mark.parametrize("name", WHOLE)
def test_a_derivative_that_is_whole_is_not_refused(name):
    assert jnp.isfinite(derivative(WHOLE[name], REBAR(learn=False)))


SEVERAL = ("searchsorted", "%", "sort with a payload", "stopped by a mapping", "straight through")


@pytest.mark.parametrize("name", JUMPING)
def test_what_jumps_is_a_cut(name):
    """A closed world: what is not known to be continuous, with a derivative that is its own, is a cut."""
    found = steering(jax.make_jaxpr(lambda z: JUMPING[name](tag("z", z) * 1.0))(0.3), {"z"})[1]
    assert found.get("z")


@pytest.mark.grid
@pytest.mark.parametrize("estimator", [REBAR(), REBAR(learn=False), RELAX()], ids=["rebar", "fixed", "relax"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SEVERAL else pytest.mark.slow) for n in JUMPING if n != "float8"]
)
def test_what_jumps_is_refused(name, estimator):
    def change(z):
        return JUMPING[name](z.astype(jnp.float32)) * jnp.ones(())

    with pytest.raises(EstimatorError, match=r"Site 'z' is relaxed, but the program .*\(\w"):
        derivative(change, estimator)
    assert jnp.isfinite(derivative(change, ScoreFunction()))


@pytest.mark.parametrize("name", [*CONTINUOUS, *LAWS])
def test_what_is_continuous_is_not_cut(name):
    function = {**CONTINUOUS, **LAWS}[name]
    assert steering(jax.make_jaxpr(lambda z: function(tag("z", z) * 1.0))(0.3), {"z"}) == ({}, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CONTINUOUS, *LAWS} - {"half precision", "a cdf"}))
def test_what_is_continuous_is_the_integral_of_its_derivative(name):
    """The premise of the list holds; JAX has no derivative of one of the functions of `a cdf`."""
    function = {**CONTINUOUS, **LAWS}[name]
    points = 0.1 + 0.8 * (jnp.arange(2000.0) + 0.5) / 2000
    slopes = jax.jit(jax.vmap(jax.grad(function)))(points)
    np.testing.assert_allclose(0.8 * slopes.mean(), function(0.9) - function(0.1), atol=2e-3, rtol=2e-3)


EXACT = {
    "leaky_relu": lambda z: jax.nn.leaky_relu(3 * z - 1.3),
    "median": lambda z: jnp.median(jnp.stack([z, 0.7 - z, 0.2 + 0.3 * z])),
    "interp": CONTINUOUS["interpolation"],
    "logsumexp": CONTINUOUS["logsumexp"],
}


@pytest.mark.grid(together="gradients of what is continuous")
@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_the_gradient_of_what_is_continuous(name):
    model, guide = program(EXACT[name])
    draws = 40_000

    def gradient(key):
        elbo = TraceGrad_ELBO(estimators={"z": REBAR(learn=False)})
        return jax.grad(lambda a: elbo.loss(key, {"a": a}, model, guide))(0.3)

    def loss(a):
        q = jax.nn.sigmoid(a)
        values = [dist.Normal(EXACT[name](jnp.array(z)), 1.0).log_prob(0.7) for z in (0.0, 1.0)]
        divergence = q * jnp.log(q / 0.4) + (1 - q) * jnp.log((1 - q) / 0.6)
        return divergence - (1 - q) * values[0] - q * values[1]

    found = np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(0), draws)))
    assert abs(found.mean() - jax.grad(loss)(0.3)) < 4.5 * found.std() / draws**0.5


def test_a_black_box_of_what_was_computed():
    def change(z):
        return black_box(lambda x: float(x > 1.0), 2 * z)

    with pytest.raises(EstimatorError, match="Site 'z' is relaxed.*black_box"):
        step(change, REBAR(learn=False))
    assert jnp.isfinite(step(change, ScoreFunction()))


FOLLOWING = {
    "stopped": (lambda w: lax.stop_gradient(2 * w), True),
    "compared": (lambda w: jnp.where(w > 0.5, 1.0, 0.0), True),
    "steers": (lambda w: lax.cond(w > 0.5, lambda: 1.0, lambda: 0.0), True),
    "derived": (lambda w: jax.nn.softplus(2 * w), False),
}


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_continuous_site_that_follows(name, above):
    """Its path is part of the relaxed cost's slope where it follows; elsewhere it is Reparam's own affair."""
    change, cuts = FOLLOWING[name]

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        w = numpyro.sample("w", dist.Normal(z if above else 0.0, 1.0))
        numpyro.sample("x", dist.Normal(change(w) + z, 1.0), obs=0.7)

    def guide():
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.array(0.3))))
        numpyro.sample("w", dist.Normal(z if above else 0.0, 1.0))

    def run():
        return TraceGrad_ELBO(estimators={"z": REBAR(learn=False)}).loss(
            jax.random.key(0), {"a": jnp.array(0.3)}, model, guide
        )

    if above and cuts:
        with pytest.raises(EstimatorError, match="Site 'w'.*at site 'z'"):
            run()
    else:
        assert jnp.isfinite(run())
