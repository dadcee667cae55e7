"""`independent_keys`: every draw has a key of its own, the gradient is exact, and a run again draws what the first drew."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam

from pplgrad import FIVO, IWAE, ConfigurationError, LocalExpectation, ProgramError, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators, independent_keys
from pplgrad.testing.in_numpyro import assert_same, exact_gradient, expected_gradient
from tests.numpyro.scans import CASES, as_case


def everywhere():
    """Ask for keys at a site, in loops in loops, in a branch, in a plate that takes a minibatch, and without a site; return some."""

    def inner(carry, _):
        numpyro.deterministic("inner", jax.random.key_data(numpyro.prng_key()))
        numpyro.deterministic("second", jax.random.key_data(numpyro.prng_key()))
        return carry, None

    def outer(carry, x):
        numpyro.deterministic("outer", jax.random.key_data(numpyro.prng_key()))
        scan(inner, carry, None, length=3)
        numpyro.deterministic("after", jax.random.key_data(numpyro.prng_key()))
        return carry, x

    numpyro.deterministic("before", jax.random.key_data(numpyro.prng_key()))
    scan(outer, 0.0, jnp.arange(4.0))
    with numpyro.plate("rows", 10, subsample_size=2):
        numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.deterministic("last", jax.random.key_data(numpyro.prng_key()))


@pytest.mark.parametrize("raw", [True, False])
def test_no_two_messages_have_the_same_key(raw):
    key = jax.random.PRNGKey(3) if raw else jax.random.key(3)
    sites = trace(seed(independent_keys(everywhere), key)).get_trace()
    keys = [site["value"] for site in sites.values() if site["type"] == "deterministic"]
    words = np.concatenate([np.reshape(key, (-1, 2)) for key in keys])
    assert len(words) == 1 + 4 * (1 + 2 * 3 + 1) + 1
    assert len(np.unique(words, axis=0)) == len(words)
    assert sites["rows"]["value"].shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "elbo", [TraceGrad_ELBO(8, objective=IWAE()), RenyiELBO(alpha=0.0, num_particles=8)], ids=["iwae", "host"]
)
@pytest.mark.parametrize("wrapped", [independent_keys, lambda program: program], ids=["wrapped", "plain"])
def test_the_particles_of_a_bound_share_their_minibatch(elbo, wrapped):
    """Guide and prior are one, so that a weight is that of the two elements of the minibatch: the loss is one of six."""
    data = np.array([0.0, 100.0, 10_000.0, 1e6])

    def program(observed):
        with numpyro.plate("rows", 4, subsample_size=2) as rows:
            numpyro.sample("z", dist.Bernoulli(0.5))
            if observed:
                numpyro.factor("f", jnp.asarray(data)[rows])

    model, guide = (wrapped(lambda observed=observed: program(observed)) for observed in (True, False))
    allowed = [-2 * (a + b) for a, b in itertools.combinations(data, 2)]
    for number in range(6):
        assert np.isclose(elbo.loss(jax.random.key(number), {}, model, guide), allowed, rtol=1e-6).any()


def test_the_keys_that_the_host_splits_in_a_loop_are_others():
    """It may draw a minibatch in a body with them."""

    def step(carry, _):
        numpyro.deterministic("mine", jax.random.key_data(numpyro.prng_key()))
        with numpyro.plate("rows", 1000, subsample_size=2):
            pass
        return carry, None

    sites = trace(seed(independent_keys(lambda: scan(step, 0.0, None, length=3)), jax.random.key(0))).get_trace()
    top = jax.random.split(jax.random.key(0))[1]
    base = jax.random.fold_in(top, 0)
    hosts, key = [], jax.random.fold_in(base, 2**32 - 1)
    for _ in range(3):
        key, now = jax.random.split(key)
        hosts += [key, now, *jax.random.split(now)]
    mine = [jax.random.fold_in(jax.random.fold_in(base, 0), t) for t in range(3)]
    words = np.stack([jax.random.key_data(key) for key in (*hosts, *mine, base)])
    assert len(np.unique(words, axis=0)) == len(words)
    np.testing.assert_array_equal(sites["mine"]["value"], words[len(hosts) : len(hosts) + 3])


def test_no_key_waits_for_another():
    """A `scan` carries no key of ours; and the n-th message alone decides on the n-th key, whatever is drawn before."""

    def keys(first):
        def program():
            numpyro.sample("a", first)
            return numpyro.prng_key()

        return seed(independent_keys(program), jax.random.key(0))()

    assert keys(dist.Normal(0.0, 1.0)) == keys(dist.Bernoulli(0.5))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_exact(name):
    case = as_case(name)
    under = replace(case, build=lambda host: tuple(map(independent_keys, case.build(host))))
    elbo = TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, ScoreFunction()))
    assert_same(expected_gradient(under, elbo, 1), exact_gradient(case))


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False])
def test_a_run_again_draws_what_the_first_drew(fuse):
    """The branches of a site hold the draws before it: an expectation over y is that at the chain that the primary run has drawn."""

    def guide():
        a, b = numpyro.param("a", jnp.array(0.3)), numpyro.param("b", jnp.array(-0.4))

        def step(z, _):
            z = numpyro.sample("z", dist.Bernoulli(logits=a + z)).astype(float)
            return z, z

        zs = scan(step, 0.0, None, length=4)[1]
        numpyro.sample("y", dist.Bernoulli(logits=b * (zs @ jnp.arange(1.0, 5.0))))

    def model():
        zs = scan(lambda z, _: (z, numpyro.sample("z", dist.Bernoulli(0.5))), 0.0, None, length=4)[1]
        y = numpyro.sample("y", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(y * zs.sum(), 1.0), obs=1.0)

    guide = independent_keys(guide)
    params = {"a": jnp.array(0.3), "b": jnp.array(-0.4)}
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(), "y": LocalExpectation()}, fuse=fuse)
    found = jax.jit(lambda key: jax.grad(lambda p: elbo.loss(key, p, independent_keys(model), guide))(params)["b"])
    chains = set()
    for number in range(5):
        key = jax.random.key(number)
        zs = trace(substitute(seed(guide, jax.random.split(key)[1]), data=params)).get_trace()["z"]["value"]
        chains.add(tuple(np.asarray(zs).tolist()))

        def expected(b, zs=zs):
            logits = b * (zs @ jnp.arange(1.0, 5.0))
            total = 0.0
            for y in (0.0, 1.0):
                log_q = dist.Bernoulli(logits=logits).log_prob(y)
                log_p = dist.Bernoulli(0.3).log_prob(y) + dist.Normal(y * zs.sum(), 1.0).log_prob(1.0)
                total += jnp.exp(log_q) * (log_q - log_p)
            return total

        np.testing.assert_allclose(found(key), jax.grad(expected)(params["b"]), rtol=1e-9, atol=1e-12)
    assert len(chains) > 1


def test_the_draws_have_their_law():
    def chain():
        def step(z, _):
            z = numpyro.sample("z", dist.Bernoulli(0.2 + 0.6 * z))
            return z.astype(float), None

        scan(step, 0.0, None, length=3)

    def drawn(key):
        return trace(seed(independent_keys(chain), key)).get_trace()["z"]["value"]

    many = np.asarray(jax.vmap(drawn)(jax.random.split(jax.random.key(1), 20_000)))
    p = np.array([0.2, 0.8])
    joint = {
        (a, b, c): np.prod([[1 - q, q][x] for q, x in zip((p[0], p[a], p[b]), (a, b, c), strict=True)])
        for a in (0, 1)
        for b in (0, 1)
        for c in (0, 1)
    }
    for values, probability in joint.items():
        found = (many == values).all(1).mean()
        assert abs(found - probability) < 4.5 * np.sqrt(probability * (1 - probability) / len(many))


@pytest.mark.slow
def test_under_the_hosts_own_elbo_with_a_branch_and_a_wrapped_guide():
    def program():
        q = numpyro.param("q", 0.3)
        x = numpyro.sample("x", dist.Normal(q, 1.0))
        cond(
            x > 0,
            lambda m: numpyro.sample("y", dist.Normal(m, 1.0)),
            lambda m: numpyro.sample("y", dist.Normal(-m, 1.0)),
            q,
        )

    for elbo, guide in (
        (Trace_ELBO(), independent_keys(program)),
        (TraceGrad_ELBO(), config_estimators(independent_keys(program), {"x": ScoreFunction()})),
    ):
        svi = SVI(program, guide, Adam(0.01), elbo)
        found = svi.run(jax.random.key(0), 3, progress_bar=False)
        assert np.isfinite(found.losses).all()


def test_an_autoguide_is_refused_and_without_handlers_nothing_is_asked_for():
    def model():
        return numpyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ConfigurationError, match="cannot wrap AutoNormal"):
        independent_keys(AutoNormal(model))
    assert substitute(independent_keys(model), data={"z": 2.0})() == 2.0
    assert independent_keys(model).__name__ == "model"


def test_a_filter_that_takes_the_steps_itself_refuses_it():
    """Its particles would all draw with the keys of one: `FIVO` runs a loop's body for each particle and step."""

    def program():
        scan(lambda z, _: (numpyro.sample("z", dist.Normal(z, 1.0)), None), 0.0, None, length=3)

    elbo = TraceGrad_ELBO(4, objective=FIVO())
    with pytest.raises(ProgramError, match="stands inside of IndependentKeys"):
        elbo.loss(jax.random.key(0), {}, program, independent_keys(program))
