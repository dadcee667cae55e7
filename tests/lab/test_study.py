"""Studies in TOML files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pplgrad.lab.data import unpacked
from pplgrad.lab.runner import Plan
from pplgrad.lab.script import ScriptError
from pplgrad.lab.study import Gradients, Study, from_toml
from pplgrad.lab.tasks import perform
from tests.lab.test_compare import refused

EXAMPLE = Path(__file__).parents[2] / "examples" / "study.toml"


def test_the_example_is_read_and_planned():
    study = from_toml(EXAMPLE)
    assert study.gradients.snapshots == (0, 100, 1000) and study.training.learning_rates == (1e-3, 3e-3)
    assert Path(study.script).is_file() and study.options == {"latents": 50}
    plan = Plan(study)
    # For each library and seed: snapshots, reference, four gradients, four trainings; and the search of four on the first seed.
    assert plan.total() == 2 * (3 * (1 + 1 + 4 + 4) + 4)
    assert plan.options["latents"] == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("script = 3 +", "is not TOML"),
        ("seeds = 2", "names no script"),
        ('script = "a.py"\ncolour = 1', "knows no 'colour'"),
        ('script = "a.py"\n[training]\nstep = 1', r"\[training\] knows no 'step'"),
        ('script = "a.py"\nseeds = "many"', "seeds is of type int"),
        ('script = "a.py"\nestimators = "DisARM()"', "estimators is a list"),
        ('script = "a.py"\nestimators = ["DisARM"]', "write DisARM"),
        ('script = "a.py"\nseeds = 0', "seeds = 0: give a whole number, 1 or more"),
        ('script = "a.py"\n[gradients]\nsnapshots = [-1]', "gradients.snapshots = -1"),
        ('script = "a.py"\ngradients = 3', "is a table"),
    ],
)
def test_what_a_study_gets_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(ScriptError, match=message):
        from_toml(path)


def test_a_study_that_is_not_there_is_one_sentence(tmp_path):
    assert "cannot be read" in refused(tmp_path / "none.toml")


@pytest.mark.slow
def test_a_study_runs_and_the_command_line_goes_before_it(tmp_path):
    from pplgrad.lab.results import read
    from tests.lab.test_compare import run

    given = [
        "--backend",
        "pyro",
        "--seeds",
        "1",
        "--steps",
        "4",
        "--snapshots",
        "0",
        "--draws",
        "20",
        "--set",
        "latents=4",
    ]
    result = run(EXAMPLE, *given, "--estimator", "score+loo", "--quiet", "--bound-samples", "0", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    frame, about = read(tmp_path)
    assert set(frame["estimator"]) == {"score+loo"} and set(frame["kind"]) == {"training", "gradients"}
    assert about["study"]["options"]["latents"] == "4" and about["study"]["training"]["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_gradient_descent_of_some_parameters(backend, tmp_path):
    """A parameter at rate 0 stays; at another it moves by the gradient per datum; the others follow Adam."""
    script = Path(__file__).parents[2] / "models" / "sbn.py"
    found = {}
    for rate in (0.0, 0.1, 0.2):
        study = Study(
            str(script),
            estimators=("score+loo",),
            backends=(backend,),
            options={"latents": "3"},
            seeds=1,
            gradients=Gradients(snapshots=(0, 1), draws=20, reference_draws=20, trained_with="score+loo"),
            training=None,
            gradient_descent={"prior": rate},
        )
        plan = Plan(study)
        result = perform(plan.snapshots(backend, 0), tmp_path)
        assert "error" not in result, result["error"]
        values = [unpacked(result["snapshots"][step]) for step in ("0", "1")]
        found[rate] = {name: values[1][name] - values[0][name] for name in values[0]}
    assert (found[0.0]["prior"] == 0).all() and (found[0.1]["prior"] != 0).all()
    np.testing.assert_allclose(found[0.2]["prior"], 2 * found[0.1]["prior"], rtol=1e-3)
    # Adam's first step is the rate in each coordinate.
    np.testing.assert_allclose(np.abs(found[0.1]["decode0_b0"]), 3e-3, rtol=1e-2)
    bad = perform(Plan(replace(study, gradient_descent={"priors": 0.1})).snapshots(backend, 0), tmp_path)
    assert "[gradient_descent] names 'priors', which is no parameter; the parameters are: " in bad["error"]


def test_a_negative_rate_is_refused():
    with pytest.raises(ScriptError, match="gradient_descent.prior = -1: give a rate, 0 or more"):
        Study("a.py", gradient_descent={"prior": -1})
