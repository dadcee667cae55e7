"""A training that is killed and started again gives the losses of one that runs through, bit for bit."""

import signal
import subprocess
import sys

import pytest


def run(backend, how, folder, kill):
    """Train in a process of its own; return its end, and what it wrote by step, the last word of each."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.killed", backend, how, folder, "20", str(kill)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode, [line.split() for line in (folder / "losses.txt").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "how"),
    [("pyro", "eager"), ("pyro", "particles"), ("pyro", "compiled"), ("numpyro", "eager"), ("numpyro", "particles")],
)
def test_killed_and_started_again(backend, how, tmp_path):
    _, whole = run(backend, how, tmp_path / "whole", -1)
    assert len({value for _, value in whole}) >= 20
    ended, first = run(backend, how, tmp_path / "killed", 14)
    assert ended == -signal.SIGKILL and first == whole[:14]
    # It goes on from step 12, its last checkpoint.
    ended, both = run(backend, how, tmp_path / "killed", -1)
    assert ended == 0 and both[14:] == whole[12:]
