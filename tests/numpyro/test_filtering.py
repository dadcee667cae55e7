"""Particle filters through `scan`: exact over all draws and all ancestors of a hidden Markov model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.handlers import substitute

from pplgrad.numpyro import TraceGrad_ELBO, _filter
from pplgrad.testing.in_numpyro import KEY, array
from tests import filtering as shared


def chain(kind="discrete", forced=None, particles=2):
    """Return model and guide, whose draws are those with the numbers `forced`, (1 + steps, particles), if they are given."""
    before, normals = shared.KINDS[kind]

    def parameter(name):
        return numpyro.param(name, array(shared.PARAMS[name]))

    def model(xs):
        t, e, _ = parameter("t"), parameter("e"), parameter("g")
        w = numpyro.sample("w", dist.Bernoulli(logits=t[0])) if before else 0.0

        def step(carried, x):
            move = t[0] + t[1] * carried + 0.7 * w
            z = numpyro.sample("z", dist.Normal(move, 1.0) if normals else dist.Bernoulli(logits=move))
            mean = e[1] * z if normals else jnp.where(z == 1, e[1], e[0])
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
            return z.astype(float), None

        scan(step, 0.0, xs)

    def guide(xs):
        g = parameter("g")
        w = 0.0
        if before:
            with substitute(data=first(forced)):
                w = numpyro.sample("w", dist.Bernoulli(logits=g[0]))

        def step(carried, row):
            x, number = row
            move = g[0] + g[1] * carried + g[2] * x - 0.4 * w
            data = {}
            if forced is not None:
                chosen = jnp.asarray(forced)[number + 1, which(known[1][number])]
                data = {"z": move + 0.8 * array(shared.NOISE)[chosen] if normals else chosen}
            with substitute(data=data):
                z = numpyro.sample("z", dist.Normal(move, 0.8) if normals else dist.Bernoulli(logits=move))
            return z.astype(float), None

        scan(step, 0.0, (xs, jnp.arange(len(xs))))

    def first(forced):
        return {} if forced is None else {"w": jnp.asarray(forced)[0, which(known[0])]}

    known = None if forced is None else _known_keys(len(forced) - 1, particles)
    return model, guide


def which(known):
    """Return the number of the particle that runs, given what each draws from its key."""
    return jnp.argmax(jnp.all(known == jax.random.key_data(numpyro.prng_key()), -1))


def _known_keys(steps, particles):
    """Return what the particles' guides draw from their keys before the scan, and in each step."""
    keys = jax.random.split(jax.random.key(KEY), particles)

    def drawn(key):
        return jax.random.key_data(jax.random.split(key)[1])

    def in_step(number, key):
        return drawn(jax.random.split(_filter.step_key(jax.random.split(key, 3)[2], number))[0])

    start = jax.vmap(lambda k: drawn(jax.random.split(k, 3)[0]))(keys)
    return start, jnp.stack([jax.vmap(lambda k, i=i: in_step(i, k))(keys) for i in range(steps)])


def run_in(patch, steps=3):
    """Return what runs one filter for each outcome."""

    def run(objective, kind, draws, uniforms):
        particles = draws.shape[1]
        model, guide = chain(kind, draws, particles)
        elbo = TraceGrad_ELBO(particles, objective=objective)
        with patch.context() as inner:
            inner.setattr(_filter, "uniforms", lambda key, shape, dtype: array(uniforms).reshape(shape))
            xs = array(shared.X[:steps])
            params = {name: array(value) for name, value in shared.PARAMS.items()}
            return jax.jit(
                jax.value_and_grad(lambda p: elbo.loss(jax.random.key(KEY), p, model, guide, xs))
            )(params)

    return run


@pytest.mark.parametrize("short", ["score", "drop", "sometimes", "never", "systematic"])
def test_exact(short, monkeypatch):
    shared.assert_exact(run_in(monkeypatch), monkeypatch, short)


@pytest.mark.parametrize("short", ["score", "systematic"])
@pytest.mark.parametrize("kind", ["global", "mixed"])
def test_sites_before_the_loop_and_reparameterized_ones_exact(kind, short, monkeypatch):
    shared.assert_exact(run_in(monkeypatch, 2), monkeypatch, short, 2, kind)


@pytest.mark.parametrize("short", ["stop-gradient", "stop-gradient systematic"])
def test_evidence_exact(short, monkeypatch):
    shared.assert_evidence_exact(run_in(monkeypatch), monkeypatch, short)


@pytest.mark.parametrize("name", shared.MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    apply, short, check, kind = shared.MUTANTS[name]
    apply(monkeypatch)
    with pytest.raises(AssertionError):
        check(run_in(monkeypatch, 2), monkeypatch, short, 2, kind)


def test_mutant_paths_that_forget_what_stood_before_is_caught(monkeypatch):
    """The values of a site before the loop stay with the particle and do not follow its ancestors."""
    plain = _filter._Rows.advance
    monkeypatch.setattr(
        _filter._Rows, "advance", lambda self, carry, origin, number: plain(self, carry, jnp.arange(len(origin)), number)
    )
    with pytest.raises(AssertionError):
        shared.assert_exact(run_in(monkeypatch, 2), monkeypatch, "score", 2, "global")


def test_mutant_ancestors_of_one_side_alone_is_caught(monkeypatch):
    """The model's state does not follow the ancestors, the guide's does."""
    plain = _filter.descended

    def descended(state, flat):
        (guide, model), origin = plain(state, flat)
        return (guide, state[0][1]), origin

    monkeypatch.setattr(_filter, "descended", descended)
    with pytest.raises(AssertionError):
        shared.assert_exact(run_in(monkeypatch, 2), monkeypatch, "score", 2)
