"""Baselines: the variance of each at its closed form, the optimal constant at its own."""

import re

import numpy as np
import pytest
from scipy import optimize

from pplgrad import Expectation, FunctionBaseline, OptimalConstant, Reparam, ScoreFunction
from tests.examples.stories import double_precision, from_ratio, model, part, shown, story_module

TARGETS = np.array([[0.4], [-1.0], [2.0], [0.0]])


@pytest.mark.slow
def test_the_optimal_constant_is_the_lowest_point():
    """E[f ‖s‖²] / E[‖s‖²] = −(d² + 13/3), by minimising the exact variance."""
    exact = story_module("baselines").exact
    for d in (0.0, -0.7, 2.0):
        least = optimize.minimize_scalar(lambda b, d=np.array([d]): exact(d, b), (-8.0, 0.0), tol=1e-12)
        assert abs(least.x + d**2 + 13 / 3) < 1e-6
    # For the mean's gradient alone, without a baseline: d⁴ + 14 d² + 15, and 2 d⁴ + 60 d² + 74 for log σ.
    assert abs(exact(np.array([2.0]), 0.0) - (16 + 56 + 15 + 32 + 240 + 74)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_what_a_baseline_leaves(backend):
    """Draw by draw (f − b) s, with b a function of the target."""
    script, targets = model("quadratic"), np.tile(TARGETS, (100, 1))
    start = {"mu": np.full(400, 0.5), "log_sigma": np.zeros(400)}
    baseline = FunctionBaseline(lambda c: -((0.5 - c[:, 0]) ** 2) - 13 / 3)
    with double_precision():
        program = getattr(script, f"{backend}_program")(script.OPTIONS, targets, 0, start)
        if backend == "numpyro":
            from pplgrad.numpyro import config_estimators

            program = program[0], config_estimators(program[1], {})
        choice = {"estimators": {"x": ScoreFunction(baseline)}, "objective": Expectation()}
        score = part("_draws").gradient(backend, program, targets, 5, **choice)
    d = 0.5 - targets[:, 0]
    e, error = from_ratio(
        score["log_sigma"] / score["mu"], lambda e: (-((d + e) ** 2) + d**2 + 13 / 3) * e - score["mu"]
    )
    assert error.max() < 1e-6
    assert abs(e.mean()) < 4.5 / np.sqrt(400) and abs(e.var() - 1) < 4.5 * np.sqrt(2 / 400)


@pytest.mark.slow
def test_the_optimal_constant_from_the_past():
    """After one step on many draws it subtracts their ratio, whose limit is the closed form."""
    import pyro
    import torch

    from pplgrad.pyro import TraceGrad_ELBO

    script, targets, d = model("quadratic"), np.full((40_000, 1), -0.2), 0.7
    start = {"mu": np.full(40_000, 0.5), "log_sigma": np.zeros(40_000)}
    with double_precision():
        program = script.pyro_program(script.OPTIONS, targets, 0, start)
        elbo = TraceGrad_ELBO(estimators={"x": ScoreFunction(OptimalConstant(0.5))}, objective=Expectation())
        path = part("_draws").gradient(
            "pyro", program, targets, 3, estimators={"x": Reparam()}, objective=Expectation()
        )
        pyro.clear_param_store()
        for seed in (2, 3):
            pyro.set_rng_seed(seed)
            for name in ("mu", "log_sigma"):
                if name in pyro.get_param_store()._params:
                    pyro.get_param_store()._params[name].grad = None
            elbo.loss_and_grads(*program, torch.as_tensor(targets))
        left = -pyro.get_param_store()._params["mu"].grad.numpy()
        pyro.clear_param_store()
    e = -path["mu"] / 2 - d
    subtracted = (-((d + e) ** 2) - left / e)[np.abs(e) > 0.1]
    assert np.ptp(subtracted) < 1e-6
    # The ratio's standard error, from its influence function E[(f − b*)² ‖s‖⁴]^½ / E[‖s‖²].
    square = e**2 + (e**2 - 1) ** 2
    error = ((-((d + e) ** 2) + d**2 + 13 / 3) * square).std() / 3 / np.sqrt(len(e))
    assert abs(subtracted[0] + d**2 + 13 / 3) < 4.5 * error < 1.0


@pytest.mark.slow
def test_story(tmp_path):
    text = shown("baselines", tmp_path / "a.png", "--steps", 200, DRAWS=1000)
    rows = re.findall(r"^(.+): variance × draws (\d+), closed form (\d+); (\w+)$", text, re.MULTILINE)
    assert len(rows) == 9 and all(row[-1] != "biased" for row in rows)
    found = {name: float(measured) for name, measured, _, _ in rows}
    assert all(abs(float(measured) / float(exact) - 1) < 0.35 for _, measured, exact, _ in rows)
    order = ["none", "constant: mean", "constant: optimal", "function: optimal"]
    assert all(found[a] > found[b] for a, b in zip(order, order[1:], strict=False))
    assert found["learned network"] < found["constant: mean"]
