"""Subsets and rankings: their laws, and estimators at them, against enumeration."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import (
    REBAR,
    RELAX,
    SIMPLE,
    EstimatorError,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    ScoreFunction,
    StraightThrough,
)
from pplgrad.core.noise import replaced_noise
from pplgrad.pyro import PermutationMatrix, PlackettLuce, Subset, TraceGrad_ELBO, check_gradients
from pplgrad.testing import gradient_error, z_score
from pplgrad.testing.in_pyro import HOST, assert_same, exact_gradient, expected_gradient
from pplgrad.testing.structured import MATRICES, STRUCTURED
from tests import structures
from tests.covering import mostly
from tests.pyro.compiling import assert_like_eager


@pytest.mark.parametrize(("n", "k"), structures.LAWS)
@pytest.mark.parametrize("impossible", [False, True])
def test_law_of_subsets(n, k, impossible):
    logits = structures.some_logits(n, impossible and n > k)
    law = Subset(k, torch.tensor(logits))
    values = law.enumerate_support()
    for row in (0, 1):
        wanted, probs = structures.law(logits[row], k)
        mean, cov = structures.covariance(logits[row], k)
        found = {tuple(z.tolist()): float(p) for z, p in zip(values[:, row], law.log_prob(values)[:, row], strict=True)}
        assert len(found) == len(wanted)
        np.testing.assert_allclose([np.exp(found[tuple(z)]) for z in wanted], probs, atol=1e-12)
        np.testing.assert_allclose(law.mean[row], mean, atol=1e-12)
        np.testing.assert_allclose(law.variance[row], np.diag(cov), atol=1e-12)
        own, can = torch.tensor(logits[row]), wanted[probs > 0]
        jacobian = torch.autograd.functional.jacobian(lambda x: Subset(k, x).mean, own)  # noqa: B023
        np.testing.assert_allclose(jacobian, cov, atol=1e-11)
        scores = torch.autograd.functional.jacobian(lambda x: Subset(k, x).log_prob(torch.tensor(can)), own)  # noqa: B023
        np.testing.assert_allclose(scores, np.where(np.isfinite(logits[row]), can - mean, 0.0), atol=1e-11)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2), (5, 4)])
def test_draws_of_subsets(n, k):
    logits = structures.some_logits(n, True)
    torch.manual_seed(1)
    drawn = Subset(k, torch.tensor(logits)).sample((20_000,)).numpy()
    assert drawn.shape == (20_000, 2, n) and (drawn.sum(-1) == k).all()
    for row in (0, 1):
        values, probs = structures.law(logits[row], k)
        found = (drawn[:, row, None] == values).all(-1).mean(0)
        assert (np.abs(found - probs) < 5 * np.sqrt(probs * (1 - probs) / 20_000) + 1e-12).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_law_of_rankings(n):
    logits = structures.some_logits(n, False)
    law = PlackettLuce(torch.tensor(logits))
    found = law.log_prob(law.enumerate_support())
    torch.manual_seed(0)
    drawn = law.sample((20_000,)).numpy()
    for row in (0, 1):
        orders, log_probs = structures.rankings(logits[row])
        np.testing.assert_array_equal(law.enumerate_support()[:, row], orders)
        np.testing.assert_allclose(found[:, row], log_probs, atol=1e-11)
        often, probs = (drawn[:, row, None] == orders).all(-1).mean(0), np.exp(log_probs)
        assert (np.abs(often - probs) < 5 * np.sqrt(probs * (1 - probs) / 20_000) + 5e-4).all()  # Of rare ones, ten.


def test_extreme_logits_stay_finite():
    far = torch.tensor([0.0, -2000.0, -3000.0, 1500.0], dtype=torch.float64)
    np.testing.assert_allclose(PlackettLuce(far).log_prob(torch.tensor([2, 1, 0, 3])), -9500.0)
    wide = torch.linspace(-900.0, 900.0, 200, dtype=torch.float64, requires_grad=True)
    found = Subset(50, wide).log_prob((torch.arange(200) >= 150).double())
    assert -1e-3 < found.item() <= 0
    assert torch.autograd.grad(found, wide)[0].isfinite().all()


def test_shapes_and_support():
    law = Subset(2, torch.zeros(3, 4))
    wide = law.expand((5, 3))
    assert wide.sample().shape == (5, 3, 4) and wide.mean.shape == (5, 3, 4) and wide.expand((2, 5, 3)).k == 2
    assert wide.log_prob(torch.tensor([1.0, 1, 0, 0])).shape == (5, 3)
    assert wide.enumerate_support().shape == (6, 5, 3, 4) and wide.enumerate_support(False).shape == (6, 1, 1, 4)
    assert law.support.check(law.sample()).all() and not law.support.check(torch.ones(3, 4)).any()
    with pytest.raises(ValueError, match="support"):
        Subset(2, torch.zeros(4), validate_args=True).log_prob(torch.ones(4))
    ranked = PlackettLuce(torch.zeros(3, 4))
    assert ranked.expand((5, 3)).sample().shape == (5, 3, 4)
    assert ranked.support.check(ranked.sample()).all() and not ranked.support.check(torch.zeros(3, 4).long()).any()
    for large in (Subset(20, torch.zeros(40)), PlackettLuce(torch.zeros(9))):
        assert not large.has_enumerate_support
        with pytest.raises(NotImplementedError, match="too many"):
            large.enumerate_support()


@pytest.mark.parametrize("make", [
    lambda: Subset(0, torch.zeros(3)),
    lambda: Subset(4, torch.zeros(3)),
    lambda: Subset(2.0, torch.zeros(3)),
    lambda: Subset(2, torch.tensor([0.0, -torch.inf, -torch.inf]), validate_args=True),
    lambda: Subset(1, torch.tensor([0.0, torch.nan]), validate_args=True),
    lambda: PlackettLuce(torch.tensor([0.0, -torch.inf]), validate_args=True),
    lambda: PlackettLuce(1.0),
])  # fmt: skip
def test_bad_arguments(make):
    with pytest.raises(ValueError, match=r"Subset\(|PlackettLuce"):
        make()


@pytest.mark.grid
@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("short", structures.EXACT)
def test_exact_gradient(name, short):
    estimator, particles = structures.EXACT[short]
    assert gradient_error(estimator, "pyro", name, particles=particles) < 1e-9


@pytest.mark.parametrize("short", structures.RELAXED)
def test_relaxed_gradient(short):
    estimator = structures.RELAXED[short]
    with replaced_noise(structures.fixed_noise):
        found = expected_gradient(structures.CASE, lambda: TraceGrad_ELBO(estimators={"z": estimator}), 1)
    np.testing.assert_allclose(found["a"], structures.expected(estimator), atol=1e-9)


def learn(law, cost=lambda z: (z * torch.arange(4.0)).sum(-1)):
    """Return a program of one site."""

    def model():
        z = pyro.sample("z", law(torch.zeros(4)))
        pyro.factor("f", cost(z))

    def guide():
        pyro.sample("z", law(pyro.param("a", torch.tensor([0.1, 0.2, -0.4, 0.3]))))

    return model, guide


def pairs(logits):
    return Subset(2, logits)


@pytest.mark.parametrize(("law", "estimator"), [
    (pairs, GumbelSoftmax()),
    (pairs, StraightThrough()),
    (pairs, REBAR()),
    (PlackettLuce, RELAX()),
    (lambda x: dist.Poisson(x.exp()).to_event(1), RELAX(through_cost=False)),
    (PlackettLuce, REBAR()),
    (PermutationMatrix, GumbelSoftmax()),
    (PermutationMatrix, LocalExpectation()),
    (PlackettLuce, SIMPLE()),
    (lambda x: dist.Bernoulli(logits=x).to_event(1), SIMPLE()),
])  # fmt: skip
def test_what_does_not_fit_is_refused(law, estimator):
    model, guide = learn(law)
    with pytest.raises(EstimatorError, match="site 'z'"):
        TraceGrad_ELBO(estimators={"z": estimator}).loss_and_grads(model, guide)


def test_a_long_subset_is_not_listed():
    def model():
        pyro.factor("f", pyro.sample("z", Subset(20, torch.zeros(40)))[0])

    def guide():
        pyro.sample("z", Subset(20, pyro.param("a", torch.linspace(-1.0, 1.0, 40))))

    with pytest.raises(EstimatorError, match="site 'z': Subset has too many values to list"):
        TraceGrad_ELBO(estimators={"z": LocalExpectation()}).loss_and_grads(model, guide)
    for estimator in (ScoreFunction(samples=2), SIMPLE()):
        objective = TraceGrad_ELBO(estimators={"z": estimator})
        objective.loss_and_grads(model, guide)
        assert dict(pyro.get_param_store().named_parameters())["a"].grad.isfinite().all()


def test_a_relaxed_bernoulli_does_not_fit_a_subset():
    def model():
        pyro.sample("z", Subset(2, torch.zeros(4)))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(4))).to_event(1))

    with pytest.raises(EstimatorError, match="Site 'z' is relaxed"):
        TraceGrad_ELBO(estimators={"z": GumbelSoftmax()}).loss_and_grads(model, guide)


def test_misuse_of_a_relaxed_subset_is_refused():
    model, guide = learn(pairs, lambda z: torch.where(z[0] == 1, 1.0, 2.0))
    with pytest.raises(EstimatorError, match="'z'"):
        TraceGrad_ELBO(estimators={"z": SIMPLE()}).loss_and_grads(model, guide)


@pytest.mark.slow
def test_certificate_by_enumeration():
    model, guide = learn(pairs)
    estimators = {"z": ScoreFunction(LeaveOneOut())}
    found = check_gradients(
        model, guide, estimators=estimators, num_particles=2, reference="enumeration", draws=200, tolerance=0.9
    )
    assert found.status == "unbiased"


@pytest.mark.grid(together="mutants of structures")
@pytest.mark.parametrize("name", structures.MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    assert structures.law_error(Subset, PlackettLuce, torch.tensor) < 1e-11
    structures.MUTANTS[name](monkeypatch)
    assert structures.law_error(Subset, PlackettLuce, torch.tensor) > 1e-3


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ranking", pytest.param("subset", marks=pytest.mark.exhaustive)])
def test_a_network_alone_is_a_control_variate(name):
    """That tests would see a wrong one is shown in NumPyro, whose draws cost less."""
    assert z_score(structures.NETWORK, "pyro", name, draws=2_000) < 4.5


def test_subsets_and_rankings_are_summed_out_of_a_model():
    made = structures.summed_out(HOST)
    assert_same(expected_gradient(made.case, TraceGrad_ELBO, 1), exact_gradient(made.by_hand))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "estimator"), [
    ("subset_chain", LocalExpectation()),
    ("ranking_plate", structures.NETWORK),
    ("permutation", structures.MATRIX_RANDOM["rebar-warm"]),
])  # fmt: skip
def test_compiled_steps(name, estimator):
    # Branches that run one by one begin where the primary run began, and go on from it in a compiled step: other draws, as good.
    case = {**STRUCTURED, **MATRICES}[name]
    assert_like_eager(case, particles=2, vectorized=True, estimators={"*": estimator}, steps=6)


@pytest.mark.grid
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("short", structures.MATRIX)
def test_exact_gradient_of_matrices(name, short):
    estimator, particles = structures.MATRIX[short]
    assert gradient_error(estimator, "pyro", name, particles=particles) < 1e-9


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("short", mostly(["rebar"], structures.MATRIX_RANDOM))
def test_relaxed_matrices_are_a_control_variate(short):
    assert z_score(structures.MATRIX_RANDOM[short], "pyro", "permutation", draws=1_000) < 4.5


def test_law_of_matrices():
    logits = torch.tensor(structures.some_logits(4, False))
    torch.manual_seed(0)
    order = PlackettLuce(logits).sample((7,))
    law = PermutationMatrix(logits, validate_args=True)
    matrices = torch.nn.functional.one_hot(order, 4).double()
    np.testing.assert_allclose(law.log_prob(matrices), PlackettLuce(logits).log_prob(order), atol=1e-12)
    torch.manual_seed(0)
    drawn = law.expand((3, 2)).sample((7,))
    assert drawn.shape == (7, 3, 2, 4, 4) and law.support.check(drawn).all() and drawn.dtype == logits.dtype
    assert law.expand((3, 2)).log_prob(drawn).shape == (7, 3, 2)
    with pytest.raises(ValueError, match="support"):
        law.log_prob(torch.ones(2, 4, 4) / 4)
    assert not law.has_enumerate_support
