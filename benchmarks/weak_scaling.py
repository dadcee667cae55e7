"""How long a step takes as processes are added, each with as many rows as one had: `make bench-weak-scaling`.

One belief network of 200 latents is trained over loopback, by Pyro's DistributedDataParallel (gloo) and by a jitted NumPyro step over a mesh of
processes (`jax.distributed`, gloo). Where there are more processes than cores they take turns, and the least possible step is that of one
process times the processes on a core. The efficiency is that least step over the measured one. `exchange` is the all-reduce of as many numbers
as there are parameters, in one array, by itself, with the processes in step.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from benchmarks.shared import OPTIONS, ROOT, sbn

LATENTS, SEED = 200, 0
ESTIMATORS = ("default", "DisARM()")


def timed(step: Callable[[], Any], meet: Callable[[], Any], count: int) -> float:
    """Return the median milliseconds of a step that all processes begin together."""
    found = []
    for number in range(count + 5):
        meet()
        began = time.perf_counter()
        step()
        if number >= 5:
            found.append(1e3 * (time.perf_counter() - began))
    return float(np.median(found))


def pyro_process(address: str, rank: int, processes: int, steps: int, count: int) -> dict[str, dict[str, float]]:
    """Take steps as one process of Pyro's, and return what they took, by estimator."""
    import pyro
    import torch
    import torch.distributed as distributed
    from torch.nn.parallel import DistributedDataParallel

    sys.path.append(str(ROOT / "examples"))
    from distributed_pyro import Half

    from pplgrad.lab.specs import specification
    from pplgrad.pyro import TraceGrad_ELBO

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=processes)
    found = {}
    script, options = sbn(), {**OPTIONS, "latents": LATENTS}
    pixels, _ = script.load(options, SEED)
    images = torch.tensor(pixels).float()
    rows = (torch.arange(count) + count * rank) % len(images)
    for name in ESTIMATORS:
        pyro.clear_param_store()
        pyro.set_rng_seed(rank)
        model, guide = (Half(script, pixels, SEED, which, options) for which in (False, True))
        chosen = {} if name == "default" else specification(name).mapping(("z*",))
        elbo = TraceGrad_ELBO(estimators=chosen, process_group=True)
        module = elbo(model, guide).initialize(images[rows], rows)
        wrapped = DistributedDataParallel(module)
        adam = torch.optim.Adam(module.parameters(), lr=1e-6, fused=True)

        def step(wrapped: Any = wrapped, adam: Any = adam) -> None:
            adam.zero_grad()
            wrapped(images[rows], rows).backward()
            adam.step()

        numbers = torch.zeros(sum(p.numel() for p in module.parameters()))
        found[name] = {
            "parameters": float(len(numbers)),
            "step": timed(step, distributed.barrier, steps),
            "exchange": timed(lambda x=numbers: distributed.all_reduce(x), distributed.barrier, steps),
        }
    distributed.destroy_process_group()
    return found


def numpyro_process(address: str, rank: int, processes: int, steps: int, count: int) -> dict[str, dict[str, float]]:
    """Take steps as one process of NumPyro's, and return what they took, by estimator."""
    import jax

    jax.distributed.initialize(address, processes, rank)
    from jax.experimental.multihost_utils import sync_global_devices
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.lab.specs import specification
    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    mesh = jax.make_mesh((processes,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    script, options = sbn(), {**OPTIONS, "latents": LATENTS}
    pixels, _ = script.load(options, SEED)
    pixels = pixels.astype(np.float32)
    mine = pixels[(np.arange(count) + count * rank) % len(pixels)]
    x = jax.make_array_from_process_local_data(split, mine)
    model, guide = script.numpyro_program(options, pixels, SEED)
    found = {}

    def on_mesh(array: Any) -> Any:
        return jax.make_array_from_callback(np.shape(array), everywhere, lambda index: np.asarray(array)[index])

    def meet() -> None:
        sync_global_devices("step")

    for name in ESTIMATORS:
        chosen = {} if name == "default" else specification(name).mapping(("z*",))
        svi = SVI(model, config_estimators(guide, chosen), Adam(1e-6), TraceGrad_ELBO())
        begin = svi.init(jax.random.key(SEED), np.tile(mine, (processes, 1)))
        words = jax.random.key_data(begin.rng_key)
        state = [jax.tree.map(on_mesh, begin._replace(rng_key=np.asarray(words)))]

        @jax.jit
        def update(state: Any, x: Any, svi: Any = svi) -> Any:
            after, loss = svi.update(state._replace(rng_key=jax.random.wrap_key_data(state.rng_key)), x)
            return after._replace(rng_key=jax.random.key_data(after.rng_key)), loss

        def step(state: list = state, update: Any = update) -> None:
            state[0], loss = update(state[0], x)
            jax.block_until_ready(loss)

        numbers = sum(leaf.size for leaf in jax.tree.leaves(svi.get_params(begin)))
        summed = jax.jit(lambda x: x.sum(0), out_shardings=everywhere)
        parts = jax.make_array_from_process_local_data(split, np.zeros((1, numbers), np.float32))
        took = timed(step, meet, steps)
        exchange = timed(lambda f=summed, parts=parts: jax.block_until_ready(f(parts)), meet, steps)
        found[name] = {"parameters": float(numbers), "step": took, "exchange": exchange}
    jax.distributed.shutdown()
    return found


WORKERS = {"pyro": pyro_process, "numpyro": numpyro_process}


def run(library: str, processes: int, steps: int, count: int) -> dict[str, dict[str, float]]:
    """Return what the slowest process took for its median step, by estimator."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.weak_scaling", "--steps", str(steps), "--rows", str(count)]
    command += ["--worker", library, address]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(processes)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise click.ClickException(f"A process of {library} failed; what it says stands above.")
    parts = [json.loads(text.strip().splitlines()[-1]) for text in said]
    return {
        name: {key: max(part[name][key] for part in parts) for key in ("parameters", "step", "exchange")}
        for name in ESTIMATORS
    }


def rows(library: str, counts: tuple[int, ...], steps: int, count: int, cores: int) -> list[dict[str, Any]]:
    """Return a row for each estimator and number of processes."""
    found, alone = [], dict.fromkeys(ESTIMATORS, math.nan)
    for processes in counts:
        for name, took in run(library, processes, steps, count).items():
            on_a_core = math.ceil(processes / cores)
            if processes == 1:
                alone[name] = took["step"]
            found.append(
                {
                    "library": library,
                    "estimator": name,
                    "processes": processes,
                    "on a core": on_a_core,
                    "rows": count * processes,
                    "bytes": int(4 * took["parameters"]),
                    "step, ms": took["step"],
                    "exchange, ms": took["exchange"],
                    "efficiency": alone[name] * on_a_core / took["step"],
                }
            )
    return sorted(found, key=lambda row: (ESTIMATORS.index(row["estimator"]), row["processes"]))


@click.command(help=__doc__)
@click.option("--processes", "counts", multiple=True, type=int, default=(1, 2, 4), show_default=True)
@click.option("--libraries", multiple=True, type=click.Choice(list(WORKERS)), default=tuple(WORKERS), show_default=True)
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1))
@click.option("--rows", "count", default=1000, show_default=True, type=click.IntRange(1), help="Rows of each process.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A CSV file for the numbers.")
@click.option("--worker", type=(str, str, int, int), hidden=True)
def main(
    counts: tuple[int, ...],
    libraries: tuple[str, ...],
    steps: int,
    count: int,
    out: Path | None,
    worker: tuple[str, str, int, int] | None,
) -> None:
    if worker is not None:
        library, address, rank, processes = worker
        click.echo(json.dumps(WORKERS[library](address, rank, processes, steps, count)))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    frame = pd.DataFrame([row for library in libraries for row in rows(library, counts, steps, count, cores)])
    click.echo(frame.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    if out is not None:
        frame.to_csv(out, index=False)


if __name__ == "__main__":
    main()
