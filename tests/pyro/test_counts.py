"""Estimators of counts: exact over a support that is cut off where sums in float64 end, and what is refused."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import IWAE, Auto, CountDifference, EstimatorError, Expectation, LeaveOneOut, ScoreFunction, SumAndSample
from pplgrad.core.draw import Draw
from pplgrad.errors import PplgradError
from pplgrad.pyro import TraceGrad_ELBO, check_gradients
from pplgrad.testing import gradient_error
from pplgrad.testing.counting import COUNTING, VECTORS
from pplgrad.testing.in_pyro import (
    HOST,
    Force,
    assert_same,
    exact_bound_gradient,
    exact_gradient,
    expected_gradient_over_cells,
    fresh,
    gradient,
)
from tests.bounds import bound
from tests.counting import AT, BEYOND, CLOSED, MUTANTS, WIDE, at_every_count, exact_cases, rewritten


def objective(case, estimator, particles=1, vectorized=False, **options):
    chosen = dict.fromkeys(case.latents, estimator)
    return TraceGrad_ELBO(particles, vectorize_particles=vectorized, max_plate_nesting=1, estimators=chosen, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "name"), exact_cases())
def test_exact(estimator, name):
    assert gradient_error(estimator, "pyro", name) < 1e-9


@pytest.mark.parametrize("name", ["counts_inflated", pytest.param("counts_totals", marks=pytest.mark.exhaustive)])
def test_two_particles_exact(name):
    case = COUNTING[name]
    found = expected_gradient_over_cells(case, lambda: objective(case, CountDifference(2), 2, True), 2)
    assert_same(found, exact_gradient(case))


@pytest.mark.parametrize("name", ["counts_between", pytest.param("counts_event", marks=pytest.mark.exhaustive)])
def test_branches_at_once_exact(name):
    case = COUNTING[name]
    found = expected_gradient_over_cells(case, lambda: objective(case, CountDifference(), 1, True), 1)
    assert_same(found, exact_gradient(case))


@pytest.mark.parametrize("name", ["counts_inflated", pytest.param("counts_totals", marks=pytest.mark.exhaustive)])
def test_importance_weighted_exact(name):
    case = COUNTING[name]
    found = expected_gradient_over_cells(case, lambda: objective(case, CountDifference(), 2, True, objective=IWAE()), 2)
    assert_same(found, exact_bound_gradient(case, bound(1.0), 2, 0))


@pytest.mark.parametrize("law", CLOSED)
def test_closed_forms_are_the_sums(law, monkeypatch):
    model, guide = at_every_count(HOST, CLOSED[law])
    found = []
    for closed in (True, False):
        if not closed:
            monkeypatch.setattr(Draw, "has_parameters", False)
        pyro.clear_param_store()
        with Force([{"n": AT}], {}):
            TraceGrad_ELBO(estimators={"n": WIDE}, max_plate_nesting=1).loss_and_grads(model, guide)
        found.append(pyro.get_param_store()._params["a"].grad.numpy())
    np.testing.assert_allclose(*found, atol=1e-9, rtol=1e-9)
    assert np.all(np.abs(found[0]) > 1e-3)


@pytest.mark.parametrize("name", ["poisson", "gamma_poisson", "counts_event", "zero_inflated"])
def test_compiled_as_eager(name):
    case, found = COUNTING[name], []
    model, guide = case.build(HOST)
    for options in ({}, {"compile": {"backend": "eager"}}):
        fresh(case)
        elbo, rows = objective(case, CountDifference(), 3, True, **options), []
        for seed in range(3):
            pyro.set_rng_seed(seed)
            elbo.loss_and_grads(model, guide)
            rows.append(gradient())
        found.append(rows)
    for one, other in zip(*found, strict=True):
        assert_same(one, other, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.exhaustive) if n == "failures_forgotten" else n for n in MUTANTS]
)
def test_mutant_is_caught(name, monkeypatch):
    case, estimator, *change = MUTANTS[name]
    rewritten(monkeypatch, *change)
    assert not gradient_error(estimator, "pyro", case) < 1e-6


@pytest.mark.parametrize("way", BEYOND)
def test_no_branch_beyond_the_support(way, monkeypatch):
    case, *change = BEYOND[way]
    rewritten(monkeypatch, *change)
    try:
        wrong = not gradient_error(CountDifference(), "pyro", case) < 1e-6
    except (PplgradError, ValueError):
        wrong = True
    assert wrong


@pytest.mark.parametrize("name", VECTORS)
def test_counts_with_a_total_have_the_score_function(name):
    assert gradient_error(ScoreFunction(), "pyro", name) < 1e-9
    assert gradient_error(ScoreFunction(LeaveOneOut()), "pyro", name, particles=2, vectorized=True) < 1e-9


def test_the_most_probable_of_several_counts_are_refused():
    def program():
        pyro.sample("z", dist.Poisson(torch.ones(2)).to_event(1))

    with pytest.raises(EstimatorError, match="'z' needs a single count, and there are 2 .* use CountDifference"):
        TraceGrad_ELBO(estimators={"z": SumAndSample()}).loss_and_grads(program, program)


@pytest.mark.parametrize(
    ("law", "word"),
    [
        (dist.Normal(0.0, 1.0), "Normal"),
        (dist.Categorical(torch.ones(3)), "Categorical"),
        (dist.Bernoulli(0.3), "Bernoulli"),
        (dist.Multinomial(3, torch.ones(3)), "Multinomial"),
        (dist.OneHotCategorical(torch.ones(3)), "OneHotCategorical"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_laws_are_refused(law, word):
    def program():
        pyro.sample("z", law)

    with pytest.raises(
        EstimatorError, match=f"at site 'z': an element of {word} is no single count .*use one that fits"
    ):
        TraceGrad_ELBO(estimators={"z": CountDifference()}).loss_and_grads(program, program)


@pytest.mark.parametrize(
    "law",
    [
        lambda a: dist.Poisson(1e4 * a.exp()),
        lambda a: dist.ZeroInflatedPoisson(1e3 * a.exp(), gate=a.sigmoid()),
        lambda a: dist.NegativeBinomial(a.exp(), logits=a + 9),
        lambda a: dist.BetaBinomial(1e-3 * a.exp(), 1e-3 * a.exp(), torch.tensor(500.0)),
        lambda a: dist.Poisson(0 * a),
        lambda a: dist.Binomial(torch.tensor(4.0), 1 + 0 * a),
    ],
    ids=["large", "far modes", "long tail", "at both ends", "rate 0", "certain"],
)
def test_float32_stays_finite(law):
    torch.set_default_dtype(torch.float32)  # The module's fixture puts it back.

    def model():
        with pyro.plate("p", 500):
            n = pyro.sample("n", dist.Poisson(torch.tensor(30.0)))
        pyro.factor("f", torch.cos(n).sum(-1))

    def guide():
        with pyro.plate("p", 500):
            pyro.sample("n", law(pyro.param("a", torch.zeros(500))))

    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(objective=Expectation(), estimators={"n": CountDifference()}, max_plate_nesting=1)
    elbo.loss_and_grads(model, guide)
    assert torch.isfinite(pyro.get_param_store()._params["a"].grad).all()


def test_less_variance_than_the_score_function():
    """On its own ground: a smooth cost of a count."""

    def model():
        n = pyro.sample("n", dist.Poisson(torch.tensor(4.0)))
        pyro.sample("x", dist.Normal(n, 2.0), obs=torch.tensor(7.0))

    def guide():
        pyro.sample("n", dist.Poisson(pyro.param("a", torch.tensor(1.5)).exp()))

    spread = []
    for estimator in (CountDifference(), ScoreFunction(LeaveOneOut())):
        elbo = TraceGrad_ELBO(2, vectorize_particles=True, max_plate_nesting=0, estimators={"n": estimator})
        pyro.set_rng_seed(0)
        rows = []
        for _ in range(200):
            pyro.clear_param_store()
            elbo.loss_and_grads(model, guide)
            rows.append(pyro.get_param_store()._params["a"].grad.item())
        spread.append(np.var(rows))
    assert 4 * spread[0] < spread[1]


@pytest.mark.slow
def test_auto_and_check_gradients():
    model, guide = COUNTING["counts_event"].build(HOST)
    fresh(COUNTING["counts_event"])
    elbo = TraceGrad_ELBO(max_plate_nesting=1, estimators={"*": Auto(2)})
    chosen = [row["estimator"] for row in elbo.describe(model, guide).rows]
    assert chosen == ["CountDifference()", "LocalExpectation()"]
    found = check_gradients(model, guide, estimators={"*": CountDifference()}, draws=100)
    assert found.status in ("unbiased", "unknown")  # So few draws show a large bias alone; NumPyro's test takes more.
