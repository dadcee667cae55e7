"""A training that is killed and started again gives the losses of one that runs through, bit for bit."""

import signal
from pathlib import Path

import pytest

from tests import killed
from tests.lab.processes import forks

IMPORTS = {"pyro": ["pplgrad.pyro"], "numpyro": ["pplgrad.numpyro", "orbax.checkpoint"]}


def train(backend, how, folder, kill):
    """Train in this process, which may be killed."""
    getattr(killed, f"in_{backend}")(how, Path(folder), 20, int(kill))


def run(call, backend, how, folder, kill):
    """Train in a process of its own; return its end, and what it wrote by step, the last word of each."""
    folder.mkdir(exist_ok=True)
    ended = call(backend, how, folder, str(kill))
    assert ended in (0, -signal.SIGKILL)
    return ended, [line.split() for line in (folder / "losses.txt").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "how"),
    [("pyro", "eager"), ("pyro", "particles"), ("pyro", "compiled"), ("numpyro", "eager"), ("numpyro", "particles")],
)
def test_killed_and_started_again(backend, how, tmp_path):
    with forks(__name__, train.__name__, *IMPORTS[backend]) as call:
        _, whole = run(call, backend, how, tmp_path / "whole", -1)
        assert len({value for _, value in whole}) >= 20
        ended, first = run(call, backend, how, tmp_path / "killed", 14)
        assert ended == -signal.SIGKILL and first == whole[:14]
        # It goes on from step 12, its last checkpoint.
        ended, both = run(call, backend, how, tmp_path / "killed", -1)
        assert ended == 0 and both[14:] == whole[12:]
