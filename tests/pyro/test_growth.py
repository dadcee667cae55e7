"""How work grows: with the steps of a sequential loop, and with the branches of an estimator."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad import (
    CARMS,
    ConfigurationError,
    DisARM,
    GumbelSoftmax,
    LocalExpectation,
    MeasureValued,
    MuProp,
    ScoreFunction,
    SumAndSample,
    UnorderedSet,
)
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import assert_same, exact_gradient, expected_gradient_over_cells
from pplgrad.testing.programs import CASES


def markov(length):
    """Return a chain of so many Bernoulli sites in a loop of `pyro.markov`, each with one observation."""

    def model(data):
        z = torch.zeros(())
        for t in pyro.markov(range(length)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=0.2 + 0.4 * z))
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=data[t])

    def guide(data):
        logits, z = pyro.param("q", torch.full((length,), 0.3)), torch.zeros(())
        for t in pyro.markov(range(length)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=logits[t] - 0.5 * z))

    return model, guide


class Operations(TorchDispatchMode):
    """Counts tensor operations, and notes the entries of the largest result."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        results = result if isinstance(result, (tuple, list)) else (result,)
        # A view of an expanded array holds nothing.
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in results if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def watched(elbo, model, guide, *args):
    """Return the operations of a step, after those that find the program's structure."""
    pyro.clear_param_store()
    for _ in range(3):
        elbo.loss_and_grads(model, guide, *args)
    with Operations() as operations:
        elbo.loss_and_grads(model, guide, *args)
    return operations


def test_the_operations_of_a_chain_grow_linearly():
    counts = [
        watched(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), *markov(n), torch.zeros(n)).count
        for n in (5, 10, 20)
    ]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def test_an_earlier_cost_is_not_charged_to_a_later_draw():
    model, guide = markov(4)
    found = []
    for x in (0.0, 100.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        TraceGrad_ELBO(estimators={"*": ScoreFunction()}).loss_and_grads(model, guide, torch.tensor([0.0, x, 0.0, 0.0]))
        found.append(pyro.param("q").unconstrained().grad.numpy())
    np.testing.assert_array_equal(found[0][2:], found[1][2:])
    assert (found[0][:2] != found[1][:2]).all()


@pytest.mark.grid
@pytest.mark.parametrize("at_once", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("estimator", [LocalExpectation(), pytest.param(DisARM(), marks=pytest.mark.slow)])
def test_chunks_are_exact(estimator, at_once):
    """The expectation over all draws, those of what follows in branches among them."""
    case = CASES["hierarchy"]

    def elbo():
        chosen = dict.fromkeys(case.latents, estimator)
        return TraceGrad_ELBO(vectorize_particles=True, max_plate_nesting=2, estimators=chosen, max_parallel=at_once)

    assert_same(expected_gradient_over_cells(case, elbo), exact_gradient(case))


def network():
    """Return a network of 32 latents and 8 pixels, with 5 data."""
    latents, batch = 32, 5

    def model():
        w = pyro.param("w", torch.linspace(-1, 1, latents * 8).reshape(latents, 8))
        with pyro.plate("data", batch):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(latents)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=torch.ones(batch, 8))

    def guide():
        with pyro.plate("data", batch):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", 0.1 * torch.ones(latents))).to_event(1))

    return model, guide


@pytest.mark.parametrize("particles", [1, 2])
def test_chunks_change_nothing_and_bound_the_memory(particles):
    """Where nothing follows the site, chunks of 4 alternatives give the same gradient, and no array beyond them."""
    found, sizes = [], []
    for at_once in (None, 4 * particles):
        elbo = TraceGrad_ELBO(
            particles,
            vectorize_particles=True,
            max_plate_nesting=1,
            estimators={"z": LocalExpectation()},
            max_parallel=at_once,
        )
        sizes.append(watched(elbo, *network()).largest)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo.loss_and_grads(*network())
        found.append({name: pyro.param(name).unconstrained().grad.numpy() for name in "wa"})
    assert_same(found[1], found[0], 1e-12)
    row = particles * 5 * 32
    # The categories' tables have two entries for each latent.
    assert sizes[1] <= 2 * 4 * row < 32 * row <= sizes[0]


def test_other_numbers_of_rows_are_refused():
    for rows, particles, words in (
        (0, 1, "1 or more"),
        (True, 1, "1 or more"),
        (3, 4, "4 particles run at once already"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            TraceGrad_ELBO(particles, vectorize_particles=True, max_parallel=rows)
    with pytest.raises(ConfigurationError, match="branches run one by one"):
        TraceGrad_ELBO(4, max_parallel=8)


def of_categories(count, law):
    """Return a program of one site of so many categories, drawn as numbers or as a one-hot vector."""
    rewards = torch.linspace(0.0, 1.0, count)

    def model():
        z = pyro.sample("z", law(logits=torch.zeros(count)))
        reward = (
            (z * rewards).sum(-1)
            if law is dist.OneHotCategorical
            else rewards.index_select(0, z.reshape(-1)).reshape(z.shape)
        )
        pyro.factor("f", reward)

    def guide():
        pyro.sample("z", law(logits=pyro.param("l", torch.zeros(count))))

    return model, guide


@pytest.mark.parametrize(
    ("estimator", "law"),
    [
        *((e, dist.Categorical) for e in (ScoreFunction(), ScoreFunction(samples=3), CARMS(3))),
        *((e, dist.Categorical) for e in (UnorderedSet(3), SumAndSample(3), MeasureValued(), LocalExpectation())),
        *((e, dist.OneHotCategorical) for e in (ScoreFunction(), UnorderedSet(3), GumbelSoftmax(), MuProp())),
    ],
    ids=str,
)
def test_operations_and_memory_in_categories(estimator, law):
    """No more operations, and results that grow as the categories do."""
    found = []
    for count in (60, 240):
        every = isinstance(estimator, (LocalExpectation, MeasureValued))
        # Each branch is a run of the program, which holds its categories: so many at once.
        options = {"vectorize_particles": True, "max_plate_nesting": 0, "max_parallel": 20} if every else {}
        elbo = TraceGrad_ELBO(estimators={"z": estimator}, **options)
        found.append(watched(elbo, *of_categories(count, law)))
    small, large = found
    assert isinstance(estimator, (LocalExpectation, MeasureValued)) or large.count <= 1.2 * small.count
    assert large.largest <= 6 * small.largest
