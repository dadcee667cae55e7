"""The thermodynamic variational objective: exact over all tuples of outcomes."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import (
    TVO,
    VIMCO,
    ConfigurationError,
    EstimatorError,
    LeaveOneOut,
    ProgramError,
    ReweightedWakeSleep,
    ScoreFunction,
)
from pplgrad.pyro import TraceGrad_ELBO, check_gradients
from pplgrad.testing.in_pyro import (
    HOST,
    PLAIN,
    Force,
    array,
    assert_same,
    exact_bound_gradient,
    exact_gradient,
    expected_gradient,
    fresh,
    gradient,
    log_weight_and_objective,
    outcomes,
    subsamples,
)
from pplgrad.testing.programs import CASES
from tests import thermodynamic as shared


def assert_exact(name, short, particles=2):
    def elbo():
        together = name != "minibatch"
        return TraceGrad_ELBO(particles, vectorize_particles=together, objective=shared.OBJECTIVES[short])

    found, wanted = expected_gradient(CASES[name], elbo, particles), {}
    for of_guide in (False, True):
        combine = shared.followed(short, torch.Tensor.detach, of_guide)
        exact = exact_bound_gradient(CASES[name], combine, particles, shared.CASES[name], draws_move=False)
        wanted |= {n: g for n, g in exact.items() if (n in shared.GUIDE) == of_guide}
    assert_same(found, wanted)


@pytest.mark.parametrize(
    ("name", "short"),
    [("single", short) for short in shared.OBJECTIVES]
    + [pytest.param(name, "left", marks=pytest.mark.slow) for name in ("event_in_plate", "minibatch")],
)
def test_exact(name, short):
    assert_exact(name, short)


@pytest.mark.slow
def test_three_particles_exact():
    assert_exact("single", "left", 3)


@pytest.mark.grid(together="mutants of thermodynamic bounds")
@pytest.mark.parametrize("name", shared.MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    shared.MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        assert_exact("single", "left")


def assert_whole(name, short, vectorized=False):
    case = CASES[name]
    model, guide = case.build(HOST)
    subset = subsamples(case)[-1]
    every = [outcome | subset for outcome in outcomes(case)]

    def slopes(weights, of_draws=False):
        rows = []
        for outcome in every:
            fresh(case)
            x = log_weight_and_objective(case, model, guide, outcome, weights)[0 if of_draws else 1]
            x.backward()
            rows.append((x.item(), np.concatenate([g.ravel() for g in gradient().values()])))
        return np.array([x for x, _ in rows]), np.stack([slope for _, slope in rows])

    (f, slopes_f), (_, slopes_p), (_, slopes_q) = slopes(PLAIN), slopes(shared.OF_MODEL), slopes(PLAIN, of_draws=True)
    fresh(case)
    elbo = TraceGrad_ELBO(len(every), vectorize_particles=vectorized, objective=shared.whole(short))
    with Force(every, {}):
        elbo.loss_and_grads(model, guide)
    found = np.concatenate([g.ravel() for g in gradient().values()])
    np.testing.assert_allclose(found, -shared.once_each(f, slopes_f, slopes_p, slopes_q, short), atol=1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("short", ["left", "right"])
@pytest.mark.parametrize("name", shared.COUNTED)
def test_masks_and_scales_do_not_move_what_is_drawn(name, short):
    assert_whole(name, short)
    assert_whole(name, short, vectorized=True)


@pytest.mark.parametrize("name", shared.COUNTED[:4])
def test_draws_that_count_as_weighed_are_caught(name, monkeypatch):
    shared.draws_that_count_as_weighed(monkeypatch)
    with pytest.raises(AssertionError):
        assert_whole(name, "left")


@pytest.mark.parametrize("name", shared.COUNTED)
def test_one_partition_is_unbiased(name):
    objective = TVO(1, plates=())
    assert_same(
        expected_gradient(CASES[name], lambda: TraceGrad_ELBO(2, objective=objective), 2), exact_gradient(CASES[name])
    )


@pytest.mark.parametrize("vectorized", [True, False])
def test_one_partition_is_the_elbo(vectorized):
    """Unbiased, and on the same draws the gradient of the score function with leave-one-out."""
    case = CASES["single"]
    assert_same(
        expected_gradient(case, lambda: TraceGrad_ELBO(2, vectorize_particles=vectorized, objective=TVO(1)), 2),
        exact_gradient(case),
    )
    model, guide = case.build(HOST)
    found = []
    for given in ({"estimators": {"*": ScoreFunction(LeaveOneOut())}}, {"objective": TVO(1)}):
        fresh(case)
        with Force([{"z": array(z)} for z in (1.0, 0.0, 1.0)], {}):
            loss = TraceGrad_ELBO(3, vectorize_particles=vectorized, **given).loss_and_grads(model, guide)
        found.append((loss, gradient()))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-12)
    assert_same(found[0][1], found[1][1])


def test_continuous_draws_are_constants():
    """With equal draws there is no covariance, and the guide's share of ∇ log q is that of all intervals but the first."""

    def model():
        z = pyro.sample("z", dist.Normal(array(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=array(0.4))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", array(0.3)), 1.0))

    pyro.clear_param_store()
    with Force([{}, {}], {"z": np.array(0.5)}):
        TraceGrad_ELBO(2, objective=shared.OBJECTIVES["left"]).loss_and_grads(model, guide)
    np.testing.assert_allclose(gradient()["m"], 0.8 * 0.5, atol=1e-12)


def test_loss_and_compiled_step():
    case = CASES["single"]
    model, guide = case.build(HOST)
    losses = []
    for method in ("loss", "loss_and_grads"):
        fresh(case)
        pyro.set_rng_seed(1)
        elbo = TraceGrad_ELBO(4, vectorize_particles=True, max_plate_nesting=0, objective=TVO())
        losses.append(getattr(elbo, method)(model, guide))
    np.testing.assert_allclose(*losses)
    svi = pyro.infer.SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.0}),
        TraceGrad_ELBO(4, vectorize_particles=True, max_plate_nesting=0, objective=TVO(), compile={"backend": "eager"}),
    )
    assert np.isfinite([svi.step() for _ in range(5)]).all()


@pytest.mark.parametrize("objective", [TVO(upper=True), ReweightedWakeSleep()])
def test_particles_without_a_weight_have_no_part(objective):
    """The loss is finite, and the gradient that of a factor far below 0 in the place of −∞."""
    found = []
    for lowest in (-np.inf, -1e9):

        def model(lowest=lowest):
            z = pyro.sample("z", dist.Bernoulli(array(0.5)))
            pyro.factor("f", torch.where(z > 0, array(0.0), array(lowest)))
            pyro.sample("x", dist.Normal(pyro.param("c", array(0.2)), 1.0), obs=array(0.5))

        pyro.clear_param_store()
        guide = CASES["single"].build(HOST)[1]
        fresh(CASES["single"])
        with Force([{"z": np.array(z)} for z in (1.0, 0.0, 1.0)], {}):
            loss = TraceGrad_ELBO(3, objective=objective).differentiable_loss(model, guide)
        loss.backward()
        found.append((loss.item(), gradient()))
    assert np.isfinite(found[0][0])
    assert_same(found[0][1], found[1][1])


def test_second_derivatives_are_refused_with_a_remedy():
    model, guide = CASES["single"].build(HOST)
    fresh(CASES["single"])
    loss = TraceGrad_ELBO(2, objective=TVO()).differentiable_loss(model, guide)
    with pytest.raises(EstimatorError, match=r"use ELBO\(\) with higher_order=True"):
        torch.autograd.grad(loss, pyro.param("a"), create_graph=True)


def test_refused():
    model, guide = CASES["single"].build(HOST)
    fresh(CASES["single"])

    def refused(error, words, particles=2, **given):
        with pytest.raises(error, match=words):
            TraceGrad_ELBO(particles, objective=TVO(), **given).loss_and_grads(model, guide)

    refused(ConfigurationError, "one particle has none", 1)
    refused(ConfigurationError, "drop higher_order=True", higher_order=True)
    refused(EstimatorError, "no site has an estimator", estimators={"z": VIMCO()})
    with pytest.raises(ConfigurationError, match="nothing can be checked"):
        check_gradients(model, guide, objective=TVO(), num_particles=2)

    def alone():
        pyro.sample("u", dist.Normal(0.0, 1.0))
        model()

    with pytest.raises(ProgramError, match="the model alone"):
        TraceGrad_ELBO(2, objective=TVO()).loss_and_grads(alone, guide)
