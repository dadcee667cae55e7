"""Elements drawn without replacement: the probability of each is exact, and none is drawn twice."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from pplgrad.estimators.element_sampling import inclusion_probabilities, systematic

SIZES = {
    "equal": np.ones(5),
    "some": np.array([0.1, 0.4, 0.2, 0.9, 0.6]),
    "one is large": np.array([0.1, 100.0, 0.2, 0.1, 0.3]),
    "two are large": np.array([50.0, 0.1, 100.0, 0.2, 0.1]),
    "as many as are large": np.array([1e-9, 1.0, 1e-9, 1.0, 1e-9]),
}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", SIZES)
def test_probabilities_are_proportional_up_to_one(name, count):
    sizes = SIZES[name]
    found = inclusion_probabilities(xp, sizes[None], count)[0]
    assert np.all((found > 0) & (found <= 1)) and abs(found.sum() - count) < 1e-12
    free = found < 1
    ratios = found[free] / sizes[free]
    np.testing.assert_allclose(ratios, ratios[:1].repeat(len(ratios)), rtol=1e-9)
    assert np.all(found[~free] <= sizes[~free] * (ratios.max() if free.any() else np.inf) * (1 + 1e-9))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", SIZES)
def test_each_is_drawn_with_its_probability(name, count):
    """What is drawn changes only where the uniform number passes an end, so that the mean over it is a finite sum."""
    wanted = inclusion_probabilities(xp, SIZES[name][None], count)[0]
    ends = np.unique(np.concatenate([[0.0], np.cumsum(wanted) % 1, [1.0]]))
    found = np.zeros(5)
    for low, high in zip(ends[:-1], ends[1:], strict=True):
        chosen = systematic(xp, wanted[None], np.array([(low + high) / 2]), np.arange(count))[0]
        assert len(set(chosen.tolist())) == count or high - low < 1e-12
        found[chosen] += high - low
    np.testing.assert_allclose(found, wanted, atol=1e-9)
