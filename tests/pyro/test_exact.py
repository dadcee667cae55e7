"""Every random outcome enumerated: the expected estimate is the gradient of the enumerated objective."""

import numpy as np
import pytest

from pplgrad import Constant, LeaveOneOut, OptimalConstant, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import assert_same, exact_gradient, expected_gradient, outcomes
from pplgrad.testing.programs import CASES

SMALL = [name for name, case in CASES.items() if len(list(outcomes(case))) <= 8 and not case.subsamples]
QUICK = ("hierarchy", "mixed", "event_in_plate", "masked")


def discrete(name, estimator):
    """Give the estimator to the discrete sites; continuous ones keep their default, reparameterization."""
    return dict.fromkeys(CASES[name].latents, estimator)


@pytest.mark.grid(together="exact in Pyro")
@pytest.mark.parametrize("estimator", [ScoreFunction(), ScoreFunction(Constant(-1.7))], ids=["score", "constant"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_one_particle(name, estimator):
    found = expected_gradient(CASES[name], lambda: TraceGrad_ELBO(estimators=discrete(name, estimator)), 1)
    assert_same(found, exact_gradient(CASES[name]))


# What is left out is refused: see test_errors.
@pytest.mark.grid(
    together="exact in Pyro", without=lambda name, vectorized, estimator: name == "batch_without_plate" and vectorized
)
@pytest.mark.parametrize("vectorized", [False, True], ids=["looped", "vectorized"])
@pytest.mark.parametrize(
    "estimator",
    [None, ScoreFunction(), ScoreFunction(OptimalConstant()), ScoreFunction(Constant(0.4) + LeaveOneOut())],
    ids=["default", "score", "optimal", "constant+loo"],
)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SMALL])
def test_two_particles(name, estimator, vectorized):
    def elbo():
        chosen = None if estimator is None else discrete(name, estimator)
        return TraceGrad_ELBO(2, vectorize_particles=vectorized, estimators=chosen)

    assert_same(expected_gradient(CASES[name], elbo, 2), exact_gradient(CASES[name]))


@pytest.mark.grid(together="exact in Pyro")
@pytest.mark.parametrize("vectorized", [False, True], ids=["looped", "vectorized"])
@pytest.mark.parametrize("name", ["single", "shared_parameter", "mixed", "both_kinds_in_one_plate"])
def test_three_particles(name, vectorized):
    def elbo():
        return TraceGrad_ELBO(3, vectorize_particles=vectorized)

    assert_same(expected_gradient(CASES[name], elbo, 3), exact_gradient(CASES[name]))


def test_subsample_gradient_is_the_full_data_gradient():
    """The mean over all subsamples is the gradient with the whole plate."""
    case = CASES["subsampled"]
    found = exact_gradient(case)
    everything = type(case)(case.name, case.params, {**case.latents, "z": ((3,), 2)}, case.build, case.noise, {})

    import pyro

    from pplgrad.testing.in_pyro import HOST
    from pplgrad.testing.programs import Host

    def plate(name, size, subsample_size=None, dim=None):
        return pyro.plate(name, size, dim=dim)

    full_host = Host(**{**vars(HOST), "plate": plate})
    whole = type(case)(case.name, case.params, everything.latents, lambda _: case.build(full_host), case.noise, {})
    for name, value in exact_gradient(whole).items():
        np.testing.assert_allclose(found[name], value, atol=1e-9)
