"""A cost that jumps in a reparameterized draw, or is cut off from it: refused, where the estimate would be biased without a word."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal

from pplgrad import EstimatorError, Reparam, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from tests.numpyro.differentiating import WAYS, handed

KEY = jax.random.key(0)
TABLE = jnp.array([0.0, 3.0])
LOST = {
    "where": lambda z: jnp.where(z > 0, 3.0, 0.0),
    "cond": lambda z: jax.lax.cond(z > 0, lambda: 3.0, lambda: 0.0),
    "stop_gradient": jax.lax.stop_gradient,
    "an index": lambda z: TABLE[(z > 0).astype(int)],
    "floor": lambda z: 3.0 * jnp.floor(z),
    "round": jnp.round,
    "sign": jnp.sign,
    "searchsorted": lambda z: 1.0 * jnp.searchsorted(jnp.array([0.0]), z),
    "argsort": lambda z: TABLE[jnp.argsort(jnp.stack([z, -z]))[0]],
    "heaviside": lambda z: 3.0 * jnp.heaviside(z, 0.0),
    "copysign": lambda z: jnp.copysign(1.0, z),
    "payload of a sort": lambda z: jax.lax.sort((jnp.stack([z, -z]), TABLE), num_keys=1)[1][0],
    "turns of a loop": lambda z: jax.lax.while_loop(lambda c: c < z, lambda c: c + 1.0, 0.0),
    "isfinite": lambda z: 1.0 * jnp.isfinite(jnp.log(z)),
    "inside jit": jax.jit(lambda z: jnp.where(z > 0, 3.0, 0.0)),
}
WHOLE = {
    "itself": lambda z: z,
    "a ramp": lambda z: jnp.where(z > 0, z, 0.3 * z),
    "relu": jax.nn.relu,
    "clip": lambda z: jnp.clip(z, -1.0, 1.0),
    "logsumexp": lambda z: jax.scipy.special.logsumexp(jnp.stack([z, 2 * z])),
    "straight through": lambda z: z + jax.lax.stop_gradient(jnp.round(z) - z),
    "not at all": lambda z: 0.0,
    "scan": lambda z: jax.lax.scan(lambda c, _: (jnp.where(c > 1, c, 1.1 * c), None), z, None, 3)[0],
}


def program(change):
    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(change(z), 1.0), obs=2.0)

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("m", 0.3), 1.0))

    return model, guide


def gradient(elbo, model, guide):
    return jax.jit(jax.grad(lambda params: elbo.loss(KEY, params, model, guide)))({"m": 0.3})["m"]


@pytest.mark.grid
@pytest.mark.parametrize("estimators", [None, {"z": Reparam()}], ids=["default", "Reparam"])
@pytest.mark.parametrize("name", LOST)
def test_a_cost_without_a_derivative_is_refused(name, estimators):
    with pytest.raises(
        EstimatorError, match=r"at site 'z' takes the derivative .* density of 'x' .*use ScoreFunction\(\) at 'z'"
    ):
        gradient(TraceGrad_ELBO(estimators=estimators), *program(LOST[name]))
    assert jnp.isfinite(gradient(TraceGrad_ELBO(estimators={"z": ScoreFunction()}), *program(LOST[name])))


@pytest.mark.parametrize("name", WHOLE)
def test_a_cost_with_a_derivative_is_not(name):
    assert jnp.isfinite(gradient(TraceGrad_ELBO(), *program(WHOLE[name])))


def test_a_draw_without_a_parameter_has_nothing_to_lose():
    model, _ = program(LOST["where"])
    assert gradient(TraceGrad_ELBO(), model, lambda: numpyro.sample("z", dist.Normal(0.3, 1.0))) == 0


def jumping(w):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(jnp.where(z > 0, 3.0, 0.0), 1.0), obs=2.0)


def shifted(w):
    numpyro.sample("z", dist.Normal(w, 1.0))


@pytest.mark.grid
@pytest.mark.parametrize("by", ["argument", "closure"])
@pytest.mark.parametrize("way", WAYS)
def test_parameters_that_are_differentiated_from_outside(way, by):
    with pytest.raises(EstimatorError, match=r"at site 'z' .* density of 'x' .*use ScoreFunction\(\) at 'z'"):
        WAYS[way](handed(TraceGrad_ELBO(), KEY, jumping, shifted)[by])(jnp.array(0.3))


@pytest.mark.slow
def test_data_beside_a_parameter_have_nothing_to_lose():
    def model(w):
        jumping(w)
        numpyro.factor("f", numpyro.sample("y", dist.Normal(0.0, 1.0)))

    def guide(w):
        shifted(w)
        numpyro.sample("y", dist.Normal(numpyro.param("m", jnp.array(0.3)), 1.0))

    svi, w = SVI(model, guide, numpyro.optim.Adam(0.01), TraceGrad_ELBO()), jnp.array(0.3)
    state, loss = jax.jit(svi.update)(svi.init(KEY, w), w)
    assert jnp.isfinite(loss) and jnp.isfinite(svi.evaluate(state, w))
    assert jnp.isfinite(svi.run(KEY, 2, w, progress_bar=False).losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoDelta])
def test_densities_compare_values_with_their_bounds(auto):
    """A Uniform prior and the Delta sites of guides read a value by comparisons of their own, in which no derivative is lost."""

    def model():
        z = numpyro.sample("z", dist.Uniform(0.0, 4.0))
        w = numpyro.sample("w", dist.TruncatedNormal(0.0, 2.0, low=-1.0, high=4.0).mask(True))
        numpyro.sample("x", dist.Normal(z + w, 1.0), obs=2.0)

    svi = SVI(model, auto(model), numpyro.optim.Adam(0.01), TraceGrad_ELBO())
    assert jnp.isfinite(svi.run(KEY, 3, progress_bar=False).losses).all()


def test_a_jump_in_the_guide():
    def guide():
        z = numpyro.sample("z", dist.Normal(numpyro.param("m", 0.3), 1.0))
        numpyro.sample("y", dist.Normal(jnp.where(z > 0, 1.0, -1.0), 1.0))

    def model():
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("f", 0.7 * numpyro.sample("y", dist.Normal(0.0, 1.0)))

    with pytest.raises(EstimatorError, match="at site 'z' .* density of 'y'"):
        gradient(TraceGrad_ELBO(), model, guide)


@pytest.mark.slow
def test_a_point_mass_stands_for_the_draws_behind_it():
    """What an automatic guide hands out is a point mass at a function of its draw: the draw is what is at fault, if there is one."""

    def model():
        t = numpyro.sample("t", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(jnp.where(t > 0, 3.0, 0.0), 1.0), obs=2.0)

    guide = AutoDiagonalNormal(model)
    with pytest.raises(EstimatorError, match=r"use ScoreFunction\(\) at '_auto_latent'"):
        SVI(model, guide, numpyro.optim.Adam(0.01), TraceGrad_ELBO()).run(KEY, 2, progress_bar=False)
    for elbo, guide in (
        (TraceGrad_ELBO(estimators={"_auto_latent": ScoreFunction()}), AutoDiagonalNormal(model)),
        (TraceGrad_ELBO(), AutoDelta(model)),
    ):
        svi = SVI(model, guide, numpyro.optim.Adam(0.01), elbo)
        assert jnp.isfinite(svi.run(KEY, 2, progress_bar=False).losses).all()
