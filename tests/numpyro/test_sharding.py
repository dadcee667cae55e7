"""Data split over two devices gives the losses, parameters and states of one device, for the same key."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pplgrad import ConfigurationError
from pplgrad.numpyro import TraceGrad_ELBO
from tests.covering import asked
from tests.numpyro.sharded import BRANCHES, CASES, SHARD_MAPPED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(request):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", "tests.numpyro.sharded", *asked(request, "job")]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("job", CASES)
def test_two_devices_train_as_one(found, job):
    assert found[job]["devices"] == 2 and found[job]["kept"]
    assert found[job]["difference"] < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("job", SHARD_MAPPED)
def test_shard_map_sums_gradients(found, job):
    """JAX sums the gradient of parameters that all devices share, and each device's is that of its own data."""
    assert found[job]["difference"] < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("job", [f"branches {name}" for name in BRANCHES])
def test_branches_are_split_over_devices(found, job):
    assert found[job]["difference"] < 1e-10
    # Three of five flips, and what the draw itself needs; relaxed branches of two particles are few.
    most = {"branches flips": 0.9, "branches flips, without fusion": 0.8}.get(job, 1.1)
    assert found[job]["operations"] < most


def test_a_split_that_is_none_is_refused():
    with pytest.raises(ConfigurationError, match="takes a sharding of one axis"):
        TraceGrad_ELBO(branch_sharding="branches")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ConfigurationError, match="drop one of the two"):
        TraceGrad_ELBO(branch_sharding=one, max_parallel=4)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["shard_map with state"])
def test_shard_map_with_averages_is_refused(found, job):
    assert "inside shard_map (over 'data')" in found[job]["refused"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_example_is_the_same_on_one_device():
    command = [sys.executable, ROOT / "examples" / "sharded_numpyro.py", "--steps", "5"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    apart = [float(text) for text in re.findall(r"on 2 devices off by (\S+) of it", shown)]
    assert len(apart) == 11 and max(apart) < 1e-4
