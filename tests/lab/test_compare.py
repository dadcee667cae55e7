"""`pplgrad compare`: what it leaves, how it goes on after an interruption, and how it says no."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from pplgrad.lab.cli import main
from pplgrad.lab.results import COLUMNS, spread, summary
from pplgrad.lab.study import RunConfig, evaluation_steps

SBN = Path(__file__).parents[2] / "models" / "sbn.py"
SMALL = ["--set", "latents=5", "--steps", "6", "--seeds", "2", "--quiet", "--batch-size", "20"]


def run(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)], catch_exceptions=False)


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert message.startswith("pplgrad: ") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    words = ["score", "score+average", "score+neural", "score+loo"]
    backends = ["--backend", "pyro", "--backend", "numpyro"]
    result = run(SBN, *backends, *(x for w in words for x in ("--estimator", w)), *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.mark.slow
def test_leaves_table_tidy_files_and_picture(study):
    out, shown = study
    runs = pd.read_csv(out / "runs.csv")
    assert len(runs) == 2 * 4 * 2
    curves = pd.read_parquet(out / "curves.parquet")
    assert set(curves.columns) == {"step", "elbo_train", "elbo_test", "seconds", "backend", "estimator", "seed"}
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (out / "curves.svg").read_text()
    for _, row in summary(runs).iterrows():
        for name in COLUMNS:
            assert spread(row["mean", name], row["sd", name]) in shown
    assert json.loads(runs["versions"][0])["pplgrad"] and json.loads(runs["options"][0])["latents"] == 5
    assert (runs[["gradient_variance", "milliseconds_per_step"]] > 0).all().all()


@pytest.mark.slow
def test_both_libraries_start_at_the_same_objective(study):
    curves = pd.read_parquet(study[0] / "curves.parquet")
    start = curves[curves["step"] == 0].groupby("backend")["elbo_train"].mean()
    assert abs(start["pyro"] - start["numpyro"]) < 0.5


@pytest.mark.slow
def test_a_finished_run_is_never_repeated(study):
    out, _ = study
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    words = ["score", "score+average", "score+neural", "score+loo"]
    result = run(SBN, *(x for w in words for x in ("--estimator", w)), *SMALL, "--out", out)
    assert result.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == before


@pytest.mark.slow
def test_another_configuration_is_another_run(tmp_path):
    base = [SBN, "--backend", "numpyro", "--estimator", "score", "--set", "latents=3", "--seeds", "1", "--quiet"]
    for extra in (["--steps", "2"], ["--steps", "3"], ["--steps", "3", "--learning-rate", "0.1"]):
        assert run(*base, *extra, "--out", tmp_path).exit_code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 1


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(tmp_path):
    """`kill -9` after the first finished run: nothing half is left, and the same command finishes the rest."""
    command = [
        *(sys.executable, "-m", "pplgrad.lab", "compare", str(SBN), "--backend", "pyro", "--estimator", "score"),
        *("--set", "latents=5", "--steps", "300", "--seeds", "4", "--quiet", "--out", str(tmp_path)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "runs"
    for _ in range(600):
        if runs.exists() and list(runs.glob("*.json")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert 0 < len(finished) < 4
    for path in finished:
        json.loads(path.read_text())
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "score" in done.stdout and len(list(runs.glob("*.json"))) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())


@pytest.mark.slow
def test_side_by_side_gives_the_same_results(tmp_path):
    base = [SBN, "--backend", "numpyro", "--estimator", "score+loo", *SMALL]
    run(*base, "--out", tmp_path / "one")
    run(*base, "--jobs", "2", "--out", tmp_path / "two")
    one, two = (pd.read_csv(tmp_path / name / "runs.csv") for name in ("one", "two"))
    pd.testing.assert_series_equal(one["elbo_test"], two["elbo_test"])


def test_refusals(tmp_path):
    assert "no model script at" in refused(tmp_path / "none.py")
    script = tmp_path / "half.py"
    script.write_text("OPTIONS = {}\nDISCRETE = ('z',)\n")
    assert "has no 'load'" in refused(script, "--backend", "pyro")
    script.write_text("import nothing_of_this_name\n")
    assert "cannot be loaded: ModuleNotFoundError" in refused(script)
    assert "Unknown estimator 'magic'" in refused(SBN, "--estimator", "magic")
    assert "Unknown baseline 'magic'" in refused(SBN, "--estimator", "score+magic")
    assert "only one baseline" in refused(SBN, "--estimator", "score+loo+optimal")
    assert "needs at least two particles" in refused(SBN, "--estimator", "score+loo", "--particles", "1")
    assert "has no option 'size'" in refused(SBN, "--set", "size=3")
    assert "is of type int" in refused(SBN, "--set", "latents=many")
    assert "NAME=VALUE" in refused(SBN, "--set", "latents")
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in refused(SBN, "--out", file / "results")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "cannot be written" in refused(SBN, "--out", tmp_path / "results")


def test_help_names_every_option():
    result = CliRunner().invoke(main, ["compare", "--help"])
    for option in ("--backend", "--estimator", "--steps", "--seeds", "--out", "--particles", "--set", "--jobs"):
        assert option in result.output


def test_evaluation_steps_and_file_names():
    assert evaluation_steps(3, 20) == [0, 1, 2, 3]
    common = dict(script="a.py", digest="0", options={}, backend="pyro", estimator="score+loo", seed=0, steps=1)
    common |= dict(particles=2, batch_size=1, learning_rate=0.1, baseline_learning_rate=0.1)
    one = RunConfig(**common)
    # The path of the script does not decide the result, its content does.
    assert one.file == RunConfig(**{**common, "script": "b.py"}).file
    assert one.file != RunConfig(**{**common, "digest": "1"}).file
