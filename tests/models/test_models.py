"""Each model script trains in both libraries, and its objective rises."""

from pathlib import Path

import numpy as np
import pytest

from pplgrad.lab.script import load_script
from pplgrad.lab.study import RunConfig, check_backend, perform

MODELS = Path(__file__).parents[2] / "models"
SMALL = {
    "sbn": [{"latents": 20}, {"latents": 10, "layers": 2, "nonlinear": True, "hidden": 16, "binarize": "dynamic"}],
    "mixed": [{"hidden": 32}],
    "mixture": [{}, {"data": "wine"}],
}
PROGRAMS = [(name, options) for name, several in SMALL.items() for options in several]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
@pytest.mark.parametrize(("name", "options"), PROGRAMS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(PROGRAMS)])
def test_objective_rises(name, options, backend, tmp_path):
    check_backend(backend)
    path = MODELS / f"{name}.py"
    script = load_script(path, (backend,))
    config = RunConfig(
        script=str(path),
        digest=script.digest,
        options=script.options({key: str(value) for key, value in options.items()}),
        backend=backend,
        estimator="score+loo",
        seed=0,
        steps=120,
        particles=2,
        batch_size=100,
        learning_rate=1e-2,
        baseline_learning_rate=1e-2,
        points=4,
        gradient_draws=4,
    )
    curve = perform(config, tmp_path)["curve"]
    assert np.isfinite(curve["train"]).all() and np.isfinite(curve["test"]).all()
    assert curve["train"][-1] > curve["train"][0] + 1
    assert curve["test"][-1] > curve["test"][0] + 0.3


def test_every_script_is_in_the_readme():
    text = (MODELS / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in MODELS.glob("*.py"))
