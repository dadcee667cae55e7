"""SVI's state goes through orbax and a new process's objects, and gives the losses of the uninterrupted training, bit for bit."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import orbax.checkpoint as ocp
import pytest
from numpyro.infer import SVI
from numpyro.optim import Adam, ClippedAdam

from pplgrad import Watch
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators, split_optimizer
from tests.resuming import CHOICES, DATA, chosen, program

X = jnp.asarray(DATA)


def made(choice, watch=None, optimizer=None, **options):
    """Return an `SVI` as a new process would make it."""
    model, guide = program(numpyro, dist, jnp.asarray, jnp.exp)
    optimizer = split_optimizer(Adam(0.05), optax.adam(0.1)) if optimizer is None else optimizer()
    return SVI(model, config_estimators(guide, chosen(choice), watch=watch), optimizer, TraceGrad_ELBO(**options))


def through_a_file(folder, state, like):
    """Return a state as orbax gives it back, in the shape of a new process's own state."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", jax.eval_shape(lambda: like))


@lru_cache(maxsize=1)
def scan_of(svi, steps):
    """Return what trains so many steps, compiled once before and after the interruption, and anew for a new process's objects."""
    return jax.jit(lambda s: jax.lax.scan(lambda s, _: svi.update(s, X), s, length=steps))


def scanned(svi, state, steps):
    return scan_of(svi, steps)(state)


def ran(svi, state, steps):
    result = svi.run(jax.random.key(7), steps, X, progress_bar=False, init_state=state)
    return result.state, result.losses


@lru_cache(maxsize=1)
def step_of(svi):
    return jax.jit(svi.update)


def stepped(svi, state, steps):
    losses, update = [], step_of(svi)
    for _ in range(steps):
        state, loss = update(state, X)
        losses.append(loss)
    return state, jnp.stack(losses)


WAYS = {"scan": scanned, "run": ran, "steps": stepped}
HOW = {"one": {}, "vectorized": {"num_particles": 3}, "looped": {"num_particles": 2, "vectorize_particles": False}}


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.filterwarnings("ignore")
def test_goes_on_with_the_same_bits(choice, how, way, tmp_path):
    train = WAYS[way]
    svi = made(choice, **HOW[how])
    state, _ = train(svi, svi.init(jax.random.key(0), X), 6)
    end, wanted = train(svi, state, 6)
    svi = made(choice, **HOW[how])
    again = through_a_file(tmp_path, state, svi.init(jax.random.key(99), X))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    after, losses = train(svi, again, 6)
    np.testing.assert_array_equal(losses, wanted)
    for x, y in zip(jax.tree.leaves(svi.get_params(after)), jax.tree.leaves(svi.get_params(end)), strict=True):
        np.testing.assert_array_equal(x, y)
    if "average" in choice:
        kept = jax.tree.leaves(after.mutable_state)
        assert kept and all(np.array_equal(x, y) for x, y in zip(kept, jax.tree.leaves(end.mutable_state), strict=True))
        # The averages matter: without them the losses are others.
        emptied = again._replace(mutable_state=jax.tree.map(jnp.zeros_like, again.mutable_state))
        assert not np.array_equal(train(svi, emptied, 6)[1], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: ClippedAdam(0.05),
        lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 20)),
        lambda: split_optimizer(Adam(0.05), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))),
    ],
    ids=["clipped", "schedule", "split"],
)
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_goes_on(optimizer, tmp_path):
    svi = made("networks", optimizer=optimizer)
    state, _ = scanned(svi, svi.init(jax.random.key(0), X), 6)
    _, wanted = scanned(svi, state, 6)
    svi = made("networks", optimizer=optimizer)
    again = through_a_file(tmp_path, state, svi.init(jax.random.key(99), X))
    np.testing.assert_array_equal(scanned(svi, again, 6)[1], wanted)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_watch_goes_on_where_it_was(tmp_path):
    records = []
    svi = made("average", Watch(records.append, every=4, draws=2))
    state, _ = scanned(svi, svi.init(jax.random.key(0), X), 6)
    _, wanted = scanned(svi, state, 10)
    jax.effects_barrier()
    svi = made("average", Watch(records.append, every=4, draws=2))
    again = through_a_file(tmp_path, state, svi.init(jax.random.key(99), X))
    np.testing.assert_array_equal(scanned(svi, again, 10)[1], wanted)
    jax.effects_barrier()
    assert [record["step"] for record in records] == [0, 4, 8, 12, 8, 12]
    assert records[2:4] == records[4:]
