"""The policies are as good as dynamic programming's, and each level's gradient is that of the exact return."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from numpyro import handlers

from pplgrad import Expectation, ScoreFunction
from pplgrad.lab.script import load_script
from pplgrad.numpyro import TraceGrad_ELBO
from tests.examples.stories import shown

ROOT = Path(__file__).parents[2]


def script():
    return load_script(ROOT / "models" / "gridworld.py", ("numpyro", "pyro")).module


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "steps", "found"), [("pyro", 200, 3), ("numpyro", 300, 4)])
def test_the_front_is_found(backend, steps, found, tmp_path):
    text = shown("options_pareto", tmp_path / "a.png", "--backend", backend, "--steps", steps)
    # The best policy of a middling weight is worth 1.85, an even one −0.3.
    assert float(re.search(r"over all weights: ([\d.]+)", text)[1]) < 0.1
    assert int(re.search(r"policy finds: (\d) of 5", text)[1]) >= found
    for own, whole in re.findall(r"level .*: ([\d.e+]+) with its own credit, ([\d.e+]+) with", text):
        assert float(own) < float(whole)


def test_dynamic_programming_agrees_with_the_front():
    model = script()
    worth, time = model.front()
    for weight in np.linspace(0, 1, 41):
        assert np.isclose(model.best(weight), ((1 - weight) * worth - weight * time).max())


def expected_in_numpyro(model, options, params, outcomes):
    """Return E[estimate] of the gradient of the second preference's return, over the outcomes of all sites."""
    program, guide = model.numpyro_program(options, None, 0)
    with jax.enable_x64(True):
        x = np.array([[1.0]])
        elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, objective=Expectation())
        key = jax.random.key(0)

        def weighted(params, held, outcome):
            forced = handlers.substitute(guide, data={name: value[None] for name, value in outcome.items()})
            seeded = handlers.seed(handlers.substitute(forced, data=held), key)
            trace = handlers.trace(seeded).get_trace(x)
            log_q = sum(site["fn"].log_prob(site["value"]).sum() for name, site in trace.items() if name in outcome)
            return jax.numpy.exp(log_q) * elbo.loss(key, params, program, forced, x)

        gradients = jax.jit(jax.vmap(jax.grad(weighted), (None, None, 0)))(params, params, outcomes)
        return {name: -np.asarray(g).sum(0) for name, g in gradients.items()}


def expected_in_pyro(model, options, params, outcomes):
    """The same, with all outcomes in one run: a dive each, whose rewards count by its probability."""
    import pyro
    import torch

    from pplgrad.pyro import TraceGrad_ELBO as PyroELBO
    from pplgrad.testing.in_pyro import Force, array, fresh, gradient, isolated
    from pplgrad.testing.programs import Case

    with isolated():
        program, guide = model.pyro_program(options, None, 0)
        elbo = PyroELBO(estimators={"*": ScoreFunction()}, objective=Expectation())
        fresh(Case("gridworld", params, {}, None))
        x = array(np.ones((len(outcomes["move0"]), 1)))
        with Force([outcomes], {}), torch.no_grad():
            sites = pyro.poutine.trace(guide).get_trace(x).nodes
            probability = sum(sites[name]["fn"].log_prob(sites[name]["value"]) for name in outcomes).exp()
        with Force([outcomes], {}):
            elbo.loss_and_grads(pyro.poutine.scale(program, probability), guide, x)
        return {name: -value for name, value in gradient().items()}


@pytest.mark.slow
@pytest.mark.parametrize("expected", [expected_in_pyro, expected_in_numpyro], ids=["pyro", "numpyro"])
def test_credit_at_each_level_is_exact(expected):
    """Over all 1,024 episodes: the estimate's mean is the derivative of the exact return, at both levels."""
    model = script()
    options = {**model.OPTIONS, "preferences": 3, "ways": 2}
    rng = np.random.default_rng(0)
    cells = model.ROWS * model.COLUMNS
    params = {"upper": rng.normal(size=(3, 2, cells, 2)), "lower": rng.normal(size=(3, 2, cells, 2))}
    names = [name for t in range(model.STEPS) for name in ([f"option{t}"] * (t in (0, model.SECOND)) + [f"move{t}"])]
    outcomes = (np.arange(2 ** len(names))[:, None] >> np.arange(len(names))) & 1
    found = expected(model, options, params, dict(zip(names, outcomes.T, strict=True)))

    def value(params):
        upper, lower = model.probabilities(params)
        worth, time = model.returns(upper[1], lower[1])
        return 0.5 * worth - 0.5 * time

    step = 1e-5
    for name, table in params.items():
        for index in np.argwhere(np.abs(found[name]) > 1e-12)[::3]:
            shifted = [table.copy(), table.copy()]
            shifted[0][tuple(index)] -= step
            shifted[1][tuple(index)] += step
            low, high = (value({**params, name: moved}) for moved in shifted)
            assert abs((high - low) / (2 * step) - found[name][tuple(index)]) < 1e-8
        assert np.abs(found[name]).max() > 0.01
