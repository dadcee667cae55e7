"""Two processes train a sigmoid belief network as one: each has half of every batch, and their gradients are averaged.

Process r of R draws its n/R images of a batch in a plate of the full size N, where each counts N R/n times. The mean over processes

    1/R Σ_r ∇ Σ_{i in r} N R/n (f_i − b(x_i)) log q(z_i) = ∇ Σ_i N/n (f_i − b(x_i)) log q(z_i)

is then the gradient of one process with all n, and with `process_group=True` the baseline b learns the same in both. In the end
both gradients are computed for the same draws, and compared.

    python examples/distributed_pyro.py --steps 300
    torchrun --nproc-per-node 2 examples/distributed_pyro.py --steps 300
"""

import os
import tempfile
import time
from types import SimpleNamespace

import click
import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from _story import model_script
from pyro import poutine
from torch.nn.parallel import DistributedDataParallel

from pplgrad import NeuralBaseline, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO

BATCH = 100
CHOICE = {"z1": ScoreFunction(NeuralBaseline(inputs=lambda images, rows: images))}


class Half(torch.nn.Module):
    """The model or the guide of models/sbn.py, with its parameters where DistributedDataParallel looks for them."""

    def __init__(self, script, train, seed, which, options=None):
        super().__init__()
        options = script.OPTIONS if options is None else options
        start = script.initial(options, train, seed)
        mine = {name: torch.tensor(x).float() for name, x in start.items() if name.startswith("encode") == which}
        self.weights = torch.nn.ParameterDict(mine)
        self.rows, total = None, len(train)
        library = SimpleNamespace(
            param=lambda name, _: self.weights[name],
            plate=lambda name, _: pyro.plate(name, total, subsample=self.rows),
            sample=pyro.sample,
        )
        self.program = script.program(library, dist, torch, torch.tensor, options, train.astype("float32"), seed)[which]

    def forward(self, images, rows):
        self.rows = rows
        self.program(images)


def train(rank, processes, steps, seed):
    """Train, and compare with one process; what is printed is the same in all processes."""
    torch.set_num_threads(1)
    script = model_script("sbn")
    pixels, _ = script.load(script.OPTIONS, seed)
    images = torch.tensor(pixels).float()
    model, guide = Half(script, pixels, seed, False), Half(script, pixels, seed, True)
    shuffled = torch.Generator().manual_seed(seed)
    # Each process draws its own latents.
    pyro.set_rng_seed(1000 * seed + rank)

    def batch():
        rows = torch.randperm(len(images), generator=shuffled)[:BATCH]
        return rows, rows.chunk(processes)[rank]

    _, rows = batch()
    elbo = TraceGrad_ELBO(estimators=CHOICE, process_group=True)
    module = elbo(model, guide).initialize(images[rows], rows)
    wrapped = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    begun = time.perf_counter()
    for step in range(steps):
        _, rows = batch()
        optimizer.zero_grad()
        loss = wrapped(images[rows], rows)
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            shown = loss.detach().clone()
            distributed.all_reduce(shown)
            say(rank, f"step {step:5}  ELBO {-shown / processes / len(images):7.2f} nats per image")
    say(rank, f"{1e3 * (time.perf_counter() - begun) / steps:.1f} ms a step on {processes} processes")
    compare(rank, wrapped, batch(), images, seed)


def compare(rank, wrapped, batch, images, seed):
    """Compute the gradient of one batch by all processes together and by each alone, for the same draws."""
    everything, mine = batch
    module = wrapped.module
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = poutine.trace(module.guide).get_trace(images[everything], everything)
    drawn.remove_node("data")
    part = drawn.copy()
    kept = torch.isin(everything, mine)
    part.nodes["z1"] = {**drawn.nodes["z1"], "value": drawn.nodes["z1"]["value"][kept]}

    module.zero_grad()
    with poutine.replay(trace=part):
        wrapped(images[mine], mine).backward()
    with poutine.replay(trace=drawn):
        loss = TraceGrad_ELBO(estimators=CHOICE)(module.model, module.guide)(images[everything], everything)
    names, leaves = zip(*module.named_parameters(), strict=True)
    alone = torch.autograd.grad(loss, leaves)
    for name, gradient, leaf in zip(names, alone, leaves, strict=True):
        apart = float((leaf.grad - gradient).norm() / gradient.norm())
        say(rank, f"{name:28} gradient {float(gradient.norm()):10.4g}, together off by {apart:.0e} of it")
    numbers = sum(leaf.numel() for leaf in leaves)
    say(rank, f"{numbers:,} numbers of 4 bytes are averaged in each step, and nothing else is sent")


def say(rank, text):
    if rank == 0:
        print(text, flush=True)


def process(rank, processes, steps, seed, rendezvous):
    """Run one process of the group that meets at a file, or at the address that torchrun gave."""
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    train(rank, processes, steps, seed)
    distributed.destroy_process_group()


@click.command(help=__doc__)
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1), help="Training steps.")
@click.option("--seed", default=0, show_default=True, type=int)
def main(steps, seed):
    if "RANK" in os.environ:
        process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), steps, seed, "env://")
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (2, steps, seed, f"file://{folder}/rendezvous"), nprocs=2)


if __name__ == "__main__":
    main()
