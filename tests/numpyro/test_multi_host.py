"""Two processes of two devices each train as one device does, and what they keep is restored on one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.covering import asked
from tests.numpyro.multi_host import STEPS, as_arrays, with_key
from tests.numpyro.sharded import CASES, DATA, started

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kept(request, tmp_path_factory):
    """Return the folder that both processes wrote into."""
    folder = tmp_path_factory.mktemp("multi_host")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.numpyro.multi_host", address]
    names = asked(request, "name")
    both = [
        subprocess.Popen(
            [*command, str(i), str(folder), *names], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=400)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    return folder


def alone(name, steps, state=None):
    """Return losses and state of one device, on the whole data."""
    svi, begin = started(name)
    update, losses, state = jax.jit(svi.update), [], begin if state is None else state
    for _ in range(steps):
        state, loss = update(state, jnp.asarray(DATA))
        losses.append(float(loss))
    return losses, state


@pytest.mark.parametrize("name", CASES)
def test_two_machines_train_as_one_device(kept, name):
    with jax.enable_x64():
        losses, _ = alone(name, STEPS)
        np.testing.assert_allclose(json.loads((kept / "losses.json").read_text())[name], losses, rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_what_four_devices_kept_goes_on_on_one(kept, name):
    with jax.enable_x64():
        whole, last = alone(name, STEPS + 1)
        _, here = alone(name, STEPS)
        leaves, structure = jax.tree.flatten(as_arrays(here))
        with ocp.StandardCheckpointer() as files:
            found = files.restore(kept / str(list(CASES).index(name)), {"leaves": leaves})["leaves"]
        for one, other in zip(found, leaves, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
        losses, state = alone(name, 1, with_key(jax.tree.unflatten(structure, found)))
        np.testing.assert_allclose(losses, whole[STEPS:], rtol=1e-9)
        # Steps of this length spread rounding.
        for one, other in zip(jax.tree.leaves(as_arrays(state)), jax.tree.leaves(as_arrays(last)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
