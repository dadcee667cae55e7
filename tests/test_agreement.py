"""Given the same draws, the torch surrogate and the JAX surrogate have the same value and gradient."""

import jax
import numpy as np
import pyro
import pytest
import torch

from pplgrad import Constant, LeaveOneOut, OptimalConstant, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO as NumPyroELBO
from pplgrad.pyro import TraceGrad_ELBO as PyroELBO
from pplgrad.testing import in_numpyro, in_pyro
from pplgrad.testing.programs import CASES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Missing a plate statement")]
ESTIMATORS = {
    "default": None,
    "constant": ScoreFunction(Constant(0.3)),
    "constant+loo": ScoreFunction(Constant(0.3) + LeaveOneOut()),
    "optimal": ScoreFunction(OptimalConstant()),
}


def some_outcomes(case, particles):
    """Return a few tuples of outcomes, spread over all of them; a subsample is shared by the particles."""
    every = list(in_numpyro.outcomes(case))
    rng = np.random.default_rng(0)
    picked = [[every[i] for i in rng.integers(len(every), size=particles)] for _ in range(3)]
    return [[{**o, **{n: group[0][n] for n in case.subsamples}} for o in group] for group in picked]


def pyro_side(case, elbo, group):
    in_pyro.fresh(case)
    model, guide = case.build(in_pyro.HOST)
    with in_pyro.Force(group, case.noise), in_pyro.validated(case):
        loss = elbo.loss_and_grads(model, guide)
    return loss, in_pyro.gradient()


@pytest.mark.parametrize("kind", ["constant"])
@pytest.mark.parametrize("name", CASES)
def test_one_particle(name, kind):
    check(name, kind, 1)


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "constant+loo", "optimal"])
@pytest.mark.parametrize("name", ["hierarchy", "subsampled", "masked", "both_kinds_in_one_plate", "categorical_index"])
def test_three_particles(name, kind):
    check(name, kind, 3)


def check(name, kind, particles):
    case, estimator = CASES[name], ESTIMATORS[kind]
    chosen = None if estimator is None else dict.fromkeys(case.latents, estimator)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        groups = some_outcomes(case, particles)
        ours = [pyro_side(case, PyroELBO(particles, estimators=chosen), group) for group in groups]
    finally:
        torch.set_default_dtype(before)
        pyro.clear_param_store()
    with jax.enable_x64(True):
        model, guide = case.build(in_numpyro.HOST)
        elbo = NumPyroELBO(particles, estimators=chosen)

        def loss(params, draws):
            forced = in_numpyro.forced(guide, draws, case.noise, particles)
            return elbo.loss(jax.random.key(in_numpyro.KEY), params, model, forced)

        draws = in_numpyro.stacked([{n: np.stack([o[n] for o in g]) for n in g[0]} for g in groups])
        values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(in_numpyro.parameters(case), draws)
        values, grads = np.asarray(values), {n: np.asarray(g) for n, g in grads.items()}
    for i, (value, gradient) in enumerate(ours):
        np.testing.assert_allclose(values[i], value, rtol=1e-12)
        for n in case.params:
            np.testing.assert_allclose(grads[n][i], gradient[n], atol=1e-11)
