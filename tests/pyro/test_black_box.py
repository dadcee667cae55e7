"""A NumPy function that is called element by element: exact, kept apart, refused where it must be, in Pyro."""

import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import DisARM, GumbelSoftmax, LocalExpectation, ScoreFunction
from pplgrad.engine.layout import Layout
from pplgrad.errors import CompileError, EstimatorError, ProgramError
from pplgrad.pyro import TraceGrad_ELBO, black_box
from pplgrad.pyro._tracing.provenance import PlateAxis, Provenance
from pplgrad.pyro._tracing.watchers import watching
from pplgrad.testing.in_pyro import (
    HOST,
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    fresh,
)
from tests.black_boxes import RETURNED, WRONG, claim_events, less_their_mean, mixed, plated
from tests.pyro.compiling import CHEAP

ESTIMATORS = [ScoreFunction(), LocalExpectation(), DisARM()]


def expected(case, estimator, particles=1, together=False):
    """Return the expected gradient with an estimator at all sites."""
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    elbo = TraceGrad_ELBO(particles, 1, vectorize_particles=together, estimators=dict.fromkeys(case.latents, estimator))
    return over(case, lambda: elbo, particles)


@pytest.mark.grid
@pytest.mark.parametrize("vectorized", [False, True], ids=["each", "whole"])
@pytest.mark.parametrize(
    "estimator", [pytest.param(e, marks=[pytest.mark.slow] * isinstance(e, DisARM)) for e in ESTIMATORS], ids=repr
)
def test_exact(estimator, vectorized):
    case = plated(black_box, vectorized)
    assert_same(expected(case, estimator), exact_gradient(case))


@pytest.mark.parametrize("case", [plated(black_box), mixed(black_box)], ids=["plated", "mixed"])
def test_exact_with_particles_together(case):
    assert_same(expected(case, ScoreFunction(), 2, True), exact_gradient(case))


@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation()], ids=repr)
def test_what_reads_the_whole_plate_is_charged_whole(estimator, monkeypatch):
    """And a rule that took it for elementwise would be seen."""
    case = mixed(black_box)
    wanted = exact_gradient(case)
    assert_same(expected(case, estimator), wanted)
    claim_events(monkeypatch)
    found = expected(case, ScoreFunction())
    assert max(np.abs(found[name] - wanted[name]).max() for name in wanted) > 1e-3


def layouts(case, monkeypatch, steps=1, **settings):
    """Return along which plates the reward reads other elements, for each layout that is built in some steps."""
    made, plain = [], Layout.build.__func__

    def build(cls, sites, costs, *rest):
        (cost,) = [cost for cost in costs if cost.name == "reward"]
        made.append({name: read.across for name, read in cost.reads.items()})
        return plain(cls, sites, costs, *rest)

    monkeypatch.setattr(Layout, "build", classmethod(build))
    fresh(case)
    model, guide = case.build(HOST)
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, **settings)
    for _ in range(steps):
        elbo.loss_and_grads(model, guide)
    return made


@pytest.mark.parametrize("settings", [{}, {"num_particles": 3, "vectorize_particles": True}], ids=["one", "three"])
def test_elements_stay_apart(settings, monkeypatch):
    apart = {"z": frozenset(), "w": frozenset()}
    assert layouts(plated(black_box), monkeypatch, **settings)[0] == apart
    assert layouts(mixed(black_box), monkeypatch, **settings)[0] == {"z": frozenset({"p"})}


def test_the_structure_is_reused(monkeypatch):
    made = layouts(plated(black_box), monkeypatch, 6, reuse_structure="warn")
    assert len(made) < 6


def test_axes():
    """Batch axes follow, event axes are mixed, and an axis of size 1 is read by all."""
    with Provenance() as provenance:
        plates = [PlateAxis("a", -2), PlateAxis("b", -3)]
        x = provenance.tag("x", torch.rand(4, 3, 2), plates)
        wide = provenance.tag("y", torch.rand(3, 1), [PlateAxis("a", -2)])

        def across(found, site="x", at=(-2, -1)):
            assert provenance.names(provenance.of(found)) >= [site]
            return set(provenance.mixed(found, site, [("b", at[0]), ("a", at[1])]))

        assert across(black_box(np.sum, x, event_dim=1)) == set()
        assert across(black_box(lambda x: x, x, event_dim=1, shape=(2,)), at=(-3, -2)) == set()
        assert across(black_box(np.sum, x, event_dim=2), at=(-1, -1)) == {"a"}
        assert across(black_box(np.sum, x.transpose(0, 1), event_dim=1), at=(-1, -2)) == set()
        both = black_box(lambda x, y: x.sum() + y, x, wide[:, 0], event_dim=(1, 0))
        assert across(both) == set() and provenance.mixed(both, "y", [("a", -1)]) == set()
        assert provenance.mixed(black_box(np.add, wide, torch.ones(3)), "y", [("a", -2)]) == set()
        assert provenance.mixed(black_box(np.add, wide.T, wide), "y", [("a", -1)]) == {"a"}
        assert not provenance.names(provenance.of(black_box(np.exp, torch.ones(2))))
        assert provenance.read_at is None and provenance.unfollowed_at is None and not provenance.escaped
    assert not watching()


def test_another_thread_is_not_watched():
    with Provenance() as provenance:
        x, found = provenance.tag("x", torch.ones(2)), []
        thread = threading.Thread(target=lambda: found.append(black_box(np.exp, torch.ones(2))))
        thread.start()
        thread.join()
        assert provenance.names(provenance.of(found[0])) == ["x"] and provenance.of(x)


def test_a_function_may_use_torch():
    network = torch.nn.Linear(2, 1)
    with Provenance() as provenance:
        x = provenance.tag("x", torch.rand(3, 2), [PlateAxis("a", -2)])
        found = black_box(lambda row: float(network(torch.as_tensor(row))), x, event_dim=1)
        assert provenance.read_at is None and not provenance.mixed(found, "x", [("a", -1)])
    assert torch.allclose(found, network(x)[:, 0]) and not found.requires_grad


def test_values():
    x = torch.arange(6.0, requires_grad=True).reshape(3, 2)
    found = black_box(lambda x, k: x.sum() + k, x, torch.tensor([[1], [2]]), event_dim=(1, 0))
    assert found.dtype == torch.get_default_dtype() and not found.requires_grad
    assert found.tolist() == [[2.0, 6.0, 10.0], [3.0, 7.0, 11.0]]
    assert black_box(lambda x: x > 1, 2.0).item() == 1.0
    assert black_box(np.exp, torch.ones(0, 3)).shape == (0, 3)
    torch.set_default_dtype(torch.float32)
    assert black_box(np.exp, torch.ones(2, dtype=torch.float64)).dtype == torch.float32
    assert black_box(np.exp, torch.zeros(2, dtype=torch.bfloat16)).tolist() == [1.0, 1.0]


def test_what_a_function_writes_into_its_arguments_stays_there():
    def write(x):
        x += 1
        return x.sum(-1)

    x = torch.zeros(3, 2)
    assert black_box(write, x, event_dim=1).tolist() == [2.0] * 3
    assert black_box(write, x, event_dim=1, vectorized=True).tolist() == [2.0] * 3
    assert not x.any()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_from_the_start(name):
    function, shape, settings, said = WRONG[name]
    with pytest.raises(ProgramError, match=said):
        black_box(function, torch.ones(shape), **settings)
    with pytest.raises(ProgramError, match="'exp' has values of batch shapes.*do not broadcast"):
        black_box(np.exp, torch.ones(2), torch.ones(3))
    with pytest.raises(ProgramError, match="'exp' has no values"):
        black_box(np.exp)
    with pytest.raises(ProgramError, match="'exp' got a value whose numbers cannot be read"):
        torch.vmap(lambda x: black_box(np.exp, x))(torch.ones(2))


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_is_wrong(name):
    function, settings, said = RETURNED[name]
    with pytest.raises(ProgramError, match=said), Provenance():
        black_box(function, torch.tensor([1.0, 2.0]), **settings)


def program(function, **settings):
    def model():
        with pyro.plate("p", 2):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.factor("reward", black_box(function, z, **settings))

    def guide():
        with pyro.plate("p", 2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(2))))

    return model, guide


def test_rows_that_are_mixed_are_found_in_a_step():
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()}, reuse_structure=False)
    with pytest.raises(ProgramError, match="'less_their_mean'.*drop vectorized=True"):
        for _ in range(20):
            elbo.loss_and_grads(*program(less_their_mean, vectorized=True))


def test_a_step_is_not_compiled():
    model, guide = program(np.exp)
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()}, compile=CHEAP)
    with pytest.raises(CompileError, match="test_black_box.py"):
        for _ in range(8):
            elbo.loss_and_grads(model, guide)
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()}, compile={**CHEAP, "fallback": True})
    with pytest.warns(UserWarning, match="go on eagerly"):
        losses = [elbo.loss_and_grads(model, guide) for _ in range(8)]
    assert len(set(losses)) > 1


def test_a_relaxed_value_is_refused():
    elbo = TraceGrad_ELBO(estimators={"z": GumbelSoftmax()})
    with pytest.raises(EstimatorError, match=r"Site 'z' is relaxed.*\(black_box\)"):
        elbo.loss_and_grads(*program(np.exp))
