"""A study's training run that is killed goes on from its last point; one with patience stops on rows that are held back."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pplgrad.lab.data import Batches
from pplgrad.lab.runner import Plan
from pplgrad.lab.script import ScriptError
from pplgrad.lab.study import Study, Training, from_toml
from pplgrad.lab.tasks import perform
from tests.lab.processes import forks
from tests.lab.test_crashes import SCRIPT

BACKENDS = ["pyro", "numpyro"]
# A script that ends its process at a call of `prepare`, as a machine that fails would.
KILLING = """
    import os, signal, pathlib
    file = pathlib.Path(os.environ.get("KILL_AT", "/none"))
    if file.exists():
        left = int(file.read_text()) - 1
        file.write_text(str(left))
        if left == 0:
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    return batch
"""


def plan_of(folder, backend, estimator="score+neural", text=SCRIPT, **training):
    path = folder / "model.py"
    path.write_text(text)
    known = {"steps": 24, "points": 6, "gradient_draws": 4, "bound_samples": 5, **training}
    return Plan(Study(str(path), (estimator,), (backend,), seeds=1, batch_size=4, training=Training(**known)))


def task_of(plan):
    (backend, estimator, seed) = next(plan.runs())
    return plan.training(backend, seed, estimator, plan.study.training.learning_rates[0])


def numbers(result):
    """Return a result without its times."""
    curve = [{k: v for k, v in point.items() if k != "seconds"} for point in result["curve"]]
    return curve, {k: result.get(k) for k in ("gradient_variance", "weighted_bound", "stopped", "best_step")}


def perform_killing(folder, backend, estimator, patience):
    """Train with a script that may end the process."""
    text = SCRIPT.replace("    return batch\n", KILLING)
    plan = plan_of(Path(folder), backend, estimator, text, patience=int(patience), steps=12, points=3)
    perform(task_of(plan), Path(folder))


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("patience", [0, 5])
@pytest.mark.parametrize("estimator", ["score+neural", "REBAR()"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_goes_on(backend, estimator, patience, tmp_path):
    results = []
    with forks(__name__, perform_killing.__name__, f"pplgrad.lab.run_{backend}") as call:
        for kill in (False, True):
            folder = tmp_path / str(kill)
            folder.mkdir()
            # Past the second point, of which the third call for a batch of each part of the data is.
            (folder / "kill").write_text("12")
            given = folder, backend, estimator, str(patience)
            env = {"KILL_AT": str(folder / "kill")} if kill else {}
            assert call(*given, **env) == (-signal.SIGKILL if kill else 0)
            if kill:
                assert list(folder.glob("*.checkpoint.npz")) and not list(folder.glob("*.json"))
                assert call(*given, **env) == 0
            assert not list(folder.glob("*.checkpoint.npz"))
            (found,) = folder.glob("*.json")
            results.append(json.loads(found.read_text()))
    assert "error" not in results[0] and numbers(results[0]) == numbers(results[1])
    # It was not done anew: the time of the first part is in the second's.
    assert len(results[1]["curve"]) >= 3


@pytest.mark.slow
def test_patience_stops_on_rows_that_are_held_back(tmp_path):
    found = []
    for backend in BACKENDS:
        # At this rate the first steps are the best.
        plan = plan_of(tmp_path, backend, patience=1, validation=0.25, learning_rates=(2.0,))
        result = perform(task_of(plan), None)
        bounds = [point["validation"] for point in result["curve"]]
        assert result["stopped"] and len(bounds) < 7
        best = int(np.argmax(bounds))
        assert len(bounds) == best + 2 and result["best_step"] == result["curve"][best]["step"]
        batches = Batches(task_of(plan), plan.script)
        found.append(batches)
        assert len(batches.validation) == 3 and len(batches.train) == 9
        rows = {tuple(x) for x in batches.train}
        assert not any(tuple(x) in rows for x in batches.validation)
    np.testing.assert_array_equal(found[0].validation, found[1].validation)
    # A change that is asked for and never comes stops at once.
    plan = plan_of(tmp_path, "pyro", patience=1, minimum_change=1e9)
    assert len(perform(task_of(plan), None)["curve"]) == 2


def test_settings_of_patience(tmp_path):
    plan = plan_of(tmp_path, "pyro")
    assert not {"patience", "validation"} & task_of(plan).settings.keys(), "results of before keep their names"
    assert not {"patience", "validation"} & plan.study.to_dict()["training"].keys()
    study = tmp_path / "study.toml"
    study.write_text('script = "model.py"\n[training]\npatience = 3\nvalidation = 0.2\nminimum_change = 0.01')
    assert from_toml(study).training == Training(patience=3, validation=0.2, minimum_change=0.01)
    for wrong in ({"patience": -1}, {"validation": 1.0}, {"minimum_change": -1.0}):
        with pytest.raises(ScriptError, match=f"training.{next(iter(wrong))}"):
            replace(plan.study, training=Training(**wrong))
    plan = plan_of(tmp_path, "pyro", text=SCRIPT + "\nWHOLE_DATA = True\n", patience=1)
    assert "rows of the training data that can be held back" in perform(task_of(plan), None)["error"]
