"""Continuous sites that only the model draws: NumPyro's warning, and the loss and gradient that its own ELBOs have."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO

from pplgrad import DisARM, LocalExpectation, MuProp, PplgradError, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro._tracing import handlers
from pplgrad.testing.in_numpyro import assert_same, exact_gradient, expected_gradient, expected_gradient_over_cells
from pplgrad.testing.programs import Case

FOUND = "Found vars in model but not guide"
pytestmark = pytest.mark.filterwarnings(f"ignore:{FOUND}")
PARAMS = {
    "a": np.array([0.3, -0.2, 0.5, 0.1]),
    "l": np.array([0.7, -0.4]),
    "m": np.array(0.6),
    "s": np.array(-0.3),
}


def p(name):
    return numpyro.param(name, jnp.asarray(PARAMS[name]))


class FromNoise(dist.Normal):
    """A normal distribution that draws from the same standard noise every time."""

    noise = np.array([-0.3, 1.1, 0.2])

    def sample(self, key, sample_shape=()):
        return self.loc + self.scale * (self.noise if jnp.ndim(self.loc) else self.noise[1])


def local():
    """A draw of the model's in a plate, between a discrete draw of the guide's and data; another one outside of it."""
    x = jnp.array([0.3, -1.1, 2.0])

    def model():
        b = numpyro.sample("b", dist.Bernoulli(logits=p("l")[0]))
        w = numpyro.sample("w", FromNoise(p("m") + b, 0.7))
        with numpyro.plate("data", 3):
            c = numpyro.sample("c", dist.Bernoulli(logits=p("l")[1] + w))
            z = numpyro.sample("z", FromNoise(p("m") * c - b, jnp.exp(p("s"))))
            numpyro.sample("x", dist.Normal(z * w + c, 1.0), obs=x)

    def guide():
        numpyro.sample("b", dist.Bernoulli(logits=p("a")[0]))
        with numpyro.plate("data", 3):
            numpyro.sample("c", dist.Bernoulli(logits=p("a")[1:]))

    return Case("draws of the model", PARAMS, {"b": ((), 2), "c": ((3,), 2)}, lambda host: (model, guide))


ESTIMATORS = {
    "score": ScoreFunction(),
    "leave-one-out": ScoreFunction(samples=2),
    "local": LocalExpectation(),
    "disarm": DisARM(),
    "muprop": MuProp(),
}


def off(short):
    case, estimator = local(), ESTIMATORS[short]
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    found = over(case, TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator)), 1)
    wanted = exact_gradient(case)
    return max(np.abs(found[name] - wanted[name]).max() for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("short", ESTIMATORS)
def test_exact(short):
    assert off(short) < 1e-9


def what_it_read_is_forgotten(monkeypatch):
    monkeypatch.setattr(handlers, "mark", handlers.tag)


def without_its_derivative(monkeypatch):
    monkeypatch.setattr(handlers, "mark", lambda name, value: jax.lax.stop_gradient(value))


@pytest.mark.parametrize("mutant", [what_it_read_is_forgotten, without_its_derivative], ids=lambda x: x.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    assert off("score") > 1e-6


def continuous():
    u = numpyro.sample("u", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 3):
        z = numpyro.sample("z", dist.Gamma(jnp.exp(p("s")), 1.0 + u**2))
        numpyro.sample("x", dist.Normal(z + u * p("m"), 1.0), obs=jnp.array([0.3, -1.1, 2.0]))


def continuous_guide():
    numpyro.sample("u", dist.Normal(p("m"), jnp.exp(p("s"))))


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("host", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("particles", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_draws_give_the_hosts_loss_and_gradient(host, particles):
    results = []
    for elbo in (host(num_particles=particles), TraceGrad_ELBO(num_particles=particles)):

        def loss(params, elbo=elbo):
            return elbo.loss(jax.random.key(3), params, continuous, continuous_guide)

        with pytest.warns(UserWarning, match=FOUND):
            value, found = jax.jit(jax.value_and_grad(loss))({name: jnp.asarray(PARAMS[name]) for name in ("m", "s")})
        results.append({"loss": np.array(value), **{name: np.array(x) for name, x in found.items()}})
    assert_same(*results)


def of(law, read=lambda z: z):
    def model():
        z = numpyro.sample("z", law())
        numpyro.sample("x", dist.Normal(read(z) * 1.0, 1.0), obs=0.3)

    return model


def in_a_scan():
    def step(carry, _):
        return numpyro.sample("z", dist.Normal(carry, 1.0)), None

    last, _ = scan(step, p("m"), None, length=3)
    numpyro.sample("x", dist.Normal(last, 1.0), obs=0.3)


REFUSED = {
    "discrete": (of(lambda: dist.Bernoulli(0.5)), "'z' is in the model but not in the guide"),
    "a count": (of(lambda: dist.Poisson(jnp.exp(p("m")))), "'z' is in the model but not in the guide"),
    "a step": (
        of(lambda: dist.Normal(p("m"), 1.0), lambda z: z > 0),
        "'z' is drawn in the model alone.*'x' depends.*no derivative",
    ),
    "no gradient": (
        of(lambda: dist.Normal(p("m"), 1.0), lambda z: jax.lax.stop_gradient(z) ** 2),
        "'z' is drawn in the model alone",
    ),
    "a scan": (in_a_scan, "'z' is drawn by the model alone, in the body of a scan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_biased_is_refused(name):
    model, words = REFUSED[name]
    with pytest.raises(PplgradError, match=words):
        jax.grad(lambda params: TraceGrad_ELBO().loss(jax.random.key(0), params, model, lambda: None))(
            {"m": jnp.array(0.4)}
        )
