"""The learned designs are the best ones, and the gradient with respect to a design is that of the exact information gain."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from pplgrad import Expectation, ScoreFunction
from pplgrad.lab.script import load_script
from pplgrad.numpyro import TraceGrad_ELBO
from tests.examples.stories import shown

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_the_best_designs_are_found(backend, tmp_path):
    text = shown("experiment_design", tmp_path / "a.png", "--backend", backend, "--steps", 250)
    found, best = re.search(r"new treatment: (\d+) \(best by the closed form: (\d+)\)", text).groups()
    assert found == best == "5"
    reached, maximum = map(float, re.search(r"there: ([\d.]+) nats \(best on the grid: ([\d.]+)\)", text).groups())
    # The first guess, 0.5 s, is worth 0.42 nats.
    assert maximum - 0.005 < reached <= maximum


@pytest.mark.slow
def test_the_gradient_of_a_continuous_design_is_that_of_the_exact_gain():
    script = load_script(ROOT / "models" / "design.py", ("numpyro",)).module
    options, step = {**script.OPTIONS, "problem": "decay"}, 1e-4
    around = script.information(options, np.exp(np.log(0.5) + np.array([-step, step])))
    exact = (around[1] - around[0]) / (2 * step)

    data = np.tile(script.RATES, 25)[:, None].astype(np.float32)
    model, guide = script.numpyro_program(options, data, 0)
    elbo = TraceGrad_ELBO(objective=Expectation(), estimators={"n": ScoreFunction()})
    gradient = jax.grad(lambda log_time, key: elbo.loss(key, {"log_time": log_time}, model, guide, data) / len(data))
    draws = -np.asarray(
        jax.vmap(gradient, (None, 0))(np.float32(np.log(0.5)), jax.random.split(jax.random.key(1), 2000))
    )
    error = draws.std() / np.sqrt(len(draws))
    assert error < 0.02 * exact and abs(draws.mean() - exact) < 3.5 * error
