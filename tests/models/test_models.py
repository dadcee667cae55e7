"""Each model script trains in both libraries, and its objective rises."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pplgrad.lab.results import failures, read
from pplgrad.lab.runner import Plan
from pplgrad.lab.script import ScriptError, load_script
from pplgrad.lab.study import from_toml
from pplgrad.lab.tasks import Task, perform
from tests.lab.test_compare import run

MODELS = Path(__file__).parents[2] / "models"
SMALL = {
    "sbn": [{"latents": 20}, {"latents": 10, "layers": 2, "nonlinear": True, "hidden": 16, "binarize": "dynamic"}],
    "mixed": [{"hidden": 32}],
    "categorical": [{"variables": 6, "categories": 4, "hidden": 32}],
    "mixture": [{}, {"data": "wine"}],
    "telegraph": [{"cells": 300}],
    "dirichlet_process": [{}],
    "switching": [{"length": 6}],
    "hmm": [{"length": 6, "pieces": 40}],
    "summed_mixture": [{}, {"assignments": "sampled"}],
    "summed_hmm": [{"years": 24}, {"years": 24, "chain": "sampled"}],
    "semi_supervised": [{"hidden": 32}],
}
# Those of few parameters learn faster, and have less to gain: how much at least, of train and test data, in nats a datum.
FAST = {"telegraph", "dirichlet_process", "switching", "hmm", "summed_hmm"}
GAINS = {"summed_hmm": (0.02, 0), "telegraph": (0.4, 0.3), "dirichlet_process": (0.6, 0.6)}
PROGRAMS = [(name, options) for name, several in SMALL.items() for options in several]


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
@pytest.mark.parametrize(("name", "options"), PROGRAMS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(PROGRAMS)])
def test_objective_rises(name, options, backend, tmp_path):
    path = MODELS / f"{name}.py"
    script = load_script(path, (backend,))
    rate = 3e-2 if name in FAST else 1e-2
    settings = dict(steps=120, points=4, learning_rate=rate, gradient_draws=0, bound_samples=0)
    common = dict(kind="training", script=str(path), digest=script.digest, options=script.options(options))
    common |= dict(backend=backend, estimator="score+loo", seed=0, particles=2, batch_size=100, objective="ELBO()")
    result = perform(Task(**common, settings=settings), tmp_path)
    assert "error" not in result, result["error"]
    curve = {which: [point[which] for point in result["curve"]] for which in ("train", "test")}
    assert np.isfinite(curve["train"]).all() and np.isfinite(curve["test"]).all()
    for which, gain in zip(curve, GAINS.get(name, (1, 0.3)), strict=True):
        assert curve[which][-1] > curve[which][0] + gain, which


def test_every_script_is_in_the_readme():
    text = (MODELS / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in MODELS.glob("*.py"))


FASHION = Path("/usr/share/datasets/fashion-mnist")
STUDIES = sorted((MODELS.parent / "studies").glob("*_20*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_a_published_study_is_planned_on_the_digits(path):
    study = from_toml(path)
    fashion = path.stem.endswith("_fashion")
    assert study.training.steps == (200_000 if fashion else 1_000_000) and study.gradients is not None
    plan = Plan(replace(study, options={**study.options, "data": "digits", "held_back": 0}))
    assert plan.total() > 10
    if not fashion or not (FASHION / "train-images-idx3-ubyte.gz").exists():
        with pytest.raises(ScriptError, match="no data at '.*mnist'; give the path of a local copy"):
            Plan(study)


def test_what_is_measured_and_does_not_train_is_planned():
    study = from_toml(MODELS.parent / "studies" / "arms_2021_linear_fashion.toml")
    plan = Plan(replace(study, options={**study.options, "data": "digits", "held_back": 0}, seeds=2))
    trained, measured = ({estimator for _, estimator, _ in runs} for runs in (plan.runs(), plan.measurements()))
    assert measured - trained == {"LocalExpectation() @ 1"} and len(list(plan.measurements())) == 2 * len(measured)
    assert plan.total() == 2 * (2 + len(measured) + len(trained))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vimco_2016", "coupled_2021", "rodeo_2022_nonlinear"])
def test_a_published_study_runs_on_the_digits(name, tmp_path):
    small = [
        "--data",
        "digits",
        "--backend",
        "pyro",
        "--seeds",
        "1",
        "--steps",
        "3",
        "--snapshots",
        "0",
        "--draws",
        "20",
    ]
    sizes = ["variables=3", "categories=4"] if name == "coupled_2021" else ["latents=6"]
    sizes = [word for size in [*sizes, "hidden=8"] for word in ("--set", size)]
    given = [
        MODELS.parent / "studies" / f"{name}.toml",
        *small,
        *sizes,
        "--learning-rate",
        "1e-3",
        "--bound-samples",
        "3",
    ]
    result = run(*given, "--quiet", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    frame, _ = read(tmp_path)
    assert failures(frame).empty, failures(frame).to_string()
