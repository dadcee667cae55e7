"""What the exact numbers of a small filter say: which gradients are biased, and that they are labelled so."""

import numpy as np
import pytest

from pplgrad import FIVO
from pplgrad.engine.particle_filter import ParticleFilter
from tests import filtering as shared


@pytest.mark.parametrize("short", ["drop", "stop-gradient"])
def test_a_score_that_is_dropped_biases_the_gradient(short):
    objective, unbiased = shared.OBJECTIVES[short], shared.OBJECTIVES["score"]
    exact = shared.derivative(lambda p: shared.expected_bound(p, unbiased, 2))
    found = shared.derivative(lambda p: shared.expected_bound(p, objective, 2))
    assert max(abs(found[name] - exact[name]).max() for name in exact) > 0.01
    assert unbiased.unbiased and not objective.unbiased and shared.OBJECTIVES["never"].unbiased


@pytest.mark.parametrize("short", ["score", "sometimes", "systematic"])
def test_the_mean_is_the_evidence_and_the_bound_below_it(short):
    every = list(shared.outcomes(shared.PARAMS, shared.OBJECTIVES[short], 2, particles=3))
    exact = shared.evidence(shared.PARAMS, 2).real
    np.testing.assert_allclose(sum(o.probability.real * np.exp(o.bound.real) for o in every), exact, atol=1e-12)
    assert sum(o.probability.real * o.bound.real for o in every) < np.log(exact)


def test_a_particle_without_weight_has_no_descendants():
    """In single precision the last of a thousand positions is rounded to 1."""
    torch = pytest.importorskip("torch")
    from pplgrad.pyro._array_ops import OPS

    logs = torch.full((1, 1000), -torch.inf)
    logs[0, :10] = -np.log(10.0)
    found = ParticleFilter(OPS, FIVO(resampling="systematic"), 1, 1000)
    moved = found.resampled(logs, torch.tensor([[0.99999]]), torch.tensor([True]))
    assert moved.ancestors.max() == 9
