"""The statistics of `assess_fit` by themselves: tails, limits, rates of false alarms, and rates over small fits."""

import numpy as np
import pytest

from pplgrad.assessment import calibration, weights


@pytest.mark.parametrize("shape", [0.3, 0.6, 1.0])
def test_k_is_that_of_the_tail(shape):
    rng = np.random.default_rng(0)
    logs = np.log1p(rng.pareto(1 / shape, (10_000, 5)))
    assert abs(weights.tail_shapes(logs).mean() - shape) < 0.1


def test_k_of_weights_without_a_tail():
    rng = np.random.default_rng(0)
    logs = np.stack([np.zeros(500), np.log(rng.choice([0.5, 2.0], 500)), np.full(500, -np.inf)], 1)
    assert np.isneginf(weights.tail_shapes(logs)).tolist() == [True, False, False]
    assert np.isnan(weights.tail_shapes(logs)).tolist() == [False, True, True]
    assert weights.effective_sizes(logs)[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("heavy", [0.3, 0.01, 0.001])
def test_the_limit_is_below_the_evidence_as_often_as_it_says(heavy):
    # A weight that is rare and large, of mean one: the bound itself is above the evidence in many runs.
    rng = np.random.default_rng(1)
    runs = np.log(np.where(rng.random((4000, 200)) < heavy, 0.9 / heavy + 0.1, 0.1))
    limits = np.array([weights.limit_below(run[:, None], 0.05) for run in runs])
    assert np.mean(limits > 0) <= 0.05
    bounds = np.array([weights.mean_weights(run[:, None])[0] for run in runs])
    assert np.mean(bounds > 0) > 0.15 and limits.mean() > -2.9


def test_false_alarms_of_calibration_and_checks_have_their_rates():
    from pplgrad.assessment.predictive import joint_p

    rng = np.random.default_rng(2)
    p = np.array([calibration.uniformity(rng.integers(0, 100, 150), 99) for _ in range(2000)])
    assert abs(np.mean(p < 0.05) - 0.05) < 0.02
    rows = rng.normal(size=(1000, 3, 200)).cumsum(1)
    joint = np.array([joint_p([(x[0], x[1:]) for x in run]) for run in rows])
    assert abs(np.mean(joint <= 0.05) - 0.05) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "passes"),
    [
        ("finite, exact posterior", True),
        ("Gaussian, exact posterior", True),
        ("finite, posterior mixed with its opposite", False),
        ("Gaussian, a fifth too narrow", False),
    ],
)
def test_exact_posteriors_pass_and_poor_guides_do_not(case, passes):
    from benchmarks.assessing import CASES, assessments

    rows = list(assessments(*CASES[case], 8))
    assert sum(found.passed for found, _ in rows) >= 7 if passes else not any(found.passed for found, _ in rows)
    assert all(found.evidence.limit <= exact + 1e-4 for found, exact in rows)
    known = [found.evidence.exact for found, _ in rows if found.evidence.exact is not None]
    if known:
        np.testing.assert_allclose(known, [exact for _, exact in rows], rtol=1e-5)
