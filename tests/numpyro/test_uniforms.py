"""The uniform numbers by which NumPyro draws a Bernoulli, which antithetic and relaxed estimators use again."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pplgrad as pg
from pplgrad.core.draw import Draw
from pplgrad.numpyro import TraceGrad_ELBO, _distributions

LAWS = {
    "logits": lambda: dist.Bernoulli(logits=jnp.linspace(-2.0, 2.0, 40)),
    "probs": lambda: dist.Bernoulli(probs=jnp.linspace(0.05, 0.95, 40)),
    "event": lambda: dist.Bernoulli(logits=jnp.linspace(-2.0, 2.0, 40)).to_event(1),
    "masked": lambda: dist.Bernoulli(logits=jnp.linspace(-2.0, 2.0, 40)).mask(jnp.arange(40) % 2 == 0),
}
ESTIMATORS = [pg.DisARM(), pg.ARM(), pg.REBAR(learn=False)]


@pytest.mark.parametrize("law", LAWS)
def test_the_draw_is_below(law):
    fn = LAWS[law]()
    for seed in range(5):
        key = jax.random.key(seed)
        value = fn.sample(key)
        found = _distributions.finite_draw(_distributions.unmasked(fn), value, key)
        assert found is not None and found.uniform is not None
        assert ((found.uniform < jax.nn.sigmoid(found.odds)) == (value == 1)).all()


@pytest.mark.parametrize("fn", [dist.Bernoulli(0.3).expand((4,)), dist.Categorical(probs=jnp.array([0.3, 0.7]))])
def test_others_have_none(fn):
    key = jax.random.key(0)
    found = _distributions.finite_draw(fn, fn.sample(key), key)
    assert found is not None and found.uniform is None


def guide():
    logits = numpyro.param("a", jnp.array([0.4, -1.1]))
    with numpyro.plate("two", 2):
        numpyro.sample("z", dist.Bernoulli(logits=logits))


def model():
    with numpyro.plate("two", 2):
        z = numpyro.sample("z", dist.Bernoulli(probs=0.3))
    numpyro.factor("f", 1.3 * z[0] * (1 - z[1]) - 0.7 * z[1])


class Redrawn(numpyro.primitives.Messenger):
    """Puts an independent draw in the place of every draw, after the host has drawn."""

    def postprocess_message(self, msg):
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["value"] = msg["fn"].sample(jax.random.fold_in(msg["kwargs"]["rng_key"], 3))


def redrawn_guide():
    with Redrawn():
        guide()


def exact():
    """Return the exact gradient of the negative ELBO."""

    def loss(a):
        q, total = jax.nn.sigmoid(a), 0.0
        for z in np.ndindex(2, 2):
            z = jnp.array(z)
            log_q = jnp.where(z == 1, jnp.log(q), jnp.log1p(-q)).sum()
            log_p = jnp.where(z == 1, jnp.log(0.3), jnp.log(0.7)).sum() + 1.3 * z[0] * (1 - z[1]) - 0.7 * z[1]
            total += jnp.exp(log_q) * (log_q - log_p)
        return total

    return jax.grad(loss)(jnp.array([0.4, -1.1]))


def z_score(estimator, program=guide, draws=40_000):
    elbo = TraceGrad_ELBO(estimators={"z": estimator})
    params = {"a": jnp.array([0.4, -1.1])}

    def gradient(key):
        return jax.grad(lambda p: elbo.loss(key, p, model, program))(params)["a"]

    found = jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(1), draws))
    return float(jnp.abs((found.mean(0) - exact()) / (found.std(0) / draws**0.5)).max())


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("program", [guide, redrawn_guide])
def test_unbiased(estimator, program):
    assert z_score(estimator, program) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_the_wrong_side_is_caught(estimator, monkeypatch):
    plain = Draw.uniform
    monkeypatch.setattr(
        Draw, "uniform", lambda draw, probs: None if plain(draw, probs) is None else 1 - plain(draw, probs)
    )
    assert z_score(estimator) > 10


@pytest.mark.slow
def test_a_host_that_draws_otherwise_has_none(monkeypatch):
    _distributions._draws_by_uniforms.cache_clear()
    monkeypatch.setattr(
        dist.BernoulliProbs, "sample", lambda self, key, sample_shape=(): jax.random.bernoulli(key, 1 - self.probs) ^ 1
    )
    assert not _distributions._draws_by_uniforms()
    _distributions._draws_by_uniforms.cache_clear()
