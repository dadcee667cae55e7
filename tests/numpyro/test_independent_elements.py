"""Where the elements of a plate are independent they are seen to be: an element is charged with its own costs alone."""

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import flax_module, nnx_module, random_flax_module
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from pplgrad import ScoreFunction
from pplgrad.core.program import Program
from pplgrad.lab.script import load_script
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro._tracing.specification import specify
from pplgrad.testing.in_numpyro import HOST, array, parameters
from pplgrad.testing.programs import CASES
from tests.models.test_every_script import MODELS, SCRIPTS, SIZES

pytestmark = [
    pytest.mark.filterwarnings("ignore:Missing a plate statement"),
    pytest.mark.filterwarnings("ignore:Some algorithms will automatically enumerate"),
]
KEY, N = jax.random.key(0), 4


def mixed(model, guide, params, *args, estimators=None):
    """Return what depends on other elements than its own: (kind of density, its site, the site that it reads, plates)."""
    elbo = TraceGrad_ELBO(estimators=estimators)
    _, static, reads = elbo._traced(KEY, params, Program(model, guide, args, {}))
    sites, costs = specify(static, reads)
    return [
        (getattr(spec, "sign", 0), spec.name, site, read.across)
        for spec in (*sites, *costs)
        for site, read in spec.reads.items()
        if read.across is None or read.across
    ]


def mixed_at_first(model, guide, *args):
    """Return the same at the parameters with which the program begins; nothing is computed, only traced."""
    found = []

    def run(key):
        drawn = handlers.trace(handlers.seed(guide, key)).get_trace(*args)
        run = handlers.trace(handlers.seed(handlers.replay(model, drawn), key)).get_trace(*args)
        params = {n: site["value"] for n, site in {**drawn, **run}.items() if site["type"] == "param"}
        found.extend(mixed(model, guide, params, *args))

    jax.make_jaxpr(run)(KEY)
    return found


@pytest.mark.parametrize("name", CASES)
def test_no_plate_of_the_usual_programs_is_mixed(name):
    model, guide = CASES[name].build(HOST)
    scores = dict.fromkeys(CASES[name].latents, ScoreFunction())
    assert mixed(model, guide, parameters(CASES[name]), estimators=scores) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_no_plate_of_a_model_script_is_mixed(name):
    with jax.enable_x64(False):
        assert mixed_at_first(*as_program(name)) == []


def as_program(name):
    """Return model, guide and a small batch of a model script."""
    script = load_script(MODELS / f"{name}.py", ("numpyro",))
    options = script.options(SIZES[name])
    train, _ = script.load(options, 0)
    model, guide = script.program("numpyro", options, train, 0)
    rows = train if script.whole_data else train[:4]
    return model, guide, jnp.asarray(script.prepare(options, rows, np.random.default_rng(0)))


MIXING = dist.Categorical(jnp.array([0.3, 0.7]))
# Local distributions of what one number z of each element says, of shape (N,).
LOCAL = {
    "normal": lambda z: dist.Normal(z, jnp.exp(z)),
    "shared-scale": lambda z: dist.Normal(z, 2.0),
    "bernoulli": lambda z: dist.Bernoulli(logits=z),
    "probs": lambda z: dist.Bernoulli(jax.nn.sigmoid(z)),
    "categorical": lambda z: dist.Categorical(logits=z[:, None] * jnp.arange(3.0)),
    "multinomial-probs": lambda z: dist.Multinomial(2, jax.nn.softmax(z[:, None] * jnp.arange(3.0))),
    "binomial": lambda z: dist.Binomial(5, logits=z),
    "poisson": lambda z: dist.Poisson(jnp.exp(z)),
    "gamma": lambda z: dist.Gamma(jnp.exp(z), 2.0),
    "beta": lambda z: dist.Beta(jnp.exp(z), 1.5),
    "student": lambda z: dist.StudentT(3.0, z, 1.0),
    "dirichlet": lambda z: dist.Dirichlet(jnp.exp(z)[:, None] + jnp.ones(3)),
    "events": lambda z: dist.Normal(z[:, None] * jnp.ones(3), 1.0).to_event(1),
    "multivariate": lambda z: dist.MultivariateNormal(z[:, None] * jnp.ones(3), jnp.eye(3) + 0.1),
    "multivariate-of-its-own": lambda z: dist.MultivariateNormal(
        jnp.zeros(3), covariance_matrix=jnp.eye(3) * jnp.exp(z)[:, None, None]
    ),
    "low-rank": lambda z: dist.LowRankMultivariateNormal(z[:, None] * jnp.ones(3), jnp.ones((3, 1)), jnp.ones(3)),
    "log-normal": lambda z: dist.LogNormal(z, 1.0),
    "transformed": lambda z: dist.TransformedDistribution(
        dist.Normal(z, 1.0), [dist.transforms.AffineTransform(1.0, z), dist.transforms.SigmoidTransform()]
    ),
    "simplex": lambda z: dist.TransformedDistribution(
        dist.Normal(z[:, None] * jnp.ones(2), 1.0).to_event(1), dist.transforms.StickBreakingTransform()
    ),
    "mixture": lambda z: dist.MixtureSameFamily(MIXING, dist.Normal(z[:, None] * jnp.ones(2), 1.0)),
    "zero-inflated": lambda z: dist.ZeroInflatedPoisson(jax.nn.sigmoid(z), jnp.exp(z)),
    "truncated": lambda z: dist.TruncatedNormal(z, 1.0, low=-1.0, high=2.0),
    "multinomial": lambda z: dist.Multinomial(4, logits=z[:, None] * jnp.arange(3.0)),
    "negative-binomial": lambda z: dist.NegativeBinomial2(jnp.exp(z), 2.0),
    "masked": lambda z: dist.Normal(z, 1.0).mask(jnp.arange(N) > 0),
    "von-mises": lambda z: dist.VonMises(z, 2.0),
    "walk": lambda z: dist.GaussianRandomWalk(jnp.exp(z), num_steps=3),
    "delta": lambda z: dist.Delta(z),
    "ordered": lambda z: dist.OrderedLogistic(z, jnp.array([-1.0, 0.0, 1.0])),
}


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_distribution_keeps_elements_apart(name):
    def model(data):
        with numpyro.plate("data", N):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            y = numpyro.sample("y", LOCAL[name](z))
            numpyro.sample("x", LOCAL[name](jnp.tanh(z)), obs=data)
            numpyro.sample("v", dist.Normal(y.reshape(N, -1).sum(-1), 1.0), obs=0.5)

    def guide(data):
        with numpyro.plate("data", N):
            z = numpyro.sample("z", dist.Normal(numpyro.param("m", jnp.ones(N)), 1.0))
            numpyro.sample("y", LOCAL[name](2 * z))

    found = []

    def run(key):  # Nothing is computed, only traced.
        with handlers.seed(rng_seed=0):
            data = LOCAL[name](jnp.linspace(-1, 1, N)).sample(key)
        found.append(mixed(model, guide, {"m": jnp.ones(N)}, data, estimators={"*": ScoreFunction()}))

    jax.make_jaxpr(run)(KEY)
    assert found == [[]]


class Encoder(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.relu(flax.linen.Conv(3, (2, 2))(x[..., None]))
        x = flax.linen.max_pool(x, (2, 2), (2, 2)).reshape(*x.shape[:-3], -1)
        return flax.linen.Dense(2)(flax.linen.LayerNorm()(x))


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.first, self.second = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(N, 4, 4)))


def autoencoder(decode):
    """Return model and guide of a binary code for each image, read from it and decoded by a network."""

    def model(x):
        network = decode()
        with numpyro.plate("data", 8, subsample_size=N):
            z = numpyro.sample("z", dist.Bernoulli(0.5 * jnp.ones(2)).to_event(1))
            w = numpyro.sample("w", dist.Normal(network(1.0 * z)[..., :2], 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(network(w).reshape(N, 4, 4), 1.0).to_event(2), obs=x)

    def guide(x):
        encode = flax_module("encode", Encoder(), input_shape=(1, 4, 4))
        with numpyro.plate("data", 8, subsample_size=N):
            z = numpyro.sample("z", dist.Bernoulli(logits=encode(x)).to_event(1))
            numpyro.sample("w", dist.Normal(z + encode(x), 1.0).to_event(1))

    return model, guide


def convolving():
    network = flax_module("conv", Deconvolution(), input_shape=(1, 2))
    return network


class Deconvolution(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, z):
        x = flax.linen.Dense(16)(z).reshape(*z.shape[:-1], 4, 4, 1)
        x = flax.linen.relu(flax.linen.ConvTranspose(2, (2, 2))(x))
        return flax.linen.Conv(1, (3, 3))(x).reshape(*z.shape[:-1], -1)


def recurrent():
    cell = numpyro.param("cell", jnp.ones((1, 16)) * 0.1)

    def run(z):
        def step(h, x):
            return jnp.tanh(h + x[:, None] * cell), None

        return jax.lax.scan(step, jnp.zeros((len(z), 16)), z.T)[0]

    return run


EQUINOX = equinox.nn.MLP(2, 16, 8, 1, key=jax.random.key(1))
DECODERS = {
    "flax": lambda: flax_module("decode", flax.linen.Dense(16), input_shape=(1, 2)),
    "convolution": convolving,
    "nnx": lambda: nnx_module("decode", Nnx(rngs=nnx.Rngs(0))),
    "equinox": lambda: jax.vmap(EQUINOX),
    "recurrent": recurrent,
    "random-weights": lambda: random_flax_module(
        "decode",
        flax.linen.Dense(16),
        {"kernel": dist.Normal(0.0, 1.0), "bias": dist.Normal(0.0, 1.0)},
        input_shape=(1, 2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_networks_keep_examples_apart(name):
    model, guide = autoencoder(DECODERS[name])
    if name == "random-weights":
        weights = AutoNormal(handlers.block(model, hide=["z", "w"]))
        local, guide = guide, lambda x: (weights(x), local(x))
    assert mixed_at_first(model, guide, IMAGES) == []


def crossed():
    with numpyro.plate("users", 3, dim=-2):
        u = numpyro.sample("u", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("items", N, dim=-1):
        v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("users", 3, dim=-2), numpyro.plate("items", N, dim=-1):
        k = numpyro.sample("k", dist.Bernoulli(logits=(u * v).sum(-1)))
        numpyro.sample("x", dist.Normal(k * u[..., 0], 1.0), obs=jnp.zeros((3, N)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_autoguides_keep_crossed_plates_apart(kind):
    auto = kind(handlers.block(crossed, hide=["k"]))

    def guide():
        found = auto()
        with numpyro.plate("users", 3, dim=-2), numpyro.plate("items", N, dim=-1):
            numpyro.sample("k", dist.Bernoulli(logits=(found["u"] - found["v"]).sum(-1)))

    assert mixed_at_first(crossed, guide) == []


def switching(value=None):
    """Regimes and states of several series, step by step, in a plate of the body."""

    def step(carry, x):
        k, s = carry
        with numpyro.plate("series", N):
            k = numpyro.sample("k", dist.Categorical(logits=jnp.eye(3)[k]))
            s = numpyro.sample("s", dist.Normal(s + jnp.array([-1.0, 0.0, 1.0])[k], 1.0))
            numpyro.sample("x", dist.Normal(s, 1.0), obs=x if value is None else None)
        return (k, s), None

    scan(step, (jnp.zeros(N, int), jnp.zeros(N)), jnp.zeros((3, N)))


def switching_guide():
    a = numpyro.param("a", array(0.3))

    def step(carry, _):
        k, s = carry
        with numpyro.plate("series", N):
            k = numpyro.sample("k", dist.Categorical(logits=a * jnp.eye(3)[k] + s[:, None]))
            s = numpyro.sample("s", dist.Normal(a * s + k, 1.0))
        return (k, s), None

    scan(step, (jnp.zeros(N, int), jnp.zeros(N)), None, length=3)


def test_a_plate_in_the_body_of_a_scan_is_kept_apart():
    assert mixed(switching, switching_guide, {"a": array(0.3)}, estimators={"*": ScoreFunction()}) == []
