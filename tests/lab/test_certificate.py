"""The statistics of `check_gradients` on draws whose bias is known."""

import json

import numpy as np
import pytest

from pplgrad import ConfigurationError
from pplgrad.diagnostics.certificate import Reference, certify
from pplgrad.diagnostics.moments import Moments, squared_norm

SIZE = 50
EXACT = np.linspace(-1, 1, SIZE)
BLOCKS = {("parameter", "a"): np.arange(30), ("parameter", "b"): np.arange(30, SIZE), ("site", "z"): np.arange(10)}


def noisy(mean, spread=1.0, skewed=False):
    """Return draws around a mean, in chunks; skewed ones have the tail of a squared normal."""

    def draws(count, seed):
        rng = np.random.default_rng(seed)
        for start in range(0, count, 64):
            noise = rng.normal(size=(min(64, count - start), SIZE))
            yield mean + spread * ((noise**2 - 1) / 2**0.5 if skewed else noise)

    return draws


def certificate(draws, reference=None, **given):
    settings = dict(count=2000, level=0.01, tolerance=0.1, rounding=1e-6, seed=0) | given
    return certify("it", draws, reference or Reference("the truth", exact=EXACT), BLOCKS, **settings)


def test_an_unbiased_one_is_told_so_with_numbers():
    found = certificate(noisy(EXACT, 0.1))
    assert found.status == "unbiased" and found.verdict.startswith("unbiased to within")
    program = found.rows[0]
    assert program.gradient == pytest.approx(np.linalg.norm(EXACT))
    assert program.variance == pytest.approx(SIZE * 0.01, rel=0.05)
    assert program.signal_to_noise == pytest.approx(np.linalg.norm(EXACT) / (SIZE * 0.01) ** 0.5, rel=0.05)
    assert [row.name for row in found.rows] == ["all parameters", "a", "b", "z"]
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["kind"] == "parameter"
    assert "unbiased to within" in str(found) and "signal/noise" in str(found)


@pytest.mark.parametrize("reference", ["exact", "draws"])
@pytest.mark.parametrize("where", ["one", "everywhere", "twice"])
def test_a_biased_one_is_found_wherever_its_bias_lies(where, reference):
    bias = {"one": np.eye(SIZE)[3] * 0.3, "everywhere": np.full(SIZE, 0.1), "twice": EXACT}[where]
    against = None if reference == "exact" else Reference("others", draws=noisy(EXACT))
    found = certificate(noisy(EXACT + bias), against, count=4000)
    assert found.status == "biased" and found.verdict.startswith("biased: off by")
    rows = {row.name: row for row in found.rows}
    assert rows["a"].status == "biased"
    wanted = np.linalg.norm(bias[:30])
    assert rows["a"].bias_low < wanted < rows["a"].bias_high
    if where == "one":
        assert rows["b"].status != "biased" and rows["z"].status == "biased"
    if where == "twice":
        assert found.rows[0].ratio == pytest.approx(2, abs=0.1) and "times the gradient" in found.rows[0].verdict


def test_too_few_draws_are_told_with_how_many_are_needed():
    found = certificate(noisy(EXACT, 30.0), count=200)
    assert found.status == "unknown"
    needed = int(found.verdict.split("about ")[1].split()[0].replace(",", ""))
    assert certificate(noisy(EXACT, 30.0), count=2 * needed).status == "unbiased"


def test_rounding_is_no_bias_and_more_is():
    assert certificate(noisy(EXACT * (1 + 1e-7), 0.0)).status == "unbiased"
    assert certificate(noisy(EXACT * (1 + 1e-4), 0.0)).status == "biased"


def test_draws_that_are_not_finite_are_counted():
    def draws(count, seed):
        for number, chunk in enumerate(noisy(EXACT)(count, seed)):
            if number == 1:
                chunk[0, 0] = np.nan
            yield chunk

    found = certificate(draws)
    assert found.status == "broken" and "2 of 2,000 draws are NaN or infinite" in found.verdict


def test_a_gradient_of_zero_has_no_norm_to_compare_with():
    zero = Reference("the truth", exact=np.zeros(SIZE))
    assert "where the gradient is 0" in certificate(noisy(np.zeros(SIZE)), zero).verdict
    assert "where the gradient is 0" in certificate(noisy(np.full(SIZE, 0.2)), zero).rows[0].verdict


@pytest.mark.parametrize("wrong", [dict(count=10), dict(level=0.0), dict(tolerance=0.0)])
def test_numbers_that_certify_nothing_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        certificate(noisy(EXACT), **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("reference", ["exact", "draws"])
def test_false_alarms_are_rarer_than_stated(skewed, reference):
    """200 correct estimators at a stated rate of 5%: 10 alarms expected if the rate were used up."""
    against = None if reference == "exact" else Reference("others", draws=noisy(EXACT, skewed=skewed))
    states = [
        certificate(noisy(EXACT, skewed=skewed), against, count=400, level=0.05, seed=10 * seed).status
        for seed in range(200)
    ]
    assert states.count("biased") <= 10


@pytest.mark.slow
def test_the_interval_holds_the_bias_as_often_as_stated():
    bias = np.full(SIZE, 0.05)
    held = 0
    for seed in range(200):
        row = certificate(noisy(EXACT + bias), count=2000, level=0.05, seed=10 * seed).rows[0]
        held += row.bias_low <= np.linalg.norm(bias) <= row.bias_high
    assert held >= 180


def test_moments_are_those_of_the_draws():
    rows = np.random.default_rng(0).normal(3.0, 2.0, (1000, 4))
    found = Moments(iter(np.array_split(rows, 7)), 1000, np.eye(4)[:, :2])
    np.testing.assert_allclose(found.mean, rows.mean(0))
    np.testing.assert_allclose(found.variance, rows.var(0, ddof=1))
    np.testing.assert_allclose(found.batches, rows.reshape(20, 50, 4).mean(1))
    np.testing.assert_allclose(found.projections, rows[:, :2])


def test_squared_norm_is_unbiased_where_the_plain_one_is_not():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, 10, 30)) + 0.1
    found = np.array([squared_norm(row)[0] for row in rows])
    plain = (rows.mean(1) ** 2).sum(1)
    assert found.mean() == pytest.approx(0.3, abs=0.05) and plain.mean() > 3
    # Its standard error errs on the side of the larger of two.
    assert found.std() < np.mean([squared_norm(row)[1] for row in rows[:300]]) < 1.5 * found.std()
