"""Estimators that run the program at other values: exact over their finite noise, z-tests over the rest."""

from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.effect import GuideMessenger

from pplgrad import (
    REBAR,
    DisARM,
    EstimatorError,
    LeaveOneOut,
    LocalExpectation,
    ProgramError,
    Reparam,
    ScoreFunction,
    UnorderedSet,
)
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing import gradient_error, z_score
from pplgrad.testing.in_pyro import (
    HOST,
    array,
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    fresh,
)
from pplgrad.testing.programs import CASES, Case
from tests.branch_mutants import MUTANTS
from tests.branching import EXACT, NUMBERS, RANDOM, TOO_MANY, exact_pairs, numbers, random_pairs


def elbo(name, estimator, particles=1, vectorized=False):
    chosen = dict.fromkeys(CASES[name].latents, estimator)
    return TraceGrad_ELBO(particles, vectorize_particles=vectorized, max_plate_nesting=2, estimators=chosen)


def ways(pairs):
    """Return each pair with branches one by one and at once, where a program broadcasts.

    RODEO and DoubleCV one by one over one-hot vectors are as slow as all others together; MuProp's relaxed branches prove these.
    """
    for pair in pairs:
        short, name = pair.values
        if not (name == "one_hot" and short in ("rodeo", "double-cv")):
            yield pytest.param(short, name, False, marks=pair.marks, id=f"{short}-{name}-one-by-one")
        if name not in ("batch_without_plate", "subsampled", "categorical_index"):
            yield pytest.param(short, name, True, marks=pair.marks, id=f"{short}-{name}-at-once")


@pytest.mark.grid
@pytest.mark.parametrize(("short", "name", "vectorized"), list(ways(exact_pairs(TOO_MANY))))
def test_exact(short, name, vectorized):
    found = expected_gradient_over_cells(CASES[name], lambda: elbo(name, EXACT[short][0], 1, vectorized))
    assert_same(found, exact_gradient(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("short", [short for short, (_, names) in EXACT.items() if "single" in names])
def test_two_particles_exact(short):
    found = expected_gradient_over_cells(CASES["single"], lambda: elbo("single", EXACT[short][0], 2, True), 2)
    assert_same(found, exact_gradient(CASES["single"]))


MANY = {"particles": 500, "vectorized": True, "draws": 100}
"""50,000 draws, as the means of 500 at a time."""


@pytest.mark.grid(together="unbiased branches")
@pytest.mark.slow
@pytest.mark.parametrize(("short", "name"), random_pairs(TOO_MANY))
def test_unbiased(short, name):
    """Fewer draws than in NumPyro, where a step is a thousand times cheaper; the mathematics is the same code."""
    assert z_score(RANDOM[short][0], "pyro", name, **MANY) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vectorized", "particles", "draws"),
    [pytest.param(False, 2, 800, marks=pytest.mark.exhaustive), (True, 50, 100)],
    ids=["looped", "vectorized"],
)
def test_particles_unbiased(vectorized, particles, draws):
    assert z_score(DisARM(), "pyro", particles=particles, vectorized=vectorized, draws=draws) < 4.5


def moments(objective, family, draws):
    """Return the mean gradient and its standard error, over all coordinates in a row."""
    model, guide = numbers(HOST, family)
    rows = []
    for _ in range(draws):
        pyro.clear_param_store()
        objective.loss_and_grads(model, guide)
        store = dict(pyro.get_param_store().named_parameters())
        rows.append(
            np.concatenate([(store[n].grad if store[n].grad is not None else 0 * store[n]).detach() for n in "ms"])
        )
    return np.mean(rows, 0), np.std(rows, 0) / np.sqrt(draws)


def with_numbers(particles, estimator):
    """Return an objective with an estimator of the numbers."""
    chosen = {"x": estimator, "w": LocalExpectation()}
    return TraceGrad_ELBO(particles, vectorize_particles=True, max_plate_nesting=0, estimators=chosen)


@cache
def known_moments(law):
    """Return the moments that are known to be right of a family, for all its estimators."""
    plain = ScoreFunction(LeaveOneOut()) if law == "poisson" else Reparam()
    return moments(with_numbers(1000, plain), law, 200)


@pytest.mark.grid(together="numbers in branches")
@pytest.mark.slow
@pytest.mark.parametrize("family", NUMBERS)
def test_numbers_unbiased(family):
    """Against the mean of the score function with a leave-one-out baseline, or of the reparameterized gradient."""
    wanted, error = known_moments(family.split("-")[0])
    found, spread = moments(with_numbers(100, NUMBERS[family]), family, 300)
    assert np.all(np.abs(found - wanted) < 4.5 * np.sqrt(error**2 + spread**2) + 1e-12)


def test_draws_are_those_of_trace_elbo():
    """Branches leave the generator as the primary run does, and are not to be seen in the loss."""
    case = CASES["hierarchy"]
    model, guide = case.build(HOST)
    losses = []
    for objective in (elbo("hierarchy", LocalExpectation()), pyro.infer.Trace_ELBO()):
        fresh(case)
        pyro.set_rng_seed(3)
        losses.append([objective.loss_and_grads(model, guide) for _ in range(4)])
    np.testing.assert_allclose(*losses)


def test_branches_do_not_draw_the_next_step_s_numbers():
    """With them, parameters that a step moved would go with the draws of the next gradient."""
    noise = []

    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(0.3))))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        noise[-1].update((w - z).detach().flatten().numpy().round(9).tolist())

    def model():
        z = pyro.sample("z", dist.Bernoulli(array(0.5)))
        w = pyro.sample("w", dist.Normal(array(0.0), 1.0))
        pyro.factor("reward", z * w**2)

    estimators = {"z": LocalExpectation(), "w": Reparam()}
    objective = TraceGrad_ELBO(vectorize_particles=True, max_plate_nesting=0, estimators=estimators)
    for _ in range(5):
        noise.append(set())
        objective.loss_and_grads(model, guide)
    assert all(len(numbers) == 2 for numbers in noise)  # The particle's, and its other branch's.
    assert len(set.union(*noise)) == 10


class Posterior(GuideMessenger):
    """A guide that is a handler, and runs the model itself."""

    def get_posterior(self, name, prior):
        return dist.Bernoulli(logits=pyro.param("l" + name, array(LOGITS[name])))


LOGITS = {"z": 0.3, "w": [-0.4, 0.6]}


def handled():
    z = pyro.sample("z", dist.Bernoulli(array(0.4)))
    pyro.sample("y", dist.Normal(3 * z, 1.0), obs=array(1.4))
    with pyro.plate("data", 2):
        w = pyro.sample("w", dist.Bernoulli(array(0.2)))
        pyro.sample("x", dist.Normal(2 * w, 1.0), obs=array([0.2, -0.5]))


def handled_gradient():
    """Return the gradient of the loss under `Posterior`, over both values of each draw."""
    data = {"z": (0.4, 3.0, array(1.4)), "w": (0.2, 2.0, array([0.2, -0.5]))}
    found = {}
    for name, (prior, slope, observed) in data.items():
        logits = array(LOGITS[name]).requires_grad_()
        q, loss = torch.sigmoid(logits), 0.0
        for value, probability in ((array(0.0), 1 - q), (array(1.0), q)):
            log_p = dist.Bernoulli(array(prior)).log_prob(value) + dist.Normal(slope * value, 1.0).log_prob(observed)
            loss = loss - (probability * (log_p - probability.log())).sum()
        loss.backward()
        found["l" + name] = logits.grad.numpy()
    return found


@pytest.mark.grid
@pytest.mark.parametrize("vectorized", [False, True], ids=["one-by-one", "at-once"])
@pytest.mark.parametrize("particles", [1, 3])
def test_a_guide_that_runs_the_model_itself(vectorized, particles):
    """Its branches run as it does; each site's gradient is exact whatever is drawn, as none follows another."""
    options = {"vectorize_particles": vectorized, "max_plate_nesting": 1}
    for _ in range(3):
        pyro.clear_param_store()
        TraceGrad_ELBO(particles, estimators={"*": LocalExpectation()}, **options).loss_and_grads(
            handled, Posterior(handled)
        )
        found = {name: leaf.grad.numpy() for name, leaf in pyro.get_param_store().named_parameters()}
        assert_same(found, handled_gradient())
    with pytest.raises(ProgramError, match="The guide Posterior runs the model itself, where draws cannot be relaxed"):
        TraceGrad_ELBO(particles, estimators={"*": REBAR()}, **options).loss_and_grads(handled, Posterior(handled))


@pytest.mark.parametrize("vectorized", [False, True], ids=["looped", "vectorized"])
def test_a_guide_that_runs_the_model_itself_needs_no_setting(vectorized):
    params = {"l" + name: np.array(x) for name, x in LOGITS.items()}
    case = Case("handled", params, {"z": ((), 2), "w": ((2,), 2)}, lambda host: (handled, Posterior(handled)))

    def default():
        return TraceGrad_ELBO(2, vectorize_particles=vectorized, max_plate_nesting=1)

    assert_same(expected_gradient(case, default, 2), handled_gradient())


def chosen(a):
    """Draw a Bernoulli under an estimator of its own, whose logit is the parameter a."""
    return pyro.sample("z", dist.Bernoulli(logits=a), infer={"estimator": LocalExpectation()})


def test_hidden_draws_are_those_of_the_primary_run():
    """What a guide draws under block is the same in every branch: the local expectation sees one world, not two."""
    seen = []

    def guide():
        with pyro.poutine.block():
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
        seen.append(h)
        chosen(pyro.param("a", array(0.3)) + h)

    def model():
        z = pyro.sample("z", dist.Bernoulli(array(0.4)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=array(0.3))

    TraceGrad_ELBO().loss_and_grads(model, guide)
    # The run, a second one that it is compared with, and the branch.
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    at_once = TraceGrad_ELBO(vectorize_particles=True, max_plate_nesting=0)
    for _ in range(4):
        with pytest.raises(ProgramError, match="draws random numbers outside of its sample sites"):
            at_once.loss_and_grads(model, guide)


@pytest.mark.parametrize(
    ("estimator", "distribution", "words"),
    [
        (DisARM(), dist.Poisson(torch.tensor(2.0)), "Poisson is not binary"),
        (UnorderedSet(), dist.Poisson(torch.tensor(2.0)), "does not have finitely many values"),
        (LocalExpectation(), dist.Normal(0.0, 1.0), "does not have finitely many values"),
        (DisARM(), dist.Categorical(torch.ones(3)), "use one that fits there: CARMS.*, LocalExpectation"),
    ],
)
def test_misfits_are_refused(estimator, distribution, words):
    def program():
        pyro.sample("z", distribution)

    with pytest.raises(EstimatorError, match=words) as error:
        TraceGrad_ELBO(estimators={"z": estimator}).loss_and_grads(program, program)
    assert "'z'" in str(error.value)


@pytest.mark.grid(together="mutants of branches")
@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    mutant = MUTANTS[name]

    mutant.apply(monkeypatch)
    # That the sound ones pass is shown above, and for the same pairs in NumPyro, where it takes less time.
    if mutant.exact:
        assert gradient_error(mutant.estimator, "pyro", mutant.case) > 1e-6
    else:
        # A score of 8 is no chance after few draws either, which suffice for most.
        assert any(z_score(mutant.estimator, "pyro", mutant.case, **MANY | {"draws": n}) > 8 for n in (20, 100))
