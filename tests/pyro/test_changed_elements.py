"""Branches that change one element each, followed from the draw: what a program run for each of them gives."""

import copy
import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional

from pplgrad import LocalExpectation
from pplgrad.engine import changed_elements as shared
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._recording import is_recording
from pplgrad.pyro._rerun import branches, changed_elements
from pplgrad.pyro._rerun.changed_elements import ChangedRun
from pplgrad.pyro._rerun.operations_of_rows import Unfollowed
from tests.branching import OF_ELEMENTS

RNG = np.random.default_rng(0)
SHAPE = (2, 3, 4)  # a plate, and two dimensions of elements
DRAWN = torch.tensor(RNG.integers(0, 3, SHAPE))
OTHERS = torch.stack([(DRAWN + 1) % 3, (DRAWN + 2) % 3])
W, U, V = (torch.tensor(RNG.normal(size=shape)) for shape in ((4, 5), (3, 4, 5), SHAPE))
TABLE = torch.tensor(RNG.normal(size=(3, 6)))
HALF = torch.linspace(0.01, 1.0, 60, dtype=torch.float64).reshape(12, 5)

PROGRAMS = {
    "density": lambda z: -functional.binary_cross_entropy_with_logits(V, z * 0.5, reduction="none").sum((-1, -2)),
    "density, the last dimension first": lambda z: (V * z).exp().sum(-1).sum(-1),
    "density, flattened": lambda z: (z * V).reshape(2, -1).sum(-1),
    "kept dimensions": lambda z: (z * V).sum((1, 2), keepdim=True) * W[0],
    "flattened and contracted": lambda z: torch.tanh(z * 1.0).reshape(2, -1) @ U.reshape(12, 5),
    "contracted and added": lambda z: torch.addmm(W[0, :5], (2.0 * z - 1.0).reshape(2, -1), U.reshape(12, 5)),
    "a linear layer": lambda z: functional.linear((2.0 * z - 1.0).reshape(2, -1), U.reshape(12, 5).T, W[1, :5]),
    "the other way round": lambda z: U.reshape(12, 5).T @ (2.0 * z).reshape(2, -1).T,
    "batched product": lambda z: torch.bmm((1.0 * z).reshape(2, 1, 12), U.reshape(1, 12, 5).expand(2, 12, 5)),
    "contracted in one dimension": lambda z: torch.tanh((z * 1.0) @ W).sum((1, 2)),
    "two layers": lambda z: torch.tanh((z * 2.0 - 1.0).flatten(1) @ U.reshape(12, 5)) @ W.T + W[:, 0],
    "three layers": lambda z: torch.relu(torch.tanh((z * 1.0).flatten(1) @ U.reshape(12, 5)) @ W.T) @ W,
    "nonlinear before the product": lambda z: (z * 0.3).exp().reshape(2, -1) @ U.reshape(12, 5),
    "squared product": lambda z: torch.bmm((z * V).reshape(2, 1, 12), (z * 1.0).reshape(2, 12, 1)),
    "embedded": lambda z: TABLE[z].sum((1, 2)),
    "gathered": lambda z: torch.stack([V, 2 * V, -V], -1).gather(-1, z[..., None])[..., 0].sum((1, 2)),
    "transposed": lambda z: (z.transpose(1, 2) * V.transpose(1, 2)).sum((1, 2)),
    "permuted": lambda z: (z.permute(2, 0, 1) * V.permute(2, 0, 1)).sum((0, 2)),
    "over the plate too": lambda z: (z * V).sum(),
    "over the plate alone": lambda z: (z * V).sum(0).exp().sum(),
    "cumulated": lambda z: (z * V).cumsum(1).sum((1, 2)),
    "normalised": lambda z: (z * V).log_softmax(-1).sum((1, 2)),
    "largest": lambda z: (z * V).amax((1, 2)),
    "whether any": lambda z: torch.where((z == 2).any(-1), 1.0, V[..., 0]).sum(-1),
    "whether all": lambda z: (z < 2).flatten(1).all(-1).double(),
    "between elements": lambda z: (z[..., 1:] * z[..., :-1]).sum((1, 2)) * 1.0,
    "mean": lambda z: (z * V).mean((1, 2)),
    "nothing of it": lambda z: V.sum((1, 2)),
    "itself": lambda z: z,
    "infinite": lambda z: torch.where(z == 1, -torch.inf, z * V).sum((1, 2)),
    "infinite and contracted": lambda z: (z * 1.0).log().reshape(2, -1) @ U.reshape(12, 5).abs(),
    "integers": lambda z: z.sum((1, 2)),
    "one-hot": lambda z: functional.one_hot(z, 3).double().flatten(1) @ torch.cat([HALF] * 3),
    "a difference of infinite numbers, decided": lambda z: (
        (torch.where(z == 1, -torch.inf, 1.0).flatten(1) @ HALF < 0) * 1.0
    ),
    "infinite weights": lambda z: torch.sigmoid((z - 0.5).flatten(1) @ torch.where(HALF > 0.9, torch.inf, HALF)),
    "a number beside arrays": lambda z: torch.tensor([0.1, 0.2], dtype=torch.float32) == z.sum() * 0.0 + 0.1,
    "a small number beside another": lambda z: z.sum().float() / 3 == torch.tensor(7 / 3, dtype=torch.float64),
    "whole numbers of two sizes": lambda z: torch.tensor([100, -100], dtype=torch.int8) > z.sum() * 50,
    "nothing is added": lambda z: torch.addmm(W[0] * torch.nan, (z * V).sum(1), W, beta=0),
    "in a condition that all branches share": lambda z: z * V if bool((z < 9).all()) else V,
}
AXES = {"both": (1, 2), "the last": (2,), "the middle": (1,), "the plate too": (0, 1, 2)}
NOT = {
    "reads the largest value": lambda z: functional.one_hot(z),
    "reads a value": lambda z: z * (2.0 if z[0, 0, 0] == DRAWN[0, 0, 0] else 1.0),
    "draws": lambda z: torch.bernoulli(torch.sigmoid(z * V)),
    "writes": lambda z: (z * V).add_(z),
    "writes into a buffer": lambda z: torch.zeros(SHAPE, dtype=torch.float64).copy_(z),
    "an operation without a rule": lambda z: torch.linalg.svdvals(z * V),
    "catches everything": lambda z: caught(z),
    "goes through NumPy": lambda z: torch.tensor(z.numpy()) * V,
    "goes through an array": lambda z: torch.from_numpy(np.asarray(z * V)),
    "goes through a list": lambda z: torch.tensor(z.tolist()) * V,
    "becomes a parameter": lambda z: torch.nn.Parameter(z * V) * 2,
    "is copied by Python": lambda z: copy.deepcopy(z) * V,
    "lends its storage": lambda z: torch.tensor([], dtype=z.dtype).set_(z.untyped_storage(), 0, SHAPE) * V,
    "replaces a tensor's elements": lambda z: replaced(z),
    "is computed with in Python": lambda z: (z * V).clone().apply_(lambda x: x * x),
    "views more numbers of a smaller type": lambda z: (z * V).view(torch.int32),
}


def test_a_view_of_a_smaller_type_is_no_reshape():
    with pytest.raises(Unfollowed):
        followed(NOT["views more numbers of a smaller type"], (2,))


def replaced(z):
    x = torch.zeros(SHAPE, dtype=torch.float64)
    x.data = z * V
    return x * 1.0


def caught(z):
    try:
        return torch.bernoulli(torch.sigmoid(z * V))
    except Exception:
        return z * V


def rows_of(axes, numbers=None):
    """Return the value in every branch, made entry by entry."""
    rows = []
    for place in np.ndindex(*(SHAPE[axis] for axis in axes)):
        at = [slice(None)] * 3
        for axis, i in zip(axes, place, strict=True):
            at[axis] = i
        for other in OTHERS:
            row = DRAWN.clone()
            row[tuple(at)] = other[tuple(at)]
            rows.append(row)
    return rows if numbers is None else [rows[i] for i in numbers]


def followed(program, axes, numbers=None):
    run = ChangedRun(DRAWN, OTHERS, axes, None if numbers is None else torch.tensor(numbers))
    with torch.no_grad(), run:
        found = program(run.value)
    if run.failed:
        raise Unfollowed
    return run.rows(found)


def assert_as_run(program, axes, numbers=None):
    expected = torch.stack([program(row) for row in rows_of(axes, numbers)])
    torch.testing.assert_close(followed(program, axes, numbers), expected, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_run_for_each_branch(name):
    assert_as_run(PROGRAMS[name], (1, 2))


@pytest.mark.parametrize("axes", [axes for axes in AXES.values() if axes != (1, 2)], ids=str)
def test_elements_along_other_axes(axes):
    for name in ("density", "flattened and contracted", "contracted in one dimension", "cumulated", "two layers"):
        assert_as_run(PROGRAMS[name], axes)


def test_of_some_branches_alone():
    for name in ("two layers", "density", "infinite"):
        assert_as_run(PROGRAMS[name], (1, 2), [5, 0, 23, 23])


@pytest.mark.parametrize("name", NOT)
def test_what_cannot_be_followed(name):
    with pytest.raises(Unfollowed):
        followed(NOT[name], (1, 2))


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the number of entries of the largest array that is made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


SPARSE = ("density", "density, flattened", "kept dimensions", "flattened and contracted", "contracted and added")
SPARSE += (
    "a linear layer",
    "the other way round",
    "batched product",
    "two layers",
    "embedded",
    "gathered",
    "transposed",
)
SPARSE += ("permuted", "over the plate too", "infinite", "whether all", "in a condition that all branches share")


@pytest.mark.parametrize("name", SPARSE)
def test_no_array_of_all_branches_before_a_sum(name):
    """What this is for: no array has all elements of all branches."""
    run = ChangedRun(DRAWN, OTHERS, (1, 2), None)
    with Sizes() as sizes, torch.no_grad():
        with run:
            found = PROGRAMS[name](run.value)
        if name != "in a condition that all branches share":
            run.rows(found)
    assert sizes.largest < 24 * DRAWN.numel()


MUTANTS = {
    "the drawn entry is summed too": (shared, "_sum_of_others", lambda _, x: x.sum(-1, keepdim=True).expand(x.shape)),
    "only what comes before is summed": (shared, "_sum_of_others", lambda _, x: x.cumsum(-1) - x),
    "products are not looked at": (changed_elements, "is_recording", lambda: True),
    "a number by itself is an array": (changed_elements, "as_type", lambda x, kind: x),
    "an operation on rows along the wrong dimension": (
        changed_elements,
        "of_rows",
        lambda f, args, rows, _: f(rows, *args[1:]),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, monkeypatch):
    monkeypatch.setattr(*MUTANTS[name])

    def differs(program):
        try:
            assert_as_run(program, (1, 2))
        except (AssertionError, Unfollowed):
            return True
        return False

    assert any(differs(program) for program in PROGRAMS.values())


X = torch.tensor(RNG.normal(size=(2, 3)))


def network(family):
    """Return a belief network with a plate of data: what follows the latents in the model is a network of them."""
    weights = torch.tensor(RNG.normal(size=(3, 4)))

    def latent(name, logits):
        if family == "binary":
            return pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1)) * 1.0
        if family == "counts":
            return pyro.sample(name, dist.Poisson((0.3 * logits).exp()).to_event(1))
        full = torch.stack([logits, -logits, 0.5 * logits], -1)
        values = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
        if family == "one-hot":
            return pyro.sample(name, dist.OneHotCategorical(logits=full).to_event(1)) @ values
        return values[pyro.sample(name, dist.Categorical(logits=full).to_event(1))]

    def model(x):
        w = pyro.param("w", weights.clone())
        with pyro.plate("data", 2):
            z = latent("z", torch.zeros(3, dtype=torch.float64))
            h = torch.tanh(0.4 * z @ w)
            pyro.sample("x", dist.Normal(h @ w.T, 1.0).to_event(1), obs=x)

    def guide(x):
        b = pyro.param("b", torch.eye(3, dtype=torch.float64) + 0.1)
        with pyro.plate("data", 2):
            latent("z", torch.tanh(x) @ b)

    return model, guide


STEPS = 8


def gradients(case, options, **more):
    model, guide = network(case.partition(",")[0])
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = TraceGrad_ELBO(max_plate_nesting=1, estimators={"z": OF_ELEMENTS[case]}, **options, **more)
    found = []
    for step in range(STEPS):
        pyro.set_rng_seed(step)
        elbo.loss_and_grads(model, guide, X)
        store = pyro.get_param_store()
        found.append({name: x.grad.clone() for name, x in store.named_parameters()})
        for _, x in store.named_parameters():
            x.grad = None
    return found


@pytest.mark.grid
@pytest.mark.parametrize(
    "options",
    [
        {"vectorize_particles": True},
        {"vectorize_particles": True, "num_particles": 3},
        {"vectorize_particles": True, "max_parallel": 4},
        {},
        {"num_particles": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", OF_ELEMENTS)
def test_the_gradient_is_the_one_without_it(case, options, monkeypatch):
    used = []
    network_state = RNG.bit_generator.state
    expected = gradients(case, options, reuse_structure=False)
    RNG.bit_generator.state = network_state
    follow = branches.PyroBranches._followed
    monkeypatch.setattr(branches.PyroBranches, "_followed", lambda *args: used.append(0) or follow(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(case, options)
    assert len(used) >= STEPS
    for one, other in zip(found, expected, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9)


def test_a_watched_step_compares(monkeypatch):
    """Were the rules wrong, the first step would say so, and the branches would be run from then on."""
    state = RNG.bit_generator.state
    expected = gradients("binary", {}, reuse_structure=False)
    RNG.bit_generator.state = state
    monkeypatch.setattr(shared, "_sum_of_others", MUTANTS["only what comes before is summed"][2])
    with pytest.warns(UserWarning, match="'z' that change one element .* reuse_structure=False") as seen:
        found = gradients("binary", {})
    assert len(seen) == 1
    for one, other in zip(found, expected, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9)


def test_what_cannot_be_followed_is_tried_once(monkeypatch):
    tried = []

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
            pyro.sample(
                "x", dist.Normal(torch.linalg.svdvals(z[..., None] * torch.ones(3))[..., 0], 1.0), obs=torch.ones(2)
            )

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(pyro.param("q", torch.full((3,), 0.6))).to_event(1))

    follow = branches.PyroBranches._followed
    monkeypatch.setattr(branches.PyroBranches, "_followed", lambda *args: tried.append(0) or follow(*args))
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(estimators={"z": LocalExpectation()})
    for _ in range(4):
        elbo.loss_and_grads(model, guide)
    assert len(tried) == 1


def in_thread(z):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.tanh(z) * 0.5))
    thread.start()
    thread.join()
    return found[0]


LEAVING = {
    "NumPy": lambda z: torch.tensor(np.tanh(z.detach().numpy())),
    "a list": lambda z: torch.tensor(z.tolist(), dtype=torch.float64),
    "a parameter": lambda z: torch.nn.Parameter(z * 1.0).detach(),
    "a thread": in_thread,
}


def last_gradients(way, **more):
    """Return the gradients of a few steps of a program with `way` between its latents and its data."""

    def model():
        w = pyro.param("w", W[:3].clone())
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(3, dtype=torch.float64)).to_event(1))
            data = torch.ones(2, 5, dtype=torch.float64)
            pyro.sample("x", dist.Normal(way(z) @ w, 1.0).to_event(1), obs=data)

    def guide():
        b = pyro.param("b", torch.ones(3, dtype=torch.float64))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=b).to_event(1))

    pyro.clear_param_store()
    estimators = {"z": LocalExpectation()}
    elbo = TraceGrad_ELBO(max_plate_nesting=1, estimators=estimators, vectorize_particles=True, **more)
    for step in range(3):
        pyro.set_rng_seed(step)
        elbo.loss_and_grads(model, guide)
    return {name: x.grad.clone() for name, x in pyro.get_param_store().named_parameters()}


@pytest.mark.parametrize("way", LEAVING)
def test_a_program_that_leaves_torch_runs_each_branch(way):
    """Nothing shows what is computed there in another branch. The first step compared both, and refused the program."""
    found, expected = last_gradients(LEAVING[way]), last_gradients(LEAVING[way], reuse_structure=False)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_of_a_coarser_type_is_compared_as_one(kind):
    """Its rounding is no misreading."""
    layer = torch.linspace(-1.1, 1.7, 9).reshape(3, 3).to(kind)

    def way(z):
        return torch.tanh(z.to(kind) @ layer).double()

    found, expected = last_gradients(way), last_gradients(way, reuse_structure=False)
    within = torch.finfo(kind).eps * 20
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=within, atol=within)


@pytest.mark.slow
def test_compiled(monkeypatch):
    """The recorded operations are those of branches that are followed, and give what an eager step gives on the same draws."""
    options, used = {"vectorize_particles": True, "num_particles": 2}, []
    state = RNG.bit_generator.state
    expected = gradients("categorical", options)
    RNG.bit_generator.state = state
    follow = branches.PyroBranches._followed
    monkeypatch.setattr(branches.PyroBranches, "_followed", lambda *args: used.append(is_recording()) or follow(*args))
    found = gradients("categorical", options, compile={"backend": "eager"})
    assert True in used
    for one, other in zip(found, expected, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9)
