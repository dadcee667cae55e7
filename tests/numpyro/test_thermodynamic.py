"""The thermodynamic variational objective: exact over all tuples of outcomes."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

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
from pplgrad.numpyro import TraceGrad_ELBO, check_gradients
from pplgrad.testing.in_numpyro import (
    HOST,
    KEY,
    array,
    assert_same,
    exact_bound_gradient,
    exact_gradient,
    expected_gradient,
    forced,
    log_weight_and_objective,
    outcomes,
    parameters,
    stacked,
)
from pplgrad.testing.programs import CASES
from tests import thermodynamic as shared


def assert_exact(name, short, particles=2):
    case, found = CASES[name], TraceGrad_ELBO(particles, objective=shared.OBJECTIVES[short])
    found = expected_gradient(case, found, particles, shared=True)
    wanted = {}
    for of_guide in (False, True):
        combine = shared.followed(short, jax.lax.stop_gradient, of_guide)
        exact = exact_bound_gradient(case, combine, particles, shared.CASES[name], draws_move=False)
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


@pytest.mark.slow
@pytest.mark.grid(together="mutants of thermodynamic bounds")
@pytest.mark.parametrize("name", shared.MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    shared.MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        assert_exact("single", "left")


def assert_whole(name, short):
    case = CASES[name]
    model, guide = case.build(HOST)
    every = list(outcomes(case))
    every = [row for row in every if all((row[plate] == every[-1][plate]).all() for plate in case.subsamples)]
    params, draws = parameters(case), stacked(every)

    def all_of(params):
        def one(outcome):
            log_q, f = log_weight_and_objective(case, params, outcome)
            return f, log_weight_and_objective(case, params, outcome, shared.OF_MODEL)[1], log_q

        return jax.vmap(one)(draws)

    def flat(found, rows):
        return np.concatenate([np.asarray(found[name]).reshape(*rows, -1) for name in params], -1)

    slopes = [flat(found, (len(every),)) for found in jax.jit(jax.jacobian(all_of))(params)]
    elbo = TraceGrad_ELBO(len(every), objective=shared.whole(short))
    run = forced(guide, draws, {}, len(every))
    gradient = jax.jit(jax.grad(lambda p: elbo.loss(jax.random.key(KEY), p, model, run)))
    found = flat(gradient(params), ())
    f = np.asarray(jax.jit(all_of)(params)[0])
    np.testing.assert_allclose(found, -shared.once_each(f, *slopes, short), atol=1e-9)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("short", ["left", "right"])
@pytest.mark.parametrize("name", shared.COUNTED)
def test_masks_and_scales_do_not_move_what_is_drawn(name, short):
    assert_whole(name, short)


@pytest.mark.slow
@pytest.mark.parametrize("name", shared.COUNTED[:4])
def test_draws_that_count_as_weighed_are_caught(name, monkeypatch):
    shared.draws_that_count_as_weighed(monkeypatch)
    with pytest.raises(AssertionError):
        assert_whole(name, "left")


@pytest.mark.parametrize("name", shared.COUNTED)
def test_one_partition_is_unbiased(name):
    elbo = TraceGrad_ELBO(2, objective=TVO(1, plates=()))
    assert_same(expected_gradient(CASES[name], elbo, 2, shared=True), exact_gradient(CASES[name]))


@pytest.mark.slow
def test_one_partition_is_the_elbo():
    """Unbiased, and on the same draws the gradient of the score function with leave-one-out."""
    case = CASES["hierarchy"]
    assert_same(expected_gradient(case, TraceGrad_ELBO(2, objective=TVO(1)), 2), exact_gradient(case))
    single = CASES["single"]
    model, guide = single.build(HOST)
    guide = forced(guide, {"z": array([1.0, 0.0, 1.0])}, {}, 3)
    estimators = {"*": ScoreFunction(LeaveOneOut())}
    losses = [TraceGrad_ELBO(3, estimators=estimators), TraceGrad_ELBO(3, objective=TVO(1))]
    plain, found = (
        jax.value_and_grad(lambda p, elbo=elbo: elbo.loss(jax.random.key(KEY), p, model, guide))(parameters(single))
        for elbo in losses
    )
    np.testing.assert_allclose(found[0], plain[0], atol=1e-12)
    assert_same(found[1], plain[1])


def test_continuous_draws_are_constants():
    """With equal draws there is no covariance, and the guide's share of ∇ log q is that of all intervals but the first."""

    def model():
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=0.4)

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("m", array(0.3)), 1.0))

    elbo = TraceGrad_ELBO(2, objective=shared.OBJECTIVES["left"])
    guide = forced(guide, {}, {"z": np.array(0.5)}, 2)
    found = jax.grad(lambda m: elbo.loss(jax.random.key(KEY), {"m": m}, model, guide))(array(0.3))
    np.testing.assert_allclose(found, 0.8 * 0.5, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [TVO(upper=True), ReweightedWakeSleep()])
def test_particles_without_a_weight_have_no_part(objective):
    """The loss is finite, and the gradient that of a factor far below 0 in the place of −∞."""
    guide = forced(CASES["single"].build(HOST)[1], {"z": array([1.0, 0.0, 1.0])}, {}, 3)
    found = []
    for lowest in (-np.inf, -1e9):

        def model(lowest=lowest):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.factor("f", jax.numpy.where(z > 0, 0.0, lowest))
            numpyro.sample("x", dist.Normal(numpyro.param("c", 0.2), 1.0), obs=0.5)

        elbo, params = TraceGrad_ELBO(3, objective=objective), {"a": array(0.3), "c": array(0.2)}

        def loss(p, elbo=elbo, model=model):
            return elbo.loss(jax.random.key(KEY), p, model, guide)

        found.append(jax.value_and_grad(loss)(params))
    assert np.isfinite(found[0][0])
    assert_same(found[0][1], found[1][1])


@pytest.mark.slow
def test_second_derivatives_are_refused_with_a_remedy():
    model, guide = CASES["single"].build(HOST)
    elbo = TraceGrad_ELBO(2, objective=TVO())
    with pytest.raises(EstimatorError, match=r"use ELBO\(\) with higher_order=True"):
        jax.hessian(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(parameters(CASES["single"]))


@pytest.mark.slow
def test_refused():
    case = CASES["single"]
    model, guide = case.build(HOST)

    def refused(error, words, particles=2, **given):
        with pytest.raises(error, match=words):
            TraceGrad_ELBO(particles, objective=TVO(), **given).loss(jax.random.key(0), parameters(case), model, guide)

    refused(ConfigurationError, "one particle has none", 1)
    refused(ConfigurationError, "drop higher_order=True", higher_order=True)
    refused(EstimatorError, "no site has an estimator", estimators={"z": VIMCO()})
    with pytest.raises(ConfigurationError, match="drop higher_order=True"):
        TraceGrad_ELBO(2, objective=ReweightedWakeSleep(), higher_order=True)
    with pytest.raises(ConfigurationError, match="nothing can be checked"):
        check_gradients(model, guide, objective=TVO(), num_particles=2)

    def alone():
        numpyro.sample("u", dist.Normal(0.0, 1.0))
        model()

    with (
        pytest.warns(UserWarning, match="in model but not guide"),
        pytest.raises(ProgramError, match="the model alone"),
    ):
        TraceGrad_ELBO(2, objective=TVO()).loss(jax.random.key(0), parameters(case), alone, guide)
