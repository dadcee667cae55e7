"""Baselines in NumPyro: unbiased from any state, trained by SVI, kept in its parameters and its mutable state."""

import pickle

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax.experimental.sparse import BCOO
from numpyro import handlers
from numpyro.infer import SVI, Predictive
from numpyro.optim import Adam, ClippedAdam

from pplgrad import BaselineError, DecayingAverage, FunctionBaseline, NeuralBaseline, OptimalConstant, ScoreFunction
from pplgrad.core.plates import Plate
from pplgrad.engine.upstream import default_inputs
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators, is_baseline_param, split_optimizer
from pplgrad.numpyro._array_ops import OPS
from pplgrad.numpyro._tracing.particle_trace import _score_squared
from pplgrad.testing.in_numpyro import HOST, assert_same, exact_gradient, expected_gradient
from pplgrad.testing.programs import CASES
from tests import stacked_baselines

# Each of these compiles a training loop.
pytestmark = pytest.mark.slow

STATEFUL = {
    "average": DecayingAverage(0.8),
    "average-per-element": DecayingAverage(0.8, per_element=True),
    "optimal-past": OptimalConstant(decay=0.7),
    "function": FunctionBaseline(lambda: 0.7),
}


@pytest.mark.grid
@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("name", ["hierarchy", "subsampled"])
def test_unbiased_from_any_state(kind, name):
    check_unbiased(STATEFUL[kind], name)


def test_unbiased_with_a_network():
    check_unbiased(DecayingAverage(0.8) + NeuralBaseline(hidden=(3,)), "both_kinds_in_one_plate")


def test_sites_of_a_loop_share_a_network():
    shared = NeuralBaseline(hidden=(3,), share="loop")
    check_unbiased(DecayingAverage(0.8) + shared, "chain")
    kept = stacked_training(shared, 2, True)[-1][1]
    assert {name for name in kept if is_baseline_param(name)} == {"z*$pplgrad.0", "w*$pplgrad.0"}
    assert (kept["z*$pplgrad.0"][-1]["weight"] != 0).any()


def check_unbiased(baseline, name):
    case = CASES[name]
    chosen = dict.fromkeys(case.latents, ScoreFunction(baseline))
    model, guide = case.build(HOST)
    wrapped = config_estimators(guide, chosen)
    svi = SVI(model, wrapped, Adam(0.05), TraceGrad_ELBO())
    result = svi.run(jax.random.key(0), 5, progress_bar=False)
    extra = {n: v for n, v in result.params.items() if is_baseline_param(n)} | (result.state.mutable_state or {})
    assert extra or not any(part.per_site and part.state_shapes(()) for part in [baseline])
    found = expected_gradient(case, TraceGrad_ELBO(), 1, lambda g: config_estimators(g, chosen), extra)
    assert_same(found, exact_gradient(case))


X = jax.random.normal(jax.random.key(1), (20, 3))


def model(x):
    n = 20 if x is None else len(x)
    with numpyro.plate("data", n):
        z = numpyro.sample("z", dist.Bernoulli(0.5 * jnp.ones(n)))
        loc = jnp.zeros((n, 3)) if x is None else 2 * x[:, :1] + jnp.zeros((n, 3))
        numpyro.sample("x", dist.Normal(loc + z[:, None], 1.0).to_event(1), obs=x)


def guide(x):
    with numpyro.plate("data", 20):
        return numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(20))))


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(1)(flax.linen.tanh(flax.linen.Dense(8)(x)))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.second = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def pair():
    def init(key, x):
        return {"w": jnp.zeros((x.shape[-1], 1), x.dtype), "b": jnp.zeros(1, x.dtype)}

    return init, lambda p, x: x**2 @ p["w"] + p["b"]


NETS = {
    "built": lambda: None,
    "linen": Linen,
    "nnx": Nnx,
    "equinox": lambda: equinox.nn.MLP(3, 1, 8, 1, key=jax.random.key(0)),
    "pair": pair,
}


def downstream():
    """Return the mean downstream cost of each datum, as a network should predict it."""

    def at(z):
        loc = 2 * X[:, :1] + z
        return dist.Normal(loc, 1.0).log_prob(X).sum(-1)

    return (at(0.0) + at(1.0)) / 2


@pytest.mark.parametrize("kind", NETS)
def test_every_kind_of_network_is_trained(kind):
    baseline = NeuralBaseline(NETS[kind](), inputs=lambda x: x)
    wrapped = config_estimators(guide, {"z": ScoreFunction(baseline)})
    svi = SVI(model, wrapped, split_optimizer(Adam(1e-9), Adam(3e-2)), TraceGrad_ELBO())
    result = svi.run(jax.random.key(0), 400, X, progress_bar=False)
    name = "z$pplgrad.0"
    from pplgrad.numpyro._networks import network

    predicted = network(baseline.net, baseline.hidden, "z").apply(result.params[name], X)[:, 0]
    assert np.corrcoef(predicted, downstream())[0, 1] > 0.8
    pickle.loads(pickle.dumps(jax.device_get(result.params)))


def test_state_is_stable_in_scan_jit_and_the_progress_bar():
    wrapped = config_estimators(guide)
    svi = SVI(model, wrapped, Adam(0.05), TraceGrad_ELBO())
    state = svi.init(jax.random.key(0), X)
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), state.mutable_state)
    state, losses = jax.lax.scan(lambda s, _: svi.update(s, X), state, None, length=5)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state.mutable_state) == structure
    assert np.isfinite(losses).all()
    result = svi.run(jax.random.key(0), 3, X, progress_bar=True, init_state=state)
    assert result.state.mutable_state["z$pplgrad.0.state"]["weight"] > 0.5
    assert np.isfinite(svi.evaluate(result.state, X))


def test_average_is_from_before_the_draw():
    wrapped = config_estimators(guide, {"z": ScoreFunction(DecayingAverage(0.5))})
    svi = SVI(model, wrapped, Adam(1e-9), TraceGrad_ELBO())
    state = svi.init(jax.random.key(0), X)
    state, _ = svi.update(state, X)
    once = state.mutable_state["z$pplgrad.0.state"]
    np.testing.assert_allclose(once["weight"], 0.5)
    bare = SVI(model, guide, Adam(1e-9), TraceGrad_ELBO(estimators={"z": ScoreFunction()}))
    # With zero state the first step's loss and gradient are those without a baseline, for the same key.
    first = svi.init(jax.random.key(0), X)
    assert first.mutable_state["z$pplgrad.0.state"]["mean"] == 0
    key = jax.random.key(5)
    params = {"a": jnp.zeros(20)}
    with_state = jax.grad(lambda p: TraceGrad_ELBO().loss(key, {**p, **first.mutable_state}, model, wrapped, X))(params)
    without = jax.grad(lambda p: bare.loss.loss(key, p, model, guide, X))(params)
    np.testing.assert_allclose(with_state["a"], without["a"])


def test_per_element_average_scatters_by_index():
    data = jnp.arange(5.0)

    def small_model():
        with numpyro.plate("data", 5, subsample_size=2) as index:
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.factor("f", data[index] + 0.0 * z)

    def small_guide():
        with numpyro.plate("data", 5, subsample_size=2) as index:
            numpyro.sample("z", dist.Bernoulli(0.5))
            return index

    wrapped = config_estimators(small_guide, {"z": ScoreFunction(DecayingAverage(0.5, per_element=True))})
    svi = SVI(small_model, wrapped, Adam(0.1), TraceGrad_ELBO())
    state = svi.init(jax.random.key(0))
    assert state.mutable_state["z$pplgrad.0.state"]["mean"].shape == (5,)
    new, _ = svi.update(state)
    _, step_key = jax.random.split(state.rng_key)
    index = handlers.seed(small_guide, jax.random.split(step_key)[1])()
    wanted = jnp.zeros(5).at[index].set(0.5 * 2.5 * data[index])
    np.testing.assert_allclose(new.mutable_state["z$pplgrad.0.state"]["mean"], wanted, atol=1e-6)


def test_stable_update_survives_a_bad_batch():
    svi = SVI(model, config_estimators(guide), Adam(0.05), TraceGrad_ELBO())
    state = svi.init(jax.random.key(0), X)
    state, _ = jax.jit(svi.stable_update)(state, X)
    worse, loss = jax.jit(svi.stable_update)(state, X.at[0].set(jnp.nan))
    assert np.isnan(loss)
    old, new = (jax.tree.leaves((svi.get_params(s), s.mutable_state)) for s in (state, worse))
    for a, b in zip(old, new, strict=True):
        assert np.isfinite(b).all()
        if a.ndim:
            np.testing.assert_array_equal(a, b)


def test_split_optimizers():
    wrapped = config_estimators(guide, {"z": ScoreFunction(NeuralBaseline(inputs=lambda x: x))})
    for pair_ in [(Adam(0.0), Adam(0.1)), (optax.sgd(0.0), optax.adam(0.1)), (ClippedAdam(0.0), optax.sgd(0.1))]:
        svi = SVI(model, wrapped, split_optimizer(*pair_), TraceGrad_ELBO())
        state = svi.init(jax.random.key(0), X)
        before = svi.get_params(state)
        state, _ = jax.jit(svi.update)(state, X)
        after = svi.get_params(state)
        assert (before["a"] == after["a"]).all()
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before["z$pplgrad.0"], after["z$pplgrad.0"])
        assert any(jax.tree.leaves(moved))
    with pytest.raises(TypeError, match="numpyro.optim or optax"):
        split_optimizer(0.1, Adam(0.1))


def test_scope_renames_sites_and_baselines_together():
    scoped_guide = handlers.scope(config_estimators(guide), prefix="outer")
    scoped_model = handlers.scope(model, prefix="outer")
    svi = SVI(scoped_model, scoped_guide, Adam(0.05), TraceGrad_ELBO())
    state = svi.init(jax.random.key(0), X)
    assert set(state.mutable_state) == {"outer/z$pplgrad.0.state"}
    state, _ = svi.update(state, X)
    assert state.mutable_state["outer/z$pplgrad.0.state"]["weight"] > 0
    assert is_baseline_param("outer/z$pplgrad.1")


def test_predictive_without_data_and_the_same_draws_as_the_bare_guide():
    wrapped = config_estimators(guide, {"z": ScoreFunction(NeuralBaseline(inputs=lambda x: x * 2))})
    svi = SVI(model, wrapped, Adam(0.05), TraceGrad_ELBO())
    result = svi.run(jax.random.key(0), 3, X, progress_bar=False)
    draws = Predictive(wrapped, params=result.params, num_samples=4)(jax.random.key(1), None)
    bare = Predictive(guide, params=result.params, num_samples=4)(jax.random.key(1), None)
    np.testing.assert_array_equal(draws["z"], bare["z"])
    assert Predictive(model, guide=wrapped, params=result.params, num_samples=2)(jax.random.key(1), None)["x"].shape
    assert handlers.seed(wrapped, 0)(X).shape == (20,)


def test_several_particles_keep_the_state():
    chosen = {"z": ScoreFunction(DecayingAverage(0.9) + NeuralBaseline(inputs=lambda x: x))}
    for how in (True, False):
        svi = SVI(model, config_estimators(guide, chosen), Adam(0.05), TraceGrad_ELBO(3, vectorize_particles=how))
        result = svi.run(jax.random.key(0), 5, X, progress_bar=False)
        assert result.state.mutable_state["z$pplgrad.0.state"]["weight"] > 0.3
        assert np.isfinite(result.losses).all()


def test_categorical_score_is_one_hot_minus_softmax():
    logits = jnp.array([[0.3, -1.0, 0.8], [2.0, 0.1, -0.4]])
    value = jnp.array([2, 0])
    wanted = ((jax.nn.one_hot(value, 3) - jax.nn.softmax(logits)) ** 2).sum(-1)
    np.testing.assert_allclose(_score_squared(dist.Categorical(logits=logits), value), wanted, atol=1e-12)
    shared = dist.Bernoulli(logits=jnp.array(0.4)).expand((3,))
    found = _score_squared(shared, jnp.array([1, 0, 1]))
    p = jax.nn.sigmoid(0.4)
    np.testing.assert_allclose(found, jnp.array([(1 - p) ** 2, p**2, (1 - p) ** 2]), atol=1e-12)


NO_FEATURES = {
    "keys": lambda: jax.random.split(jax.random.key(0), 3),
    "a sparse array": lambda: BCOO.fromdense(jnp.eye(3)),
    "missing values": lambda: jnp.array([1.0, jnp.nan, jnp.inf]),
}


@pytest.mark.parametrize("kind", NO_FEATURES)
def test_the_default_network_passes_over_what_is_no_number(kind):
    def small_guide(x):
        with numpyro.plate("data", 3):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(3))))

    def small_model(x):
        with numpyro.plate("data", 3):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.ones(3))

    x = NO_FEATURES[kind]()
    svi = SVI(small_model, config_estimators(small_guide), Adam(0.01), TraceGrad_ELBO())
    state = svi.init(jax.random.key(0), x)
    for _ in range(2):
        state, loss = jax.jit(svi.update)(state, x)
        assert np.isfinite(loss)
    kept = {**svi.get_params(state), **state.mutable_state}
    assert any(is_baseline_param(name) for name in kept)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(kept))


def stacked_training(baseline, particles, data):
    """Return the parameters and the state after each step with a baseline at the sites of `tests.stacked_baselines`."""
    model, guide, args = stacked_baselines.program(HOST, data)
    guide = config_estimators(guide, {"*": ScoreFunction(baseline)})
    svi = SVI(model, guide, numpyro.optim.SGD(0.05), TraceGrad_ELBO(particles))
    args = tuple(map(jnp.asarray, args))
    state, update, seen = svi.init(jax.random.key(0), *args), jax.jit(svi.update), []
    for _ in range(4):
        state, loss = update(state, *args)
        seen.append((loss, svi.get_params(state), state.mutable_state))
    return seen


@pytest.mark.grid
@pytest.mark.parametrize("data", [True, False], ids=["inputs", "numbers"])
@pytest.mark.parametrize("kind", stacked_baselines.BASELINES)
def test_several_sites_at_once_are_as_one_by_one(kind, data, monkeypatch):
    given = (*stacked_baselines.BASELINES[kind], data)
    found = stacked_training(*given)
    stacked_baselines.one_by_one(monkeypatch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, stacked_training(*given))


def test_a_value_for_several_sites_at_once_that_does_not_fit_is_refused():
    with pytest.raises(BaselineError, match=r"MissingAxis.* at site 'w0' returned shape \(2,\)"):
        stacked_training(stacked_baselines.MissingAxis(), 2, True)


@pytest.mark.grid(together="mutants of stacked baselines")
@pytest.mark.parametrize("name", stacked_baselines.MUTANTS)
def test_mutant_of_several_sites_at_once_is_caught(name, monkeypatch):
    given = (*stacked_baselines.BASELINES["shared" if "shared" in name else "average+neural"], True)
    wanted = stacked_training(*given)[-1][1]["p"]
    stacked_baselines.MUTANTS[name](monkeypatch)
    assert abs(stacked_training(*given)[-1][1]["p"] - wanted).max() > 1e-6


def test_a_network_gets_the_rows_that_each_particle_has_drawn():
    """With particles that draw elements of their own, each has its own inputs; an array of the minibatch's size is shared."""
    plates = (Plate("data", -1, 2, 5),)
    full, batch = jnp.arange(15.0).reshape(5, 3), jnp.asarray([[0.5], [0.25]])
    index = jnp.asarray([[4, 1], [0, 2], [3, 4]])
    found = default_inputs(OPS, plates, {"data": index}, [full, batch])
    each = [default_inputs(OPS, plates, {"data": one}, [full, batch]) for one in index]
    np.testing.assert_array_equal(found, jnp.stack(each))
    assert found.shape == (3, 2, 4)
