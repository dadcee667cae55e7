"""Every random outcome enumerated: the expected estimate is the gradient of the enumerated objective."""

import jax
import jax.numpy as jnp
import pytest

from pplgrad import Constant, LeaveOneOut, OptimalConstant, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import assert_same, exact_gradient, expected_gradient, outcomes
from pplgrad.testing.programs import CASES

SMALL = [name for name, case in CASES.items() if len(list(outcomes(case))) <= 8 and not case.subsamples]
QUICK = ("hierarchy", "mixed", "subsampled", "event_in_plate")
# NumPyro warns of batch dimensions that no plate declares; the gradient is right all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Missing a plate statement")


def discrete(name, estimator):
    """Give the estimator to the discrete sites; continuous ones keep their default, reparameterization."""
    return dict.fromkeys(CASES[name].latents, estimator)


@pytest.mark.grid(together="exact in NumPyro")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_one_particle(name):
    elbo = TraceGrad_ELBO(estimators=discrete(name, ScoreFunction(Constant(-1.7))))
    assert_same(expected_gradient(CASES[name], elbo, 1), exact_gradient(CASES[name]))


@pytest.mark.grid(together="exact in NumPyro")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_particle_by_default(name):
    assert_same(expected_gradient(CASES[name], TraceGrad_ELBO(), 1), exact_gradient(CASES[name]))


def by_hand(f, keys):
    """Map over particles with a function of the user's."""
    results = [f(key) for key in keys]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *results)


MAPS = {"vmap": True, "lax.map": False, "function": by_hand}


@pytest.mark.grid(together="exact in NumPyro")
@pytest.mark.slow
@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize(
    "estimator",
    [None, ScoreFunction(OptimalConstant()), ScoreFunction(Constant(0.4) + LeaveOneOut())],
    ids=["default", "optimal", "constant+loo"],
)
@pytest.mark.parametrize("name", ["hierarchy", "mixed", "both_kinds_in_one_plate", "batch_without_plate"])
def test_two_particles(name, estimator, how):
    chosen = None if estimator is None else discrete(name, estimator)
    elbo = TraceGrad_ELBO(2, vectorize_particles=MAPS[how], estimators=chosen)
    assert_same(expected_gradient(CASES[name], elbo, 2), exact_gradient(CASES[name]))


@pytest.mark.grid(together="exact in NumPyro")
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_two_particles_by_default(name):
    elbo = TraceGrad_ELBO(2)
    assert_same(expected_gradient(CASES[name], elbo, 2), exact_gradient(CASES[name]))


@pytest.mark.grid(together="exact in NumPyro")
@pytest.mark.slow
@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("name", ["single", "both_kinds_in_one_plate"])
def test_three_particles(name, how):
    elbo = TraceGrad_ELBO(3, vectorize_particles=MAPS[how])
    assert_same(expected_gradient(CASES[name], elbo, 3), exact_gradient(CASES[name]))
