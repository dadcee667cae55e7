"""A study on a Dask cluster: a real scheduler and two workers on this machine, one of which is lost in the middle."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from pplgrad.lab.results import read
from tests.lab.processes import COMMAND
from tests.lab.test_compare import SBN, refused
from tests.lab.test_crashes import SCRIPT

pytest.importorskip("distributed")


@contextmanager
def cluster(tmp_path, workers=2):
    """Give the address of a scheduler, and its workers' processes."""
    information = tmp_path / "scheduler.json"

    def dask(*arguments):
        command = [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    common = ["--scheduler-file", str(information)]
    scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", *common)
    processes = [scheduler]
    try:
        for _ in range(300):
            if information.exists() and information.read_text():
                break
            time.sleep(0.1)
        made = [dask("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", *common) for _ in range(workers)]
        processes += made
        yield json.loads(information.read_text())["address"], made
    finally:
        for process in processes:
            process.kill()
            process.wait()


STUDY = ["--backend", "pyro", "--estimator", "score+loo", "--seeds", "4", "--quiet", "--bound-samples", "0"]


@pytest.mark.slow
def test_a_study_on_a_cluster_survives_the_loss_of_a_worker(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    with cluster(tmp_path) as (address, workers):
        command = [*COMMAND, "compare", str(path), *STUDY, "--steps", "150"]
        out = tmp_path / "out"
        study = subprocess.Popen(
            [*command, "--out", str(out), "--cluster", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(6000):
            if (out / "runs").exists() and list((out / "runs").glob("*.json")):
                break
            time.sleep(0.02)
        workers[0].send_signal(signal.SIGKILL)
        _, errors = study.communicate(timeout=240)
        assert study.returncode == 0, errors.decode()
    assert len(list((out / "runs").iterdir())) == 4
    frame, _ = read(out)
    assert frame["error"].isna().all() and set(frame["seed"]) == set(range(4))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_no_cluster_is_one_sentence(tmp_path):
    message = refused(SBN, *STUDY, "--steps", "2", "--out", tmp_path, "--cluster", "tcp://127.0.0.1:1")
    assert "There is no Dask scheduler at tcp://127.0.0.1:1" in message
