"""Objectives at the draws of another program: exact over all draws of the proposal."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pplgrad import (
    IWAE,
    ConfigurationError,
    DisARM,
    EstimatorError,
    LeaveOneOut,
    LogVariance,
    ProgramError,
    ScoreFunction,
    TrajectoryBalance,
)
from pplgrad.pyro import TraceGrad_ELBO, check_gradients
from pplgrad.pyro._tracing import particle_trace
from pplgrad.testing.in_pyro import HOST, array, gradient
from tests import off_policy as shared


def store(**values):
    pyro.clear_param_store()
    for name, value in values.items():
        pyro.param(name, array(value).clone())


def listed(rows, vectorized):
    """Return a proposal that gives the particles the values at the numbers in its list, which the caller fills."""
    numbers, turn = [], [0]

    def proposal():
        picked = numbers if vectorized else [numbers[turn[0] % len(numbers)]]
        turn[0] += 1
        for name, values in rows.items():
            value = array(values[picked])
            pyro.sample(name, dist.Delta(value if vectorized else value[0]))

    return proposal, numbers


def expected_over_pairs(objective_of, particles, vectorized=False):
    """Return E_r of loss and gradients, over all tuples of the particles' draws."""
    rows, r, _, _ = shared.pair_rows()
    model, guide = shared.pair(HOST)
    proposal, numbers = listed(rows, vectorized)
    elbo = TraceGrad_ELBO(
        particles, max_plate_nesting=0, vectorize_particles=vectorized, objective=objective_of(proposal)
    )
    store(a=shared.A, m=shared.M, log_normalizer=shared.LOG_Z)
    total = {}
    for picked, weight in shared.tuples(r, particles):
        numbers[:] = picked
        found = {"loss": elbo.loss_and_grads(model, guide)} | gradient()
        total = {name: total.get(name, 0.0) + weight * x for name, x in found.items()}
    return total


def assert_log_variance_exact(particles=2, vectorized=False):
    _, r, f, slopes = shared.pair_rows()
    value, wanted = shared.half_variance(r, f, slopes)
    found = expected_over_pairs(LogVariance, particles, vectorized)
    np.testing.assert_allclose(found["loss"], value, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["a"], wanted, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["m"], 0.0, atol=0)


@pytest.mark.parametrize(("particles", "vectorized"), [(2, False), (3, False), (2, True)])
def test_log_variance_exact(particles, vectorized):
    assert_log_variance_exact(particles, vectorized)


@pytest.mark.slow
def test_variances_are_averaged_over_further_particles():
    _, r, f, slopes = shared.pair_rows()
    found = expected_over_pairs(lambda proposal: LogVariance(proposal, samples=2), 4)
    np.testing.assert_allclose(found["a"], shared.half_variance(r, f, slopes)[1], atol=1e-9, rtol=0)


def assert_balance_exact(particles=2, vectorized=False):
    _, r, f, slopes = shared.pair_rows()
    value, wanted, by_number = shared.balance(r, f, slopes)
    found = expected_over_pairs(TrajectoryBalance, particles, vectorized)
    np.testing.assert_allclose(found["loss"], value, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["a"], wanted, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["log_normalizer"], by_number, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["m"], 0.0, atol=0)


@pytest.mark.parametrize(("particles", "vectorized"), [(1, False), (2, True)])
def test_trajectory_balance_exact(particles, vectorized):
    assert_balance_exact(particles, vectorized)


def assert_elements_exact():
    """Each element has a variance of its own, whose mean over minibatches is that of all data."""
    r, _, _ = shared.element_rows()
    value, wanted = shared.half_variance_of_elements()
    subset = [()]

    def plate():
        return pyro.plate("data", 3, subsample=torch.tensor(subset[0]))

    model, guide = shared.elements(HOST, plate)
    numbers, turn = [], [0]

    def proposal():
        z = numbers[turn[0] % 2]
        turn[0] += 1
        with plate():
            pyro.sample("z", dist.Delta(array(z)))

    elbo = TraceGrad_ELBO(2, objective=LogVariance(proposal))
    store(b=shared.B)
    loss, found = 0.0, 0.0
    outcomes = list(np.ndindex(2, 2))
    for subset[0] in shared.SUBSETS:
        columns = np.array(subset[0])
        for first in outcomes:
            for second in outcomes:
                numbers[:] = [np.array(first, float), np.array(second, float)]
                weight = r[first, columns].prod() * r[second, columns].prod() / len(shared.SUBSETS)
                loss += weight * elbo.loss_and_grads(model, guide)
                found += weight * gradient()["b"]
    np.testing.assert_allclose(loss, value, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found, wanted, atol=1e-9, rtol=0)


def test_elements_of_minibatches_exact():
    assert_elements_exact()


@pytest.mark.parametrize("name", shared.MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    shared.MUTANTS[name](monkeypatch)
    check = {
        "normalizer_with_the_wrong_sign": assert_balance_exact,
        "scale_inside_of_the_square": assert_elements_exact,
    }
    with pytest.raises(AssertionError):
        check.get(name, assert_log_variance_exact)()


def test_guide_draws_in_place_of_the_proposals_are_caught(monkeypatch):
    monkeypatch.setattr(particle_trace, "at_draws", lambda guide, draws: guide)
    with pytest.raises(AssertionError):
        assert_log_variance_exact()


def one_site():
    def model():
        z = pyro.sample("z", dist.Bernoulli(array([0.3, 0.6, 0.8])).to_event(1))
        pyro.sample("x", dist.Normal(z @ array([1.0, -2.0, 0.5]), 1.0), obs=array(1.4))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(shared.A))).to_event(1))

    return model, guide


@pytest.mark.parametrize("vectorized", [False, True])
def test_on_the_guides_draws_is_leave_one_out(vectorized):
    """VarGrad is the gradient of the evidence lower bound with leave-one-out, also under a proposal that is the guide."""
    model, guide = one_site()
    rows = []
    for objective in ({}, {"objective": LogVariance()}, {"objective": LogVariance(guide)}):
        store(a=shared.A)
        pyro.set_rng_seed(3)
        estimators = {} if objective else {"z": ScoreFunction(LeaveOneOut())}
        elbo = TraceGrad_ELBO(
            5, vectorize_particles=vectorized, max_plate_nesting=0, estimators=estimators, **objective
        )
        elbo.loss_and_grads(model, guide)
        rows.append(gradient()["a"])
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-12)
    np.testing.assert_allclose(rows[2], rows[0], atol=1e-12)
    assert np.abs(rows[0]).max() > 0.01


def normals():
    def model():
        z = pyro.sample("z", dist.Normal(array(0.0), 1.0))
        y = pyro.sample("y", dist.Normal(z, 0.8))
        pyro.sample("x", dist.Normal(y * z, 0.7), obs=array(0.4))

    def guide():
        p = pyro.param("p", array([0.3, -0.2, 0.4]))
        z = pyro.sample("z", dist.Normal(p[0], p[1].exp()))
        pyro.sample("y", dist.Normal(p[2] * z, p[1].exp()))

    def proposal():
        # Reads the guide's parameter, which gets no gradient through it, and has a site of its own.
        p = pyro.param("p", array([0.3, -0.2, 0.4]))
        wide = pyro.sample("wide", dist.Bernoulli(array(0.5)))
        z = pyro.sample("z", dist.Normal(p[0], (1 + wide) * p[1].exp()))
        pyro.sample("y", dist.Normal(p[2] * z, 2 * p[1].exp()))

    return model, guide, proposal


def assert_draws_are_constant(objective_of, proposed, vectorized=False):
    """The gradient is that of densities written out at the draws of the step."""
    model, guide, proposal = normals()
    seen = []

    def seeing():
        with poutine.trace() as found:
            guide()
        seen.append([found.trace.nodes[name]["value"].detach() for name in ("z", "y")])

    objective = objective_of(proposal if proposed else None)
    store(p=[0.3, -0.2, 0.4], log_normalizer=0.5)
    elbo = TraceGrad_ELBO(4, vectorize_particles=vectorized, max_plate_nesting=0, objective=objective)
    loss = elbo.loss_and_grads(model, seeing)
    z, y = seen[0] if vectorized else map(torch.stack, zip(*seen[:4], strict=True))
    p, number = array([0.3, -0.2, 0.4]).requires_grad_(), array(0.5).requires_grad_()
    log_q = dist.Normal(p[0], p[1].exp()).log_prob(z) + dist.Normal(p[2] * z, p[1].exp()).log_prob(y)
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.8).log_prob(y)
    f = log_q - log_p - dist.Normal(y * z, 0.7).log_prob(array(0.4))
    wanted = 0.5 * f.var() if objective_of is LogVariance else ((number + f) ** 2).mean()
    wanted.backward()
    found = gradient()
    np.testing.assert_allclose(loss, wanted.item(), atol=1e-9)
    np.testing.assert_allclose(found["p"], p.grad, atol=1e-9)
    if objective_of is TrajectoryBalance:
        np.testing.assert_allclose(found["log_normalizer"], number.grad, atol=1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("proposed", [False, True])
@pytest.mark.parametrize("objective_of", [LogVariance, TrajectoryBalance])
def test_draws_are_constant(objective_of, proposed, vectorized):
    assert_draws_are_constant(objective_of, proposed, vectorized)


def test_draws_that_move_are_caught(monkeypatch):
    shared.draws_that_move(monkeypatch)
    with pytest.raises(AssertionError):
        assert_draws_are_constant(LogVariance, False)


def test_compiled_steps_are_the_eager_ones():
    model, guide, proposal = normals()
    for objective in (LogVariance(), LogVariance(proposal), TrajectoryBalance(proposal)):
        rows = []
        for compiled in (False, {"backend": "eager"}):
            store(p=[0.3, -0.2, 0.4])
            pyro.set_rng_seed(1)
            elbo = TraceGrad_ELBO(
                4, vectorize_particles=True, max_plate_nesting=0, objective=objective, compile=compiled
            )
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                rows.append([svi.step() for _ in range(6)])
        assert len(set(rows[0])) == 6
        np.testing.assert_allclose(rows[1], rows[0], atol=1e-9)


def test_compiled_step_sees_the_proposals_state():
    model, guide, _ = normals()
    width = [1.0]

    def proposal():
        z = pyro.sample("z", dist.Normal(array(0.0), width[0]))
        pyro.sample("y", dist.Normal(z, width[0]))

    rows = []
    for compiled in (False, {"backend": "eager"}):
        store(p=[0.3, -0.2, 0.4])
        pyro.set_rng_seed(1)
        elbo = TraceGrad_ELBO(
            4, vectorize_particles=True, max_plate_nesting=0, objective=LogVariance(proposal), compile=compiled
        )
        losses = []
        for width[0] in (1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 1.0):
            losses.append(elbo.loss_and_grads(model, guide))
        rows.append(losses)
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-9)


def test_loss_is_that_of_a_step():
    model, guide, proposal = normals()
    for objective in (LogVariance(proposal), TrajectoryBalance(proposal)):
        store(p=[0.3, -0.2, 0.4], log_normalizer=0.5)
        losses = []
        for method in ("loss", "loss_and_grads"):
            pyro.set_rng_seed(3)
            losses.append(getattr(TraceGrad_ELBO(3, objective=objective), method)(model, guide))
        np.testing.assert_allclose(losses[0], losses[1])


def refused(objective, error, words, model=None, guide=None, **given):
    first, second, _ = normals()
    with pytest.raises(error, match=words):
        TraceGrad_ELBO(**({"num_particles": 2} | given), objective=objective).loss_and_grads(
            model or first, guide or second
        )


def test_what_is_refused():
    _, guide, proposal = normals()

    def without():
        pyro.sample("z", dist.Normal(array(0.0), 1.0))

    def larger():
        pyro.sample("z", dist.Normal(array([0.0, 1.0]), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(array(0.0), 1.0))

    def observed():
        pyro.sample("z", dist.Normal(array(0.0), 1.0), obs=array(0.0))
        pyro.sample("y", dist.Normal(array(0.0), 1.0))

    refused(LogVariance(without), ProgramError, "Site 'y' of the guide is not drawn by the objective's proposal.*'z'")
    refused(LogVariance(observed), ProgramError, "Site 'z' of the guide is not drawn")
    refused(LogVariance(larger), ProgramError, r"Site 'z' has shape \(2,\) in the objective's proposal and shape \(\)")
    refused(LogVariance(), ConfigurationError, "one particle has none", num_particles=1)
    refused(LogVariance(samples=1), ConfigurationError, "one particle has none")
    refused(LogVariance(), ConfigurationError, "drop higher_order=True", higher_order=True)
    refused(
        LogVariance(), EstimatorError, "Site 'z' names DisARM.*no site has an estimator", estimators={"z": DisARM()}
    )
    refused(LogVariance(), EstimatorError, "'entropy' of site 'z'", closed_form={"z": "entropy"})
    pyro.param("log_normalizer", array([1.0, 2.0]))
    refused(TrajectoryBalance(), ConfigurationError, r"has shape \(2,\)")
    for make in (lambda: LogVariance(3), lambda: TrajectoryBalance("r"), lambda: TrajectoryBalance(log_normalizer="")):
        with pytest.raises(ConfigurationError):
            make()

    def alone():
        pyro.sample("u", dist.Normal(array(0.0), 1.0))
        normals()[0]()

    refused(LogVariance(proposal), ProgramError, "Site 'u' is drawn by the model alone", model=alone)


def test_minibatches_that_would_be_squared_are_refused():
    def model():
        with pyro.plate("data", 3, subsample_size=2) as index:
            z = pyro.sample("z", dist.Bernoulli(array(0.3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=array(shared.X)[index])

    def guide():
        with pyro.plate("data", 3, subsample_size=2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array([0.2, 0.1]))))

    refused(TrajectoryBalance(), ProgramError, "Site 'z' stands in the subsampled plate 'data'|Site 'x'", model, guide)
    refused(LogVariance(plates=()), ProgramError, "in the subsampled plate 'data'", model, guide)
    # The second particle reads its data at the elements that the first one drew.
    for objective in (LogVariance(), IWAE()):
        TraceGrad_ELBO(2, objective=objective).loss_and_grads(model, guide)


def test_checks_are_refused_and_descriptions_say_why():
    model, guide, _ = normals()
    for given in (
        {"elbo": TraceGrad_ELBO(2, objective=LogVariance())},
        {"objective": LogVariance(), "num_particles": 2},
    ):
        with pytest.raises(ConfigurationError, match="nothing can be checked"):
            check_gradients(model, guide, **given)
    rows = TraceGrad_ELBO(2, objective=LogVariance()).describe(model, guide).rows
    assert {row["reason"] for row in rows} == {"no estimator: draws are constants under LogVariance"}


def test_a_module_holds_the_normalizer():
    model, guide, proposal = normals()
    module = TraceGrad_ELBO(2, objective=TrajectoryBalance(proposal))(model, guide).initialize()
    assert [name for name, _ in module.named_parameters()] == ["log_normalizer"]
    module().backward()
    assert next(module.parameters()).grad.abs() > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective_of", [LogVariance, pytest.param(TrajectoryBalance, marks=pytest.mark.exhaustive)])
def test_two_modes(objective_of):
    """At uniform draws the guide finds both modes, where the evidence lower bound stays in one."""
    model, guide, uniform = shared.two_modes(HOST)
    masses = []
    for objective in ({}, {"objective": objective_of(uniform)}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = TraceGrad_ELBO(16, vectorize_particles=True, max_plate_nesting=0, **objective)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        for _ in range(400):
            svi.step()
        masses.append(shared.mass_of_the_other_mode(pyro.param("a").detach().numpy(), pyro.param("b").detach().numpy()))
    assert masses[0] < 0.02 and abs(masses[1] - shared.MASS) < 0.05
    if objective_of is TrajectoryBalance:
        assert abs(pyro.param("log_normalizer").item() - shared.EVIDENCE) < 0.2
