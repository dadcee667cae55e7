"""`pplgrad init`: scripts that run as they stand, with inputs and targets apart."""

import ast
import subprocess
import sys

import numpy as np
import pytest

from pplgrad.lab.cli_init import KINDS
from pplgrad.lab.results import read
from pplgrad.lab.script import load_script
from tests.covering import mostly
from tests.lab.test_crashes import BACKENDS, SCRIPT, told
from tests.lab.test_terminal import invoke, write


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_tidy_and_loads(tmp_path, kind):
    path = tmp_path / "my_model.py"
    result = invoke("init", path, "--kind", kind)
    assert result.exit_code == 0 and f"pplgrad check {path}" in result.stdout, result.output
    script = load_script(path, ())
    assert script.backends == tuple(BACKENDS)
    train, test = script.load(script.options({}), 0)
    assert set(train) == set(test) == {"inputs", "targets"} and len(train["inputs"]) == len(train["targets"])
    assert "pplgrad check my_model.py" in ast.get_docstring(ast.parse(path.read_text()))
    for command in (["check", "--line-length", "120"], ["format", "--check", "--line-length", "120"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", command[0], "--isolated", *command[1:], path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


# What the command line has no option for takes longest by default: the steps in which a baseline learns, and draws at the end. JAX compiles
# as many steps of the same estimator once, in training and for the snapshot.
STUDY = """
script = "my_model.py"
estimators = ["{0}"]
[gradients]
also = ["score+neural"]
trained_with = "{0}"
warm_up = 3
[training]
points = 1
gradient_draws = 4
"""


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_check_and_compare_run_on_what_is_written(tmp_path, kind, backend):
    path, out = tmp_path / "my_model.py", tmp_path / "out"
    # A script for one library, which is named nowhere after this.
    assert invoke("init", path, "--kind", kind, "--backend", backend).exit_code == 0
    assert load_script(path, ()).backends == (backend,)
    checked = invoke("check", path, "--draws", 100, "--batch-size", 2, "--estimator", KINDS[kind])
    assert checked.exit_code in (0, 3) and f"{backend}, TraceGrad_ELBO" in checked.stdout, checked.output
    study = write(tmp_path, STUDY.format(KINDS[kind]), "study.toml")
    small = ["--steps", 2, "--seeds", 1, "--bound-samples", 3, "--quiet", "--snapshots", "2", "--draws", 20]
    compared = invoke("compare", study, *small, "--out", out)
    assert compared.exit_code == 0, compared.output
    frame, _ = read(out)
    assert set(frame["backend"]) == {backend} and len(set(frame["estimator"])) == 2
    assert np.isfinite(frame.loc[frame["quantity"] == "test", "value"]).all()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly(["mixture", "time-series"], KINDS))
def test_training_improves_what_is_written_and_both_libraries_agree(tmp_path, kind):
    path, out = tmp_path / "my_model.py", tmp_path / "out"
    assert invoke("init", path, "--kind", kind).exit_code == 0
    small = ["--steps", 150, "--learning-rate", 0.03, "--seeds", 1, "--bound-samples", 0, "--quiet"]
    assert invoke("compare", path, "--estimator", "score+loo", *small, "--out", out).exit_code == 0
    frame, _ = read(out)
    curves = frame[(frame["quantity"] == "train")].sort_values("step").groupby("backend")["value"]
    first, last = curves.first(), curves.last()
    assert abs(first["pyro"] - first["numpyro"]) < 0.25 * abs(first["pyro"])
    assert (last > first).all() and abs(last["pyro"] - last["numpyro"]) < 0.25 * abs(last["pyro"])


def test_refusals(tmp_path):
    path = write(tmp_path)
    assert "is there already, and was left as it is" in told(invoke("init", path))[0] and path.read_text() == SCRIPT
    assert "write my_model.py" in told(invoke("init", "my_model"))[0]
    assert "cannot be written" in told(invoke("init", tmp_path / "no" / "where.py"))[0]
    assert invoke("init", tmp_path / "a.py", "--kind", "mixtur").exit_code == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learned_baseline_needs_one_array(tmp_path, backend):
    path = tmp_path / "my_model.py"
    assert invoke("init", path, "--backend", backend).exit_code == 0
    path.write_text(path.read_text().replace("def baseline_inputs", "def other_inputs"))
    small = ["--steps", 1, "--seeds", 1, "--quiet", "--bound-samples", 0, "--out", tmp_path / "out"]
    (line,) = told(invoke("compare", path, "--estimator", "score+neural", *small))
    assert "the batch is a dict of 'inputs', 'targets'; write baseline_inputs(x)" in line
