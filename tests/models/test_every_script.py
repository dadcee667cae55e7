"""Every script of models/ runs under `pplgrad compare` and `pplgrad check`, in every library that it serves."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pplgrad.lab.cli import main
from pplgrad.lab.script import PROGRAMS, load_script
from pplgrad.lab.tasks import Task, perform

MODELS = Path(__file__).parents[2] / "models"
# Everything as small as it makes sense.
SIZES = {
    "architecture": {"train_images": 60, "epochs": 1},
    "attention": {"hidden": 4, "scorer": 4},
    "blackbox": {"population": 4},
    "boltzmann": {"side": 2},
    "cartpole": {"steps": 3, "hidden": 4},
    "categorical": {"variables": 2, "categories": 3, "hidden": 4},
    "change_points": {},
    "choice": {},
    "design": {},
    "dirichlet_process": {"components": 3},
    "feature_selection": {"chosen": 1},
    "gridworld": {"preferences": 2},
    "hmm": {"length": 4, "pieces": 20},
    "learning_to_rank": {"group": 2},
    "lottery": {},
    "mixed": {"classes": 3, "hidden": 4},
    "mixture": {},
    "molecules": {"length": 9, "hidden": 4},
    "n_mixture": {"places": 40},
    "offpolicy": {},
    "quadratic": {},
    "sbn": {"latents": 3},
    "scenes": {"most": 1, "scenes": 50, "components": 3, "hidden": 4},
    "semi_supervised": {"copies": 1, "style": 1, "strokes": 2, "hidden": 4},
    "spike_slab": {"features": 3},
    "state_space": {"series": 8, "length": 4},
    "summed_hmm": {"years": 8},
    "summed_mixture": {},
    "switching": {"series": 10, "length": 4},
    "telegraph": {"cells": 20},
    "topics": {"topics": 2, "vocabulary": 20, "length": 5, "batch": 4},
}
REWARDED = {"lottery", "quadratic", "choice", "offpolicy", "blackbox", "design", "cartpole", "gridworld", "molecules"}
REWARDED |= {"architecture", "attention", "learning_to_rank"}
SCRIPTS = sorted(path.stem for path in MODELS.glob("*.py") if "\nDISCRETE = " in path.read_text())
SERVED = [(name, b) for name in SCRIPTS for b in PROGRAMS if f"def {b}_program(" in (MODELS / f"{name}.py").read_text()]


def test_none_is_left_out():
    assert set(SIZES) == set(SCRIPTS), "give a new script's smallest options in SIZES"
    assert len(SERVED) == 2 * len(SCRIPTS)
    listed = (
        (MODELS / "README.md")
        .read_text()
        .partition("Where the reward is a `factor`")[2]
        .partition("the objective is")[0]
    )
    assert REWARDED == {word.strip("`(), \n") for word in listed.split()}


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), SERVED)
def test_compare_and_check(name, backend, tmp_path):
    path, target = MODELS / f"{name}.py", "Expectation()" if name in REWARDED else "ELBO()"
    script = load_script(path, (backend,))
    settings = dict(steps=1, points=1, learning_rate=1e-3, gradient_draws=2, bound_samples=0)
    common = dict(kind="training", script=str(path), digest=script.digest, options=script.options(SIZES[name]))
    common |= dict(backend=backend, estimator="score+loo", seed=0, particles=2, batch_size=4, objective=target)
    result = perform(Task(**common, settings=settings), tmp_path)
    assert "error" not in result, result["error"]
    assert np.isfinite([[point["train"], point["test"]] for point in result["curve"]]).all()
    assert np.isfinite(result["gradient_variance"])

    given = [word for option, value in SIZES[name].items() for word in ("--set", f"{option}={value}")]
    given += ["--backend", backend, "--objective", target, "--draws", "100", "--batch-size", "2"]
    # The plainest reference is the cheapest one where Pyro must follow every character from run to run.
    given += ["--reference", "whole"] if name == "molecules" else []
    checked = CliRunner().invoke(main, ["check", str(path), *given], catch_exceptions=False)
    # So few draws may not suffice for a verdict, and must not be one of bias.
    assert checked.exit_code in (0, 3), checked.output
    assert f"{backend}, TraceGrad_ELBO(2, " in checked.output
