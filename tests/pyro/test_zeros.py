"""Zero, one and infinity: values that the guide never draws have no part in a gradient, whatever their cost."""

import numpy as np
import pyro
import pytest
import torch

from pplgrad import (
    DecayingAverage,
    DisARM,
    ImpossibleValueError,
    LocalExpectation,
    MeasureValued,
    NeuralBaseline,
    OptimalConstant,
    PplgradError,
    ScoreFunction,
    SumAndSample,
    UnorderedSet,
)
from pplgrad.core.objectives import IWAE
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing import in_pyro as host
from tests.bounds import bound
from tests.zeros import BIASED, CASES, MANY, MUTANTS, OBJECTIVES, QUICK, infinite_at_what_is_drawn, table

ROWS = [
    pytest.param(
        o,
        short,
        estimator,
        name,
        marks=() if o == "elbo" and (short, name) in QUICK else pytest.mark.slow,
        id=f"{o}-{short}-{name}",
    )
    for o in OBJECTIVES
    for short, estimator, name in table(o, left_out=MANY)
    # Two particles and their branches, one by one: minutes for each row. NumPyro has these rows.
    if not (o == "iwae" and name == "five" and estimator.uses_branches)
]


def wanted(case, objective):
    chosen, particles, weights = OBJECTIVES[objective]
    if isinstance(chosen, IWAE):
        return host.exact_bound_gradient(case, bound(1.0), particles, 0)
    return host.exact_gradient(case, weights)


@pytest.mark.grid(together="impossible values")
@pytest.mark.parametrize(("objective", "short", "estimator", "name"), ROWS)
def test_exact(objective, short, estimator, name):
    case, (chosen, particles, _) = CASES[name], OBJECTIVES[objective]

    def make():
        return TraceGrad_ELBO(
            particles,
            vectorize_particles=particles > 1,
            max_plate_nesting=1,
            objective=chosen,
            estimators=dict.fromkeys(case.latents, estimator),
        )

    with host.isolated():
        over = host.expected_gradient_over_cells if estimator.uses_branches else host.expected_gradient
        host.assert_same(over(case, make, particles), wanted(case, objective))
        assert np.isfinite(wanted(case, objective)["a"]).all()


@pytest.mark.grid
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("compiled", [False, {"backend": "eager"}])
def test_an_infinite_cost_in_a_branch_is_refused(vectorized, compiled):
    with host.isolated():
        pyro.clear_param_store()
        model, guide = infinite_at_what_is_drawn(host.HOST)
        elbo = TraceGrad_ELBO(
            vectorize_particles=vectorized,
            max_plate_nesting=0,
            estimators={"k": LocalExpectation()},
            compile=compiled,
        )
        for _ in range(3):
            with pytest.raises(ImpossibleValueError, match="'k' is NaN or infinite although the loss is finite"):
                elbo.loss_and_grads(model, guide)
            assert all(x.grad is None for _, x in pyro.get_param_store().named_parameters())


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("short", BIASED)
@pytest.mark.parametrize("name", ["one_hot", "binary"])
def test_relaxations_are_finite(name, short):
    case = CASES[name]
    with host.isolated():
        model, guide = case.build(host.HOST)
        chosen = {site: BIASED[short] if site != "w" else ScoreFunction() for site in case.latents}
        for _ in range(5):
            host.fresh(case)
            TraceGrad_ELBO(estimators=chosen).loss_and_grads(model, guide)
            found = host.gradient()
            assert all(np.isfinite(x).all() for x in found.values())
            if name == "one_hot":
                assert not found["a"][case.impossible["k"]].any()


def test_infinite_odds_are_refused_by_name():
    """torch's own Bernoulli has no density at infinite log odds."""
    with host.isolated():
        case = CASES["binary_logits"]
        host.fresh(case)
        model, guide = case.build(host.HOST)
        for estimator in (LocalExpectation(), DisARM(), ScoreFunction()):
            with pytest.raises(ImpossibleValueError, match="'z'"):
                TraceGrad_ELBO(estimators={"z": estimator}).loss_and_grads(model, guide)


@pytest.mark.parametrize(
    ("estimator", "name", "options"),
    [
        (LocalExpectation(), "five", {"compile": {"backend": "eager"}}),
        (MeasureValued(), "logits", {"compile": {"backend": "eager"}}),
        (SumAndSample(4), "five", {"compile": {"backend": "eager"}}),
        (UnorderedSet(5), "five", {}),
        (LocalExpectation(), "five", {"max_parallel": 2, "vectorize_particles": True}),
    ],
)
def test_what_needs_no_chance_is_exact_at_every_draw(estimator, name, options):
    """Compiled, or some branches at a time: a sum over all values is the gradient whatever was drawn."""
    case = CASES[name]
    with host.isolated():
        right = host.exact_gradient(case)["a"]
        model, guide = case.build(host.HOST)
        objective = TraceGrad_ELBO(max_plate_nesting=1, estimators={"k": estimator}, **options)
        for _ in range(4):
            host.fresh(case)
            objective.loss_and_grads(model, guide)
            np.testing.assert_allclose(host.gradient()["a"], right, atol=1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("estimator", [LocalExpectation(), ScoreFunction()])
@pytest.mark.parametrize("name", ["five", "probs", "binary_cost"])
def test_of_higher_order(name, estimator):
    case = CASES[name]

    def make():
        return TraceGrad_ELBO(higher_order=True, max_plate_nesting=1, estimators=dict.fromkeys(case.latents, estimator))

    with host.isolated():
        over = host.expected_gradient_over_cells if estimator.uses_branches else host.expected_gradient
        host.assert_same(over(case, make, 1), host.exact_gradient(case))


@pytest.mark.grid
@pytest.mark.parametrize("baseline", [DecayingAverage(0.9), OptimalConstant(decay=0.9), NeuralBaseline()])
@pytest.mark.parametrize("name", ["logits", "probs", "binary_cost"])
def test_baselines_stay_finite(baseline, name):
    case = CASES[name]
    with host.isolated():
        host.fresh(case)
        model, guide = case.build(host.HOST)
        objective = TraceGrad_ELBO(max_plate_nesting=1, estimators=dict.fromkeys(case.latents, ScoreFunction(baseline)))
        for _ in range(5):
            objective.loss_and_grads(model, guide)
        store = pyro.get_param_store()
        assert all(torch.isfinite(store[key]).all() for key in store)
        assert all(np.isfinite(x).all() for x in host.gradient().values())


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant, monkeypatch):
    """What guards one trap is taken away, and a row of the table is no longer right (or no longer finite, or no longer runs)."""
    MUTANTS[mutant].apply(monkeypatch)
    with pytest.raises((AssertionError, PplgradError)):
        test_exact("elbo", "", MUTANTS[mutant].estimator, MUTANTS[mutant].case)
