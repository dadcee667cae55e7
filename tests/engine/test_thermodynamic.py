"""The thermodynamic variational objective in plain arrays: the limit of many particles, and the ends of its intervals."""

import numpy as np
import pytest

from pplgrad import TVO, ConfigurationError
from tests import thermodynamic as shared

Q = np.array([0.25, 0.5, 0.25])
P = np.array([0.3, 0.1, 0.05])
SLOPES_Q = np.array([[0.4, -0.1], [-0.3, 0.2], [0.2, -0.3]])
SLOPES_P = np.array([[1.0, 0.2], [-0.7, 0.1], [0.5, 0.9]])


@pytest.mark.parametrize("short", shared.OBJECTIVES)
def test_many_particles_are_the_exact_expectations(short):
    """A sample in which every outcome has exactly its share."""
    picked = np.repeat(np.arange(3), [250_000, 500_000, 250_000])
    logs = np.log(P / Q)[picked]
    objective = shared.OBJECTIVES[short]
    of_model, of_guide, of_weight, of_draws = objective.density_shares(np, logs, 0)
    ends = zip(shared.ENDS[short], shared.SIZES[short], strict=True)
    value, by_q, by_p = shared.limit(Q, P, SLOPES_Q - Q @ SLOPES_Q, SLOPES_P, short)
    np.testing.assert_allclose(objective.bound(np, logs, 0), value, atol=1e-9)
    np.testing.assert_allclose(of_model @ SLOPES_P[picked], by_p, atol=1e-5)
    np.testing.assert_allclose(of_weight, -sum(size for end, size in ends if end == 0) / len(logs))
    np.testing.assert_allclose((of_guide + of_draws) @ (SLOPES_Q - Q @ SLOPES_Q)[picked], by_q, atol=1e-5)


@pytest.mark.parametrize("short", shared.OBJECTIVES)
def test_the_covariance_form_is_the_derivative(short):
    logits, step = np.array([0.3, -0.2, 0.1]), 1e-5

    def value(logits, p):
        q = np.exp(logits) / np.exp(logits).sum()
        return shared.limit(q, p, np.eye(3) - q, np.eye(3), short)

    _, by_q, by_p = value(logits, P)
    for i in range(3):
        apart = step * np.eye(3)[i]
        by_logit = (value(logits + apart, P)[0] - value(logits - apart, P)[0]) / (2 * step)
        by_log_p = (value(logits, P * np.exp(apart))[0] - value(logits, P * np.exp(-apart))[0]) / (2 * step)
        np.testing.assert_allclose([by_q[i], by_p[i]], [by_logit, by_log_p], atol=1e-8)


def test_bounds_close_on_the_evidence():
    logs = np.log(P / Q)[np.repeat(np.arange(3), [25, 50, 25])]
    evidence = np.log(P.sum())
    apart = []
    for count in (2, 8, 64):
        low, high = (TVO(count, first=0.01, upper=upper).bound(np, logs, 0) for upper in (False, True))
        assert low < evidence < high
        apart.append(high - low)
    assert apart[0] > apart[1] > apart[2]


def test_weights_of_zero_have_no_part():
    logs = np.array([0.3, -np.inf, -1.0])
    objective = TVO((0.0, 0.5, 1.0), upper=True)
    np.testing.assert_allclose(objective.bound(np, logs, 0), objective.bound(np, logs[[0, 2]], 0))
    assert all(np.isfinite(x).all() for x in objective.density_shares(np, logs, 0))


@pytest.mark.parametrize(
    "given",
    [
        {"partitions": 0},
        {"partitions": True},
        {"partitions": "many"},
        {"partitions": (0.1, 1.0)},
        {"partitions": (0.0, 0.6, 0.5, 1.0)},
        {"partitions": (0.0,)},
        {"partitions": (0, "half", 1)},
        {"first": 1.0},
        {"first": "small"},
        {"first": None},
        {"samples": 0},
        {"samples": True},
        {"plates": "data"},
    ],
)
def test_settings_are_refused(given):
    with pytest.raises(ConfigurationError, match="TVO"):
        TVO(**given)


def test_lists_of_ends_are_taken():
    assert TVO([0, 0.5, 1]).ends == (0.0, 0.5, 1.0)
    assert TVO(1).ends == (0.0, 1.0)
    assert hash(TVO([0, 1])) == hash(TVO((0, 1)))
