"""Trains a few steps on two processes of two devices each, as on two machines, and keeps the last state. Run by test_multi_host.py."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

STEPS = 3


def trained(name, mesh):
    """Return losses and the last state; each process hands in its own rows of the data."""
    from tests.numpyro.sharded import DATA, started

    svi, state = started(name)
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    state = jax.device_put(jax.tree.map(np.asarray, as_arrays(state)), everywhere)
    rows = len(DATA) // jax.process_count()
    mine = DATA[jax.process_index() * rows :][:rows]
    x, losses = jax.make_array_from_process_local_data(split, mine), []
    update = jax.jit(lambda state, x: as_arrays(svi.update(with_key(state), x)))
    for _ in range(STEPS):
        state, loss = update(state, x)
        losses.append(float(loss))
    return losses, state


def as_arrays(state):
    """Return a state with its key as numbers, which travel between processes and into files."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state
    )


def with_key(state):
    """Return a state with its key."""
    return state._replace(rng_key=jax.random.wrap_key_data(state.rng_key))


def main(address, process, folder, *names):
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(address, 2, int(process))
    # Its key is an array, and processes must know of each other before the first one.
    from tests.numpyro.sharded import CASES

    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    found = {}
    for name in names:
        losses, state = trained(name, mesh)
        found[name] = losses
        with ocp.StandardCheckpointer() as files:
            files.save(Path(folder) / str(list(CASES).index(name)), {"leaves": jax.tree.leaves(state)})
    if process == "0":
        (Path(folder) / "losses.json").write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
