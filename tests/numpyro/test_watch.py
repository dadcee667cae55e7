"""Watching a run in NumPyro, inside `jit` and `SVI.run`: the numbers are right, and training is as without."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import (
    IWAE,
    REBAR,
    TVO,
    ConfigurationError,
    DecayingAverage,
    FunctionBaseline,
    GumbelSoftmax,
    LeaveOneOut,
    NeuralBaseline,
    ProgramError,
    Reparam,
    ReweightedWakeSleep,
    ScoreFunction,
    Watch,
)
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from tests import watching

X = jnp.asarray(watching.X)
MODEL, GUIDE = watching.program(numpyro, dist, jnp.asarray)


def made(estimators=None, watch=None, lr=0.05, model=MODEL, guide=GUIDE, elbo=None):
    return SVI(model, config_estimators(guide, estimators or {}, watch=watch), Adam(lr), elbo or TraceGrad_ELBO())


def train(steps, *args, **kwargs):
    result = made(*args, **kwargs).run(jax.random.key(1), steps, X, progress_bar=False)
    jax.effects_barrier()
    return result


@pytest.mark.slow
def test_numbers_are_those_of_enumeration():
    records = []
    baseline = FunctionBaseline(lambda x: jnp.asarray(watching.LEVELS))
    train(1, {"z": ScoreFunction(baseline)}, Watch(records.append, draws=20_000))
    watching.check(records[0], watching.LEVELS)


@pytest.mark.slow
def test_particles_are_watched_alike():
    records = []
    baseline = FunctionBaseline(lambda x: jnp.asarray(watching.LEVELS))
    train(1, {"z": ScoreFunction(baseline)}, Watch(records.append, draws=5000), elbo=TraceGrad_ELBO(4))
    found, wanted = records[0]["sites"]["z"], watching.expected(watching.LEVELS)
    np.testing.assert_allclose(found["gradient_variance"], wanted["gradient_variance"] / 4, rtol=0.1)
    np.testing.assert_allclose(found["signal_to_noise"], wanted["signal_to_noise"] * 2, rtol=0.1)
    np.testing.assert_allclose(found["explained_variance"], wanted["explained_variance"], atol=0.03)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_unconstrained_parameter():
    """As in Pyro: d E / d log s of E[−log N(w; 0, 1)] = s², with draws s² ε² of variance 2 s⁴; the entropy has none."""

    def model(x):
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    def guide(x):
        numpyro.sample("w", dist.Normal(0.0, numpyro.param("s", 0.5, constraint=dist.constraints.positive)))

    records = []
    train(1, {}, Watch(records.append, draws=20_000), 0.1, model, guide)
    assert records[0]["gradient_variance"] == pytest.approx(2 * 0.5**4, rel=0.1)


@pytest.mark.slow
def test_training_is_the_same_with_and_without():
    estimators = {"z": ScoreFunction(DecayingAverage() + NeuralBaseline())}
    seen = []
    watched, plain = train(7, estimators, Watch(seen.append, every=3)), train(7, estimators)
    assert [record["step"] for record in seen] == [0, 3, 6]
    np.testing.assert_array_equal(watched.losses, plain.losses)
    jax.tree.map(np.testing.assert_array_equal, watched.params, plain.params)


@pytest.mark.slow
def test_steps_that_are_compiled_or_not_and_evaluations():
    """Every way of stepping counts the same steps, tells the same numbers, and an evaluation adds none."""
    emit = []
    for wrap in (jax.jit, lambda f: f):
        seen = []
        svi = made({}, Watch(seen.append, every=2))
        state, update, evaluate = svi.init(jax.random.key(1), X), wrap(svi.update), wrap(svi.evaluate)
        for _ in range(5):
            state, _ = update(state, X)
            evaluate(state, X)
        jax.effects_barrier()
        emit.append(seen)
    assert [record["step"] for record in emit[0]] == [0, 2, 4]
    for first, second in zip(*emit, strict=True):
        for name, value in watching.flat(first).items():
            assert value == pytest.approx(watching.flat(second)[name]), name


@pytest.mark.slow
def test_what_estimators_are_set_to_and_what_they_learn():
    seen = []
    train(3, {"z": REBAR(temperature=0.5, scale=2.0)}, Watch(seen.append, every=1))
    numbers = [record["sites"]["z"] for record in seen]
    assert numbers[0]["temperature"] == pytest.approx(0.5) and numbers[0]["scale"] == 2.0
    assert numbers[2]["temperature"] != pytest.approx(0.5) and "log_temperature" not in numbers[0]
    train(1, {"z": GumbelSoftmax(lambda x: 0.5 + 0 * x.sum())}, Watch(seen.append, every=1))
    assert seen[-1]["sites"]["z"]["temperature"] == 0.5


@pytest.mark.slow
def test_event_files_hold_what_the_callback_gets(tmp_path):
    seen = []
    train(5, {}, Watch(seen.append, tensorboard=tmp_path, every=2))
    found = watching.written(tmp_path)
    for tag, value in watching.flat(seen[1]).items():
        assert [step for step, _ in found[tag]] == [0, 2, 4]
        assert found[tag][1][1] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(  # Pyro's test has every one, at a tenth of the time.
    "estimator",
    [x if n % 4 == 0 else pytest.param(x, marks=pytest.mark.exhaustive) for n, x in enumerate(watching.FITTING)],
    ids=lambda e: type(e).__name__,
)
def test_every_estimator_can_be_watched(estimator):
    seen = []
    train(2, {"z": estimator}, Watch(seen.append, every=1), elbo=TraceGrad_ELBO(2))
    # A sum over both values has no variance, and infinitely more signal than noise.
    assert not np.isnan(list(watching.flat(seen[1]).values())).any(), seen[1]


@pytest.mark.slow
def test_other_objectives_and_scans():
    from numpyro.contrib.control_flow import scan

    for objective in (IWAE(plates=()), ReweightedWakeSleep(plates=()), TVO(plates=())):
        seen = []
        train(1, {}, Watch(seen.append), elbo=TraceGrad_ELBO(3, objective=objective))
        assert np.isfinite(list(watching.flat(seen[0]).values())).all()

    def chain(logit):
        def step(before, _):
            z = numpyro.sample("z", dist.Bernoulli(logits=logit + before))
            return 1.0 * z, None

        scan(step, 0.0, None, length=4)

    seen = []
    train(
        2,
        {"z": ScoreFunction(LeaveOneOut())},
        Watch(seen.append, every=1),
        0.1,
        lambda x: chain(0.3),
        lambda x: chain(numpyro.param("a", 0.1)),
        TraceGrad_ELBO(2),
    )
    assert 0 < seen[1]["sites"]["z"]["entropy"] <= np.log(2) and seen[1]["sites"]["z"]["gradient_variance"] > 0


@pytest.mark.slow
def test_refusals():
    def guide(x):
        w = numpyro.sample("w", dist.Normal(numpyro.param("a", 0.0), 1.0))
        if w > 100.0:
            raise AssertionError

    def model(x):
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    svi = made({}, Watch(print), 0.1, model, guide)
    with pytest.raises(ProgramError, match="must be one that JAX can trace.*drop"):
        svi.update(svi.init(jax.random.key(0), X), X)
    elbo = TraceGrad_ELBO(multi_sample_guide=True, estimators={"*": Reparam()})
    svi = made({}, Watch(print), 0.1, model, lambda x: numpyro.sample("w", dist.Normal().expand([3])), elbo)
    with pytest.raises(ConfigurationError, match="nothing to watch"):
        svi.update(svi.init(jax.random.key(0), X), X)
