"""On a GPU: the gradients that a CPU gives, compiled steps that are eager ones, and no step that makes the host wait."""

import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pplgrad import (
    IWAE,
    DecayingAverage,
    DisARM,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    NeuralBaseline,
    ScoreFunction,
)
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._compile.cuda_graphs import Replays
from pplgrad.testing.in_pyro import HOST, assert_same, exact_gradient, expected_gradient, fresh, gradient
from pplgrad.testing.programs import CASES
from tests.fitting import CONTINUOUS, DISCRETE, fitting
from tests.pyro.compiling import assert_like_eager, assert_same_training, graphs, train
from tests.pyro.test_compile import changes, program
from tests.pyro.test_compile_everything import one_generator  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LEARNED = ScoreFunction(DecayingAverage() + NeuralBaseline(hidden=(3,)))
KINDS = {
    "score": ScoreFunction(),
    "learned": LEARNED,
    "loo": ScoreFunction(LeaveOneOut()),
    "disarm": DisARM(),
    "local": LocalExpectation(),
    "gumbel": GumbelSoftmax(0.5),
}


@pytest.fixture(autouse=True)
def on_gpu(clean):
    """Let tensors be made on the GPU where nothing else is said."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


class DrawnOnCpu(TorchDispatchMode):
    """Takes all random numbers from the CPU's generator, so that both devices get the same."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        found = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        device = found[0].device if found else torch.device(kwargs.get("device") or "cpu")
        away = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        if "device" in kwargs:
            away[1]["device"] = torch.device("cpu")
        out = func(*away[0], **away[1])
        if func._schema.is_mutable:
            return args[0].copy_(out)
        return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, out)


def estimate(device, program, particles, **options):
    """Return loss and gradient of the second step on a device."""
    with torch.device(device):
        model, guide = program()
        elbo = TraceGrad_ELBO(particles, vectorize_particles=True, max_plate_nesting=1, **options)
        for _ in range(2):
            pyro.set_rng_seed(3)
            with DrawnOnCpu():
                loss = elbo.loss_and_grads(model, guide)
            found = gradient()
    pyro.clear_param_store()
    return {"loss": np.array(loss), **found}


def assert_same_on_both(program, particles, **options):
    on_cpu, on_gpu = (estimate(device, program, particles, **options) for device in ("cpu", "cuda"))
    assert on_cpu.keys() == on_gpu.keys()
    for name, value in on_cpu.items():
        np.testing.assert_allclose(on_gpu[name], value, rtol=1e-9, atol=1e-11)


def hierarchy():
    fresh(CASES["hierarchy"])
    return CASES["hierarchy"].build(HOST)


def a_normal():
    p = torch.tensor([0.3, -0.2], dtype=torch.float64)

    def run(name, observed):
        loc = pyro.param(name, p)
        w = pyro.sample("w", dist.Normal(loc[0], 0.8 + 0.1 * loc[1] ** 2))
        with pyro.plate("data", 3):
            if observed:
                pyro.sample("x", dist.Bernoulli(logits=loc[1] + w), obs=torch.tensor([0.0, 1.0, 1.0]))

    return lambda: run("p", True), lambda: run("q", False)


@pytest.mark.parametrize(("estimator", "objective"), list(fitting(DISCRETE)))
def test_every_estimator_of_discrete_sites(estimator, objective):
    assert_same_on_both(hierarchy, 2, estimators={"*": estimator}, objective=objective)


@pytest.mark.parametrize(("estimator", "objective"), list(fitting(CONTINUOUS)))
def test_every_estimator_of_continuous_sites(estimator, objective):
    assert_same_on_both(a_normal, 2, estimators={"w": estimator}, objective=objective)


@pytest.mark.parametrize("name", CASES)
def test_the_exact_gradient_of_every_program(name):
    chosen = dict.fromkeys(CASES[name].latents, LEARNED)
    found = expected_gradient(CASES[name], lambda: TraceGrad_ELBO(estimators=chosen), 1)
    assert_same(found, exact_gradient(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_every_program_compiled(name):
    assert_like_eager(CASES[name], estimators=dict.fromkeys(CASES[name].latents, LEARNED), steps=4)


@pytest.mark.parametrize("estimator", list(KINDS.values()), ids=list(KINDS))
def test_estimators_compiled(estimator, one_generator):  # noqa: F811
    assert_like_eager(CASES["hierarchy"], 2, True, estimators={"*": estimator}, steps=4)


def belief_network(rows=5):
    """Return a program of two layers that makes no tensor of Python's numbers, and its argument."""
    start = {"a": torch.full((4, 3), 0.3), "b": torch.full((3, 2), -0.2), "c": torch.full((3,), 0.1)}
    start |= {"d": torch.full((2, 3), 0.4), "e": torch.full((3, 4), 0.2)}

    def guide(x):
        with pyro.plate("data", x.shape[-2]):
            z = pyro.sample("z1", dist.Bernoulli(logits=x @ pyro.param("a", start["a"])).to_event(1))
            pyro.sample("z2", dist.Bernoulli(logits=z @ pyro.param("b", start["b"])).to_event(1))

    def model(x):
        with pyro.plate("data", x.shape[-2]):
            z = pyro.sample("z2", dist.Bernoulli(logits=pyro.param("c", start["c"])[:2]).to_event(1))
            z = pyro.sample("z1", dist.Bernoulli(logits=z @ pyro.param("d", start["d"])).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ pyro.param("e", start["e"])).to_event(1), obs=x)

    return model, guide, (torch.rand(rows, 4) < 0.5).double()


def waits(function):
    """Return where a function made the host wait for the GPU: the last lines of ours or of Pyro's that led there."""
    found = []

    def note(message, *_args, **_kwargs):
        if "called a synchronizing" in str(message):
            ours = [f for f in traceback.extract_stack() if "pplgrad" in f.filename or "pyro" in f.filename]
            found.append(" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(ours[-4:-1])))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.grid
@pytest.mark.parametrize("given", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("estimator", list(KINDS.values()), ids=list(KINDS))
def test_a_step_waits_for_its_loss_alone(estimator, given):
    model, guide, x = belief_network()
    elbo = TraceGrad_ELBO(2, vectorize_particles=True, max_plate_nesting=1, compile=given, estimators={"*": estimator})
    with pyro.validation_enabled(False):
        for _ in range(6):
            elbo.loss_and_grads(model, guide, x)
        # One of three is watched again.
        found = [waits(lambda: elbo.loss_and_grads(model, guide, x)) for _ in range(3)]
    assert min(map(len, found)) == 1, list(map(Counter, found))


def trained(cuda_graph, batches, **options):
    pyro.clear_param_store()
    model, guide, _ = belief_network()
    compiled = {"cuda_graph": cuda_graph}
    elbo = TraceGrad_ELBO(2, vectorize_particles=True, max_plate_nesting=1, compile=compiled, **options)
    seen = []
    for batch in batches:
        steps, store = train(elbo, model, guide, (batch,), steps=1)
        seen += steps
    assert graphs(elbo) == 1
    (step,) = (known.compiled for known in elbo._structures._known.values())
    assert isinstance(step.graph, Replays) == cuda_graph
    return seen, store


@pytest.mark.parametrize("estimator", [LEARNED, DisARM()], ids=["learned", "disarm"])
def test_kernels_started_together(estimator):
    """The same batch again and again, then new ones: what the kernels give that are started one by one."""
    first, *others = (belief_network()[2] for _ in range(4))
    batches = [first] * 5 + others * 2
    wanted, found = (trained(together, batches, estimators={"*": estimator}) for together in (False, True))
    assert_same_training(wanted, found)


@pytest.mark.parametrize("name", [name for name, *_ in changes() if name not in ("rate", "mode", "mutable")])
def test_what_kernels_read_is_never_stale(name):
    """Over both values of the site, its gradient does not depend on its draw."""
    read, change = {each: found for each, *found in changes()}[name]
    model, guide = program(read)
    chosen = {"estimators": {"z": LocalExpectation()}}
    elbo = TraceGrad_ELBO(compile=True, **chosen)
    gradients = []
    for _ in range(2):
        for _ in range(5):
            elbo.loss_and_grads(model, guide)
            gradients.append(gradient()["a"])
        wanted = TraceGrad_ELBO(**chosen)
        wanted.loss_and_grads(model, guide)
        np.testing.assert_allclose(gradients[-1], gradient()["a"], rtol=1e-9)
        change()
    assert abs(gradients[4] - gradients[-1]).max() > 1e-6


def test_gradients_add_up():
    model, guide, x = belief_network()
    elbo = TraceGrad_ELBO(compile=True, estimators={"*": ScoreFunction()})
    singles = []
    for step in range(7):
        pyro.set_rng_seed(step)
        elbo.loss_and_grads(model, guide, x)
        singles.append(gradient())
    for step in (5, 6):
        pyro.set_rng_seed(step)
        elbo.loss_and_grads(model, guide, x)
    total = gradient()
    for name in total:
        np.testing.assert_allclose(total[name], singles[5][name] + singles[6][name], rtol=1e-9)


def test_fresh_numbers_and_seeds():
    model, guide, x = belief_network(40)
    elbo = TraceGrad_ELBO(compile=True)
    losses = [elbo.loss_and_grads(model, guide, x) for _ in range(8)]
    assert len(set(losses)) == 8
    repeated = []
    for _ in range(2):
        pyro.set_rng_seed(11)
        repeated.append([elbo.loss_and_grads(model, guide, x) for _ in range(3)])
    assert repeated[0] == repeated[1] and len(set(repeated[0])) == 3


def test_compiled_steps_are_unbiased_with_inductors_numbers():
    case = CASES["hierarchy"]
    wanted = exact_gradient(case)
    fresh(case)
    model, guide = case.build(HOST)
    elbo = TraceGrad_ELBO(20_000, vectorize_particles=True, max_plate_nesting=1, compile=True)
    found = []
    for _ in range(23):
        elbo.loss_and_grads(model, guide)
        found.append(gradient())
    assert graphs(elbo) == 1
    for name, value in wanted.items():
        each = np.stack([g[name] for g in found[3:]])
        error = each.std(axis=0, ddof=1) / len(each) ** 0.5
        assert (np.abs(each.mean(axis=0) - value) <= 5 * error + 1e-12).all(), name


def test_objective_of_many_particles():
    assert_like_eager(CASES["subsampled"], 2, True, objective=IWAE(plates=()))


def test_bfloat16_products():
    """Under autocast a step stays right: matrix products in bfloat16, all else as it is."""
    torch.set_default_dtype(torch.float32)
    model, guide, x = belief_network(2000)
    x = x.float()
    results = []
    for given in (False, True):
        for low in (False, True):
            pyro.clear_param_store()
            elbo = TraceGrad_ELBO(50, vectorize_particles=True, max_plate_nesting=1, compile=given)
            with torch.autocast("cuda", torch.bfloat16, enabled=low):
                for _ in range(4):
                    elbo.loss_and_grads(model, guide, x)
                    found = gradient()
            results.append(np.concatenate([found[name].ravel() for name in sorted(found)]))
    for result in results[1:]:
        assert np.linalg.norm(result - results[0]) < 0.05 * np.linalg.norm(results[0])
