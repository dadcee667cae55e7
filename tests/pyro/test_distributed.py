"""Two processes, each with half of every minibatch, train as one process with all of it: DistributedDataParallel over gloo."""

import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from pyro.poutine.messenger import Messenger
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pplgrad import (
    ARMS,
    IWAE,
    REBAR,
    RELAX,
    VIMCO,
    Auto,
    ConfigurationError,
    Constant,
    DecayingAverage,
    DisARM,
    FunctionBaseline,
    LeaveOneOut,
    LocalExpectation,
    NeuralBaseline,
    OptimalConstant,
    Reparam,
    ScoreFunction,
)
from pplgrad.core.data_parallel import share
from pplgrad.core.noise import Noise, replaced_noise
from pplgrad.core.plates import Plate
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._distributed import TorchDataParallel
from tests.covering import asked

TOTAL, BATCH, FEATURES, LATENTS, STEPS = 40, 10, 3, 2, 3
RNG = torch.Generator().manual_seed(0)
DATA = torch.randn(TOTAL, FEATURES, generator=RNG, dtype=torch.float64)
BATCHES = [torch.randperm(TOTAL, generator=RNG)[:BATCH] for _ in range(STEPS)]


def in_and_out(baseline):
    """A baseline at a site in the data's plate, and at one outside, whose costs come from all processes."""
    return {"b": ScoreFunction(baseline), "z": ScoreFunction(baseline), "y": ScoreFunction(baseline)}


# Estimators, particles, objective: "b" and "g" are outside the data's plate, and IWAE has the sites of the plate alone.
CASES = {
    "leave-one-out": (in_and_out(LeaveOneOut()), 3, None),
    "constant": (in_and_out(Constant(-3.0)), 1, None),
    "function": ({"z": ScoreFunction(FunctionBaseline(lambda x, i: x[i].sum(-1) - 5))}, 1, None),
    "average": (in_and_out(DecayingAverage(0.8)), 2, None),
    "average-per-element": (in_and_out(DecayingAverage(0.8, per_element=True)), 2, None),
    "optimal-constant": (in_and_out(OptimalConstant()), 3, None),
    "optimal-past": (in_and_out(OptimalConstant(decay=0.8)), 2, None),
    "optimal-past-per-element": (in_and_out(OptimalConstant(decay=0.8, per_element=True)), 1, None),
    "neural": ({"*": ScoreFunction(NeuralBaseline(inputs=lambda x, i: x[i])), "g": Reparam(), "b": DisARM()}, 1, None),
    "average+neural": (in_and_out(DecayingAverage(0.8) + NeuralBaseline()), 2, None),
    "normalized": ({"z": ScoreFunction(NeuralBaseline(normalize_variance=True)), "y": DisARM()}, 2, None),
    "disarm": ({"z": DisARM(), "y": DisARM(), "b": DisARM()}, 2, None),
    "arms": ({"z": ARMS(3), "y": ARMS(3), "b": LocalExpectation()}, 1, None),
    "local-expectation": ({"z": LocalExpectation(), "y": LocalExpectation(), "b": LocalExpectation()}, 1, None),
    "several-draws": ({"z": ScoreFunction(samples=3), "y": ScoreFunction(samples=2), "b": DisARM()}, 1, None),
    "rebar": ({"z": REBAR(), "y": DisARM(), "b": DisARM()}, 1, None),
    "relax": ({"z": RELAX(), "y": DisARM(), "b": DisARM()}, 1, None),
    "average-summed": ({"z": DisARM(), "y": ScoreFunction(DecayingAverage(0.8)), "b": DisARM()}, 1, None),
    "vimco": ({"z": VIMCO(), "y": VIMCO()}, 3, IWAE()),
    "iwae-average": ({"z": ScoreFunction(DecayingAverage(0.8)), "y": ScoreFunction(NeuralBaseline())}, 3, IWAE()),
    "iwae-disarm": ({"z": DisARM(), "y": DisARM()}, 3, IWAE()),
}


class Forced(Messenger):
    """Makes a draw a function of its distribution and of uniform numbers that belong to its datum."""

    def __init__(self, step, indices, particles, first):
        super().__init__()
        self.step, self.indices, self.particles, self.first = step, indices, particles, first

    def _pyro_sample(self, msg):
        if msg["name"] not in ("b", "g", "z", "y") or msg["done"] or msg["value"] is not None:
            return
        fn, name = msg["fn"], msg["name"]
        event = tuple(fn.event_shape)
        size = TOTAL if name in ("z", "y") else 1
        # Not by torch, which would be seen as a draw beside the sites.
        numbers = np.random.default_rng((self.step, ord(name))).random((8, size, *event))
        uniform = torch.as_tensor(numbers[self.first : self.first + self.particles])
        uniform = uniform[:, self.indices] if name in ("z", "y") else uniform
        rows = fn.batch_shape[0] if len(fn.batch_shape) == 2 else 1
        uniform = uniform.repeat_interleave(rows // self.particles, 0) if rows > 1 else uniform[0]
        uniform = uniform.reshape(fn.shape())
        if name == "g":
            msg["value"] = fn.loc + fn.scale * torch.special.ndtri(uniform)
        else:
            msg["value"] = (uniform < getattr(fn, "base_dist", fn).probs).double()
        msg["done"] = True


class TableNoise(Noise):
    """An estimator's noise, in which each datum has numbers of its own."""

    def __init__(self, step, indices, site, ops):
        super().__init__(ops)
        self.generator = torch.Generator().manual_seed(777 + 1000 * step + ord(site))
        self.indices = indices

    def uniform(self, shape, like):
        axes = [axis for axis, size in enumerate(shape) if size == len(self.indices)]
        whole = [TOTAL if axis in axes[:1] else size for axis, size in enumerate(shape)]
        numbers = torch.rand(whole, generator=self.generator, dtype=torch.float64)
        return numbers.index_select(axes[0], self.indices) if axes else numbers


class Model(torch.nn.Module):
    def __init__(self, global_sites, summed=False):
        super().__init__()
        self.global_sites, self.summed = global_sites, summed
        self.decode = torch.nn.Parameter(torch.linspace(-1, 1, LATENTS * FEATURES).reshape(LATENTS, FEATURES))
        self.shift = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, indices):
        b = g = torch.zeros(())
        if self.global_sites:
            b = pyro.sample("b", dist.Bernoulli(0.3))
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", TOTAL, subsample=indices):
            z = pyro.sample("z", dist.Bernoulli(torch.full((LATENTS,), 0.4)).to_event(1))
            y = pyro.sample("y", dist.Bernoulli(logits=(z.sum(-1) - 1) * self.shift))
            if self.summed:
                y = y + pyro.sample("k", dist.Bernoulli(logits=self.shift - y), infer={"enumerate": "parallel"})
            mean = (z + b[..., None]) @ self.decode + (y * g)[..., None]
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x[indices])


class Guide(torch.nn.Module):
    def __init__(self, global_sites):
        super().__init__()
        self.encode = torch.nn.Parameter(torch.linspace(-0.5, 0.6, FEATURES * LATENTS).reshape(FEATURES, LATENTS))
        self.bias = torch.nn.Parameter(torch.tensor(0.2))
        self.loc = torch.nn.Parameter(torch.tensor(0.1)) if global_sites else None

    def forward(self, x, indices):
        if self.loc is not None:
            pyro.sample("b", dist.Bernoulli(logits=self.bias))
            pyro.sample("g", dist.Normal(self.loc, 0.7))
        with pyro.plate("data", TOTAL, subsample=indices):
            z = pyro.sample("z", dist.Bernoulli(logits=x[indices] @ self.encode).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=z.sum(-1) * self.bias + x[indices, 0]))


@contextmanager
def forced(step, indices, particles, first):
    with Forced(step, indices, particles, first), replaced_noise(partial(TableNoise, step, indices)):
        yield


def sharded(module):
    """Split a module's parameters over the processes; scalars stay whole, which `fully_shard` does not take."""
    for x in module.parameters():
        # DistributedDataParallel copies those of the first process to all, and fully_shard does not.
        distributed.broadcast(x.data, 0)
    scalars = {x for x in module.parameters() if x.dim() == 0}
    return fully_shard(module, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)), ignored_params=scalars)


def gradient(x):
    """Return a parameter's gradient; a process that holds no part of a small parameter has none."""
    return torch.zeros_like(x) if x.grad is None else x.grad


def whole(x):
    """Return a parameter or a gradient as one tensor."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def trained(name, rank, world, process_group, split="data", wrap=DistributedDataParallel):
    """Return losses, gradients, parameters and states of a few steps of one process, or of one among others."""
    estimators, particles, objective = CASES[name]
    pyro.clear_param_store()
    torch.manual_seed(rank)
    data, first = (world, 0) if split == "data" else (1, rank * particles)
    model, guide = Model(objective is None, name == "average-summed"), Guide(objective is None)
    chosen = {} if objective is None else {"objective": objective}
    elbo = TraceGrad_ELBO(
        particles, 1, vectorize_particles=True, estimators=estimators, process_group=process_group, **chosen
    )
    parts = [batch.chunk(data)[rank if data > 1 else 0] for batch in BATCHES]
    # Forced here too, because what the generator has drawn before decides the networks' first weights.
    with forced(0, parts[0], particles, first):
        module = elbo(model, guide).initialize(DATA, parts[0])
    wrapped = wrap(module) if distributed.is_initialized() else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    found = {}
    for step, part in enumerate(parts):
        optimizer.zero_grad()
        with forced(step, part, particles, first):
            loss = wrapped(DATA, part)
        loss.backward()
        if wrap is sharded and distributed.is_initialized():
            for x in module.parameters():
                if not isinstance(x, DTensor):
                    distributed.all_reduce(x.grad.div_(world))
        found[f"{step} loss"] = loss.detach()
        found |= {f"{step} gradient {key}": whole(gradient(x)) for key, x in module.named_parameters()}
        optimizer.step()
    found |= {f"parameter {key}": whole(x) for key, x in module.named_parameters()}
    return found | {f"state {key}": x for key, x in states().items()}


def states():
    """Return the averages in the param store."""
    kept = {key: x.detach().clone() for key, x in pyro.get_param_store().items() if "$$$" not in key}
    return {key: x for key, x in kept.items() if key.split(".")[-1] in ("mean", "square", "weighted", "weight")}


FULLY_SHARDED = ("leave-one-out", "average", "neural", "arms", "rebar", "relax", "vimco")
# What two processes do where each takes itself for the only one.
ALONE = ("leave-one-out", "constant", "average", "average-per-element", "neural")


def worker(rank, world, folder, wanted):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    jobs = {name: partial(trained, name, rank, world, True) for name in CASES}
    jobs |= {f"{name} alone": partial(trained, name, rank, world, False) for name in ALONE}
    jobs |= {f"{name} sharded": partial(trained, name, rank, world, True, wrap=sharded) for name in FULLY_SHARDED}
    jobs["particles"] = partial(trained, "leave-one-out", rank, world, False, "particles")
    found = {name: jobs[name]() for name in wanted}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    # A server that has loaded this module starts both, or each would load it by itself.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    multiprocessing.start_processes(worker, (2, folder, asked(request, "job")), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def differences(processes, name, expected):
    """Return how far two processes are from one, by what kind of number; they must agree with each other."""
    first, second = (found[name] for found in processes)
    assert set(first) == set(second) == set(expected)
    result = {}
    for key, x in expected.items():
        kind = key.split()[1] if key[0].isdigit() else key.split()[0]
        found = (first[key] + second[key]) / 2 if kind == "loss" else first[key]
        scale = 1 + float(x.abs().max())
        result[kind] = max(result.get(kind, 0.0), float((found - x).abs().max()) / scale)
        if kind != "loss":
            result["apart"] = max(result.get("apart", 0.0), float((first[key] - second[key]).abs().max()))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("job", CASES)
def test_two_processes_train_as_one(processes, job):
    with torch.random.fork_rng():
        found = differences(processes, job, trained(job, 0, 1, False))
    assert max(found.values()) < 1e-11, found
    assert ("state" in found) == any(word in job for word in ("average", "past", "normalized", "function"))


@pytest.mark.slow
@pytest.mark.parametrize("job", [f"{name} sharded" for name in FULLY_SHARDED])
def test_parameters_may_be_split_too(processes, job):
    with torch.random.fork_rng():
        found = differences(processes, job, trained(job.split()[0], 0, 1, False))
    assert max(found.values()) < 1e-11, found


@pytest.mark.slow
@pytest.mark.parametrize("job", [f"{name} alone" for name in ALONE])
def test_without_a_process_group_baselines_are_those_of_each_process(processes, job):
    """What needs nothing from the others is right all the same; the rest shows that the test above can fail."""
    name = job.split()[0]
    with torch.random.fork_rng():
        found = differences(processes, job, trained(name, 0, 1, False))
    if name == "leave-one-out":
        assert max(found.values()) < 1e-11
    else:
        # An average for each element is not wrong where the element comes back to the same process.
        assert found["state" if name == "average-per-element" else "gradient"] > 1e-6
        assert "state" not in found or found["apart"] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("job", ["particles"])
def test_particles_may_be_split_instead(processes, job):
    """The mean over processes of the gradient of each one's own particles, among which leave-one-out stays."""
    halves = []
    with torch.random.fork_rng():
        for rank in range(2):
            halves.append(trained("leave-one-out", rank, 1, False, "particles"))
    for key in halves[0]:
        if key.startswith("0"):
            expected = (halves[0][key] + halves[1][key]) / 2
            found = [process[job][key] for process in processes]
            found = sum(found) / 2 if "loss" in key else found[0]
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_example_is_the_same_in_one_process():
    command = [sys.executable, Path(__file__).parents[2] / "examples" / "distributed_pyro.py", "--steps", "5"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    apart = [float(text) for text in re.findall(r"together off by (\S+) of it", shown)]
    assert len(apart) == 9 and max(apart) < 1e-4


def test_a_group_must_be_there():
    for group in (True, None):
        with pytest.raises(ConfigurationError, match="init_process_group"):
            TraceGrad_ELBO(process_group=group)


@pytest.fixture
def alone_of_two():
    """An ELBO that takes itself for one of two processes, and whose exchange with the other is counted."""
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(DecayingAverage(0.5)), "y": DisARM()})
    elbo._peers = TorchDataParallel(None, 2, exchanging=False)
    return elbo


def program(rows, value=0.3):
    with pyro.plate("data", 4, subsample=rows):
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(value))))
        pyro.sample("y", dist.Bernoulli(logits=z))


def test_a_step_along_one_process_gradient_is_refused(alone_of_two):
    with pytest.raises(ConfigurationError, match=r"SVI.step.*DistributedDataParallel"):
        alone_of_two.loss_and_grads(program, program, torch.arange(2))


def test_each_process_would_measure_for_itself(alone_of_two):
    elbo = alone_of_two.with_estimators({"*": Auto(measure=True, seconds=0.1)})
    with pytest.raises(ConfigurationError, match="measure in one process"):
        elbo.differentiable_loss(program, program, torch.arange(2))


def test_what_one_process_does_alone_waits_for_nobody(alone_of_two, monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce", lambda *args, **kwargs: pytest.fail("an exchange"))
    alone_of_two._peers = TorchDataParallel(None, 2)
    alone_of_two.diagnose(program, program, torch.arange(2))
    alone_of_two(program, program).initialize(torch.arange(2))


def test_initialize_changes_nothing_but_what_is_learned():
    estimators = {"z": ScoreFunction(DecayingAverage(0.5) + NeuralBaseline()), "y": REBAR()}
    module = TraceGrad_ELBO(estimators=estimators)(program, program)
    before = torch.get_rng_state()
    assert module.initialize(torch.arange(2)) is module
    assert torch.equal(torch.get_rng_state(), before)
    assert states() == {}
    names = dict(module.named_parameters())
    assert {"baseline_z_1.0.weight", "learned_y_log_temperature", "learned_y_scale"} < set(names)
    module(torch.arange(2)).backward()
    assert all(x.grad is not None for x in names.values())
    assert names["learned_y_scale"] is pyro.get_param_store()["pplgrad.baseline.y.scale"].unconstrained()


def test_share_is_the_number_of_processes_in_a_subsampled_plate_alone():
    peers, whole, part = TorchDataParallel(None, 3), Plate("a", -1, 4, 4), Plate("b", -2, 2, 4)
    assert [share(peers, plates) for plates in ([], [whole], [whole, part])] == [1, 1, 3]
    assert share(None, [part]) == 1
