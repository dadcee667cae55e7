"""Relaxations: their expected gradient is what their formula says, bias included, and misuse is refused."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pplgrad import (
    REBAR,
    RELAX,
    DoubleCV,
    EstimatorError,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    MuProp,
    ReinMax,
    ScoreFunction,
    StraightThrough,
)
from pplgrad.pyro import TraceGrad_ELBO, config_estimators
from pplgrad.testing.cells import z_of
from pplgrad.testing.in_pyro import HOST, array, assert_same, disturbed, exact_gradient, expected_gradient, fresh
from pplgrad.testing.programs import CASES, Case
from tests import relaxing

CASE = Case("relaxing", {"a": relaxing.LOGITS}, {"z": ((2,), 2)}, relaxing.program)
THREE = Case("three", {"a": relaxing.THREE}, {"z": ((), 3)}, relaxing.one_of_three, one_hot=("z",))


def gradients(estimator, particles, draws, case=CASE):
    """Return gradients of the loss of the program, each the mean over particles, one a row."""
    model, guide = case.build(HOST)
    objective = TraceGrad_ELBO(particles, vectorize_particles=True, max_plate_nesting=0, estimators={"z": estimator})
    rows = []
    for _ in range(draws):
        fresh(case)
        objective.loss_and_grads(model, guide)
        rows.append(dict(pyro.get_param_store().named_parameters())["a"].grad.numpy().copy())
    return np.stack(rows)


@pytest.mark.parametrize("short", relaxing.FINITE)
def test_expected_gradient(short):
    found = expected_gradient(CASE, lambda: TraceGrad_ELBO(estimators={"z": relaxing.FINITE[short]}), 1)
    np.testing.assert_allclose(found["a"], relaxing.expected(short), atol=1e-9)


def test_reinmax_is_exact_for_a_quadratic():
    """A normal density is quadratic in a binary value that moves its mean."""
    found = expected_gradient(CASES["single"], lambda: TraceGrad_ELBO(2, estimators={"z": ReinMax()}), 2)
    assert_same(found, exact_gradient(CASES["single"]))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gumbel_softmax_is_the_gradient_of_the_relaxed_objective(temperature):
    found = gradients(GumbelSoftmax(temperature), 1000, 100)
    wanted = relaxing.relaxed_objective_gradient(temperature)
    assert z_of(found, wanted) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("short", relaxing.HARD)
def test_hard_draws_have_the_slopes_of_concrete_weights(short):
    estimator = relaxing.HARD[short]
    assert z_of(gradients(estimator, 500, 100), relaxing.hard_gradient(estimator.temperature)) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("short", ["hard", "rao"])
def test_hard_draws_of_three_have_the_slopes_of_concrete_weights(short):
    found, wanted = gradients(relaxing.HARD[short], 500, 100, THREE), relaxing.hard_slopes_of_three(0.5)
    error = np.sqrt(found.var(0) / len(found) + wanted.var(0) / len(wanted))
    assert np.max(np.abs(found.mean(0) - wanted.mean(0)) / error) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("name", relaxing.MUTANTS)
def test_gumbel_rao_mutant_is_caught(name, monkeypatch):
    owner, attribute, broken = relaxing.MUTANTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    estimator = relaxing.HARD["rao"]
    assert z_of(gradients(estimator, 500, 100), relaxing.hard_gradient(estimator.temperature)) > 4.5


@pytest.mark.slow
def test_gumbel_rao_has_the_mean_of_the_hard_one_and_less_variance():
    hard = gradients(GumbelSoftmax(0.5, hard=True), 500, 200)
    rao = gradients(GumbelRao(10, 0.5), 500, 200)
    z = (hard.mean(0) - rao.mean(0)) / np.sqrt((hard.var(0) + rao.var(0)) / 200)
    assert np.all(np.abs(z) < 4.5) and np.all(rao.var(0) < hard.var(0))


def test_the_argmax_of_the_relaxed_draw_is_the_hosts_draw():
    """The noise is drawn given the draw: with one seed, hard weights are the draws of Trace_ELBO, and so is the loss."""
    model, guide = CASES["one_hot"].build(HOST)
    for seed in range(3):
        for estimator in (StraightThrough(), ReinMax()):
            losses = []
            for objective in (TraceGrad_ELBO(2, estimators={"*": estimator}), Trace_ELBO(2)):
                fresh(CASES["one_hot"])
                pyro.set_rng_seed(seed)
                losses.append(objective.loss_and_grads(model, guide))
            np.testing.assert_allclose(*losses)


def test_a_relaxed_parent_of_a_score_function_site():
    """z relaxed and k by the score function: exact for k's logits given z."""
    case = CASES["one_hot"]
    chosen = {"z": StraightThrough(), "k": ScoreFunction()}
    found = expected_gradient(case, lambda: TraceGrad_ELBO(estimators=chosen), 1)
    np.testing.assert_allclose(found["a"], exact_gradient(case)["a"], atol=1e-9)


@pytest.mark.slow
def test_trains_with_a_temperature_that_is_an_argument():
    def model(temperature):
        z = pyro.sample("z", dist.Bernoulli(array(0.4)))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=array(2.0))

    @config_estimators({})
    def guide(temperature):
        logit = pyro.param("a", array(0.0))
        pyro.sample("z", dist.Bernoulli(logits=logit), infer={"estimator": GumbelSoftmax(temperature)})

    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO(8, vectorize_particles=True))
    for i in range(300):
        svi.step(torch.tensor(max(0.2, 1.0 - i / 200)))
    # The posterior's logit: log(0.4 / 0.6) + log N(2; 2, 1) - log N(2; 0, 1).
    np.testing.assert_allclose(pyro.param("a").item(), np.log(0.4 / 0.6) + 2.0, atol=0.4)


MISUSES = {
    "equal": lambda z: torch.where(z == 1, 1.0, -1.0),
    "index": lambda z: array([1.0, 2.0])[z.long()],
    "copied": lambda z: torch.where(torch.stack([z, z])[1] > 0.5, 1.0, -1.0),
    "round": torch.round,
    "python": lambda z: 1.0 if z else -1.0,
}


@pytest.mark.grid
@pytest.mark.parametrize("estimator", [GumbelSoftmax(), StraightThrough()], ids=["soft", "hard"])
@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_refused(misuse, estimator):
    def guide():
        pyro.sample("z", dist.Bernoulli(logits=array(0.3)))

    def model():
        z = pyro.sample("z", dist.Bernoulli(array(0.4)))
        pyro.sample("x", dist.Normal(MISUSES[misuse](z), 1.0), obs=array(0.3))

    objective = TraceGrad_ELBO(estimators={"z": estimator})
    for _ in range(3):
        with pytest.raises(EstimatorError, match="Site 'z' is relaxed, but the program compares"):
            objective.loss_and_grads(model, guide)


def test_what_is_computed_from_a_relaxed_value_may_be_compared():
    def guide():
        pyro.sample("z", dist.Bernoulli(logits=array(0.3)))

    def model():
        z = pyro.sample("z", dist.Bernoulli(array(0.4)))
        pyro.sample("x", dist.Gamma(1.0 + (2 * z - 1).clamp(min=0.1), 1.0), obs=array(0.3))

    TraceGrad_ELBO(estimators={"z": GumbelSoftmax()}).loss_and_grads(model, guide)


def test_misfits_are_refused():
    def loss(guide_law, model_law):
        objective = TraceGrad_ELBO(estimators={"z": GumbelSoftmax()})
        return objective.loss_and_grads(lambda: pyro.sample("z", model_law), lambda: pyro.sample("z", guide_law))

    with pytest.raises(EstimatorError, match="'z': a Categorical .* OneHotCategorical"):
        loss(dist.Categorical(torch.ones(3)), dist.Categorical(torch.ones(3)))
    with pytest.raises(EstimatorError, match="'z': Poisson cannot be relaxed"):
        loss(dist.Poisson(array(1.0)), dist.Poisson(array(1.0)))
    for _ in range(3):
        with pytest.raises(EstimatorError, match="'z' is relaxed in the guide, but .* Binomial, is not defined"):
            loss(dist.Bernoulli(array(0.3)), dist.Binomial(1, array(0.3)))


def test_masks_stay_on_relaxed_sites():
    case = CASES["masked"]
    model, guide = case.build(HOST)
    losses = []
    for objective in (TraceGrad_ELBO(estimators={"z": StraightThrough()}), Trace_ELBO()):
        fresh(case)
        pyro.set_rng_seed(1)
        losses.append(objective.loss_and_grads(model, guide))
    np.testing.assert_allclose(*losses)


def test_masked_distributions_keep_their_mask():
    mask = torch.tensor([True, False])

    def program():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array([0.3, -0.4]))).mask(mask).to_event(1))

    losses = []
    for objective in (TraceGrad_ELBO(estimators={"z": StraightThrough()}), Trace_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(objective.loss(program, program) + objective.loss_and_grads(program, lambda: program()))
    np.testing.assert_allclose(*losses)


@pytest.mark.slow
@pytest.mark.parametrize("short", relaxing.LEARNING)
def test_learning_follows_the_gradient_of_the_squared_gradient(short):
    model, guide = relaxing.fixed_prior(HOST)
    elbo = TraceGrad_ELBO(estimators={"z": relaxing.LEARNING[short]})

    def gradients_of(learned):
        pyro.clear_param_store()
        for name, value in learned.items():
            pyro.param(name, array(value))
        pyro.set_rng_seed(4)
        elbo.loss_and_grads(model, guide)
        return {name: value.grad.numpy() for name, value in pyro.get_param_store().named_parameters()}

    gradients_of({})
    learned = disturbed()
    wanted, unit = relaxing.slope_by_differences(lambda p: float((gradients_of(p)["a"] ** 2).sum()), learned)
    found = gradients_of(learned)
    np.testing.assert_allclose(sum((found[n] * unit[n]).sum() for n in learned), wanted, rtol=1e-5)


@pytest.mark.grid
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize(
    "estimator", [MuProp(), DoubleCV(learn=False), REBAR(learn=False)], ids=["muprop", "double", "rebar"]
)
def test_branches_that_relax_refuse_what_they_cannot_relax(estimator, vectorized):
    def program(law, use):
        def guide():
            z = pyro.sample("z", dist.Bernoulli(array(0.3)))
            return pyro.sample("w", law(0.5 + z))

        def model():
            pyro.sample("x", dist.Normal(use(guide()), 1.0), obs=array(0.3))

        objective = TraceGrad_ELBO(vectorize_particles=vectorized, max_plate_nesting=0, estimators={"z": estimator})
        objective.loss_and_grads(model, guide)

    with pytest.raises(EstimatorError, match="'w' follows site 'z', .* Poisson cannot be relaxed"):
        program(dist.Poisson, lambda w: w)
    with pytest.raises(EstimatorError, match="Site 'w' is relaxed, but the program compares"):
        program(lambda p: dist.Bernoulli(0.5 * p), lambda w: torch.where(w == 1, 2.0, 1.0))
    program(lambda p: dist.Bernoulli(0.5 * p), lambda w: 1.0 + w)
    program(lambda p: dist.Gamma(p, 1.0), lambda w: w)


@pytest.mark.parametrize("estimator", [GumbelSoftmax, GumbelRao, ReinMax, GappedStraightThrough])
def test_a_temperature_may_follow_the_arguments(estimator):
    def model(step):
        pyro.factor("f", pyro.sample("z", dist.Bernoulli(array(0.4))) ** 2)

    def guide(step):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(0.3))))

    found = []
    for temperature in (lambda step: 1.0 / step, 0.25):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        TraceGrad_ELBO(estimators={"z": estimator(temperature=temperature)}).loss_and_grads(model, guide, 4)
        found.append(pyro.get_param_store()._params["a"].grad)
    torch.testing.assert_close(*found)


def test_relax_without_the_cost_needs_no_derivative():
    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(0.3))))

    def model():
        z = pyro.sample("z", dist.Bernoulli(array(0.3)))
        pyro.factor("f", torch.where(z == 1, array(2.0), array(0.5)))

    pyro.clear_param_store()
    TraceGrad_ELBO(estimators={"z": RELAX(through_cost=False)}).loss_and_grads(model, guide)
    with pytest.raises(EstimatorError, match="Site 'z' is relaxed, but the program compares"):
        TraceGrad_ELBO(estimators={"z": RELAX()}).loss_and_grads(model, guide)
