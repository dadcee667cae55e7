"""`pplgrad assess`: verdicts as exit codes, JSON, and one sentence for what cannot be assessed."""

import json

import pytest
from click.testing import CliRunner

from pplgrad.lab.cli import main

SCRIPT = """
import numpy as np

OPTIONS = {"wrong": 0.0, "scaled": 0}
DISCRETE = ("z",)


def load(options, seed):
    rng = np.random.default_rng(seed)
    return (rng.random(40) < 0.5).astype(np.float32), (rng.random(20) < 0.5).astype(np.float32)


def program(ppl, handlers, dist, array, options):
    def model(x):
        with ppl.plate("data", len(x)):
            with handlers.scale(scale=2.0 if options["scaled"] else 1.0):
                z = ppl.sample("z", dist.Bernoulli(array(0.5)))
            ppl.sample("x", dist.Bernoulli(0.2 + 0.6 * z), obs=x)

    def guide(x):
        shift = ppl.param("shift", array(0.0))
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.Bernoulli(0.2 + 0.0 * shift + (0.6 - options["wrong"]) * x))

    return model, guide


def pyro_program(options, train, seed):
    import pyro
    import pyro.distributions as dist
    import torch

    return program(pyro, pyro.poutine, dist, torch.tensor, options)


def numpyro_program(options, train, seed):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, numpyro.handlers, dist, jnp.asarray, options)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(SCRIPT)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(main, ["assess", *arguments])


@pytest.mark.slow
def test_a_fit_passes_in_both_libraries(script):
    result = run(script, "--samples", "100", "--simulations", "20", "--batch-size", "30", "--data", "test", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["backend"] for row in rows] == ["pyro", "numpyro"]
    for row in rows:
        assert row["passed"] and row["evidence"]["exact"] == pytest.approx(20 * -0.6931472, rel=1e-4)
        assert row["calibration"][0]["ranks"] == 400


@pytest.mark.slow
def test_a_poor_fit_after_training_has_its_own_exit_code(script):
    given = ("--backend", "pyro", "--steps", "3", "--set", "wrong=0.55", "--samples", "100", "--simulations", "30")
    result = run(script, *given)
    assert result.exit_code == 1 and "The fit is poor" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_what_cannot_be_assessed_is_one_sentence_with_its_line(script):
    result = run(script, "--set", "scaled=1")
    assert result.exit_code == 2
    assert result.stderr.count("Site 'z' is scaled") == 1 and "program.py:" in result.stderr
    assert run(script, "--samples", "10").exit_code == 2
    assert run(script, "--estimator", "DisArm()").exit_code == 2
