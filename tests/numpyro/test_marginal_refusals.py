"""Model sites that cannot be summed out: each is refused in words that say what to do instead."""

import builtins

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan

from pplgrad import ELBO, PplgradError
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro._tracing import marginal_sites
from tests.numpyro.marginal import SUM

KEY = jax.random.key(0)


def small(k="Categorical", scale=1.0, **infer):
    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        law = {
            "Categorical": lambda: dist.Categorical(logits=jnp.stack([z, -z], -1)),
            "Poisson": lambda: dist.Poisson(jnp.exp(z)),
            "event": lambda: dist.Bernoulli(logits=jnp.stack([z, -z])).to_event(1),
        }[k]
        k_ = numpyro.sample("k", law(), infer=infer).sum()
        b = numpyro.sample("b", dist.Bernoulli(logits=0.3 * k_))
        with handlers.scale(scale=scale):
            numpyro.sample("x", dist.Normal(z + k_ + b, 1.0), obs=0.3)

    return model


def one_by_one(**infer):
    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        k = numpyro.sample("k", dist.Categorical(logits=jnp.stack([z, -z], -1)), infer=infer)
        b = numpyro.sample("b", dist.Bernoulli(logits=0.3 * k))
        numpyro.sample("x", dist.Normal(z + k + b, 1.0), obs=0.3)

    return model


def mixing(mix):
    def model():
        k = numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3), infer=dict(SUM))
        numpyro.sample("x", dist.Normal(mix(k), 1.0), obs=0.3)
        small_guide()

    return model


def mixing_in_scan():
    def body(k, x):
        k = numpyro.sample("k", dist.Bernoulli(0.3 + 0.1 * k.max()), infer=dict(SUM))
        numpyro.sample("x", dist.Normal(k, 1.0), obs=x)
        return k, None

    scan(body, jnp.array(0), jnp.zeros(3))
    small_guide()


def steered():
    k = numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3), infer=dict(SUM))
    numpyro.sample("x", dist.Normal(k, 1.0), obs=0.3)
    numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(1.0 if numpyro.sample("b", dist.Bernoulli(0.3)) else 2.0, 1.0), obs=0.3)


def scaled():
    k = numpyro.sample("k", dist.Bernoulli(0.3), infer=dict(SUM))
    with handlers.scale(scale=2.0):
        numpyro.sample("x", dist.Normal(k, 1.0), obs=0.3)
    small_guide()


def in_cond():
    def branch(probs):
        return numpyro.sample("k", dist.Bernoulli(probs), infer=dict(SUM))

    cond(True, branch, branch, 0.3)
    small_guide()


def in_reverse():
    c = numpyro.sample("c", dist.Bernoulli(0.3), infer=dict(SUM))

    def body(carry, x):
        numpyro.sample("x", dist.Normal(c, 1.0), obs=x)
        return carry, None

    scan(body, 0, jnp.zeros(3), reverse=True)
    small_guide()


def steps_add_up():
    def body(total, x):
        total = total + numpyro.sample("k", dist.Bernoulli(0.3), infer=dict(SUM))
        numpyro.sample("x", dist.Normal(total, 1.0), obs=x)
        return total, None

    scan(body, 0, jnp.zeros(3))
    small_guide()


def across_a_plate():
    def body(k, x):
        k = numpyro.sample("k", dist.Bernoulli(0.3 + 0.2 * k), infer=dict(SUM))
        with numpyro.plate("two", 2):
            j = numpyro.sample("j", dist.Bernoulli(0.3 + 0.2 * k), infer=dict(SUM))
            numpyro.sample("x", dist.Normal(j, 1.0), obs=x)
        return k + 0 * j.max(), None

    scan(body, 0, jnp.zeros((3, 2)))
    small_guide()


def small_guide():
    numpyro.sample("z", dist.Normal(numpyro.param("m", 0.1), 1.0))
    numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("l", 0.1)))


REFUSED = {
    "not asked for": (one_by_one(), {}, "sum it out if it is discrete"),
    "sequential": (one_by_one(enumerate="sequential"), {}, "sum it out if it is discrete"),
    "no finite support": (small("Poisson", **SUM), {}, "Site 'k'.*Poisson has no finite support"),
    "several in one event": (small("event", **SUM), {}, "Site 'k'.*its event.*put the elements into a plate"),
    "a sum over all values": (small(**SUM), {}, "'k' is summed out.*the density of site '[bx]' may mix them"),
    "sorted values": (
        mixing(lambda k: jnp.sort(k, 0) if k.ndim else k),
        {},
        "'k' is summed out.*the density of site 'x' may mix them",
    ),
    "a mean of all values": (mixing(lambda k: k - k.mean()), {}, "the density of site 'x' may mix them"),
    "a sum inside a scan": (mixing_in_scan, {}, "'k' is summed out.*may mix them"),
    "control flow of Python": (steered, {}, "'k' is summed out.*Python control flow"),
    "other scales": (scaled, {}, "'k' and 'x' are summed out together.*different scales"),
    "weights": (one_by_one(**SUM), {"objective": ELBO(kl_weight=0.5)}, "'b'.*'x' are summed out together"),
    "divergence": (one_by_one(**SUM), {"closed_form": {"b": "kl"}}, "reads a site that is summed out"),
    "in cond": (in_cond, {}, "Site 'k'.*branch of cond"),
    "in reverse": (in_reverse, {}, "'x'.*reverse=True"),
    "a largest of a plate": (across_a_plate, {}, "'j' is summed out.*the density of site 'k' may mix them"),
    "steps that add up": (steps_add_up, {}, "does not run while the sites 'k'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_summed_is_refused(name):
    model, given, words = REFUSED[name]
    with pytest.raises(PplgradError, match=words):
        TraceGrad_ELBO(**given).loss(KEY, {"m": 0.1, "l": 0.1}, model, small_guide)


def test_a_sum_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(marginal_sites, "MOST", 900)

    def model():
        total = sum(numpyro.sample(f"k{i}", dist.Categorical(jnp.ones(10)), infer=dict(SUM)) for i in range(3))
        numpyro.sample("x", dist.Normal(total, 1.0), obs=0.3)

    with pytest.raises(PplgradError, match="site 'x'.*1,000 numbers.*LocalExpectation.*ScoreFunction"):
        TraceGrad_ELBO().loss(KEY, {}, model, lambda: None)


def test_without_funsor_the_extra_is_named(monkeypatch):
    plain = builtins.__import__

    def no_funsor(name, *args, **kwargs):
        if name == "funsor":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_funsor)
    with pytest.raises(PplgradError, match=r"pip install 'pplgrad\[enum\]'"):
        TraceGrad_ELBO().loss(KEY, {"m": 0.1, "l": 0.1}, one_by_one(**SUM), small_guide)
