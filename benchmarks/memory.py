"""Memory of local expectation with and without chunks: `make bench-memory`.

The belief network of models/sbn.py with 200 latents at a batch of 1,000, whose local expectation has 200 branches of the whole
batch. Each row is a process of its own: its peak memory, how much of it two training steps added, and the time of the second.
"""

from __future__ import annotations

from benchmarks.shared import OPTIONS, ROOT, sbn  # First: it sets the number of threads.

# isort: split
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from pplgrad import LocalExpectation


def peak() -> float:
    """Return the peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pyro_steps(options: dict[str, Any], train: np.ndarray, x: np.ndarray, rows: int | None) -> Any:
    """Return a function that takes a training step in Pyro."""
    import torch
    from pyro.infer import SVI
    from pyro.optim import Adam

    from pplgrad.pyro import TraceGrad_ELBO

    torch.set_num_threads(1)
    model, guide = sbn().pyro_program(options, train, 0)
    elbo = TraceGrad_ELBO(
        vectorize_particles=True, max_plate_nesting=1, estimators={"*": LocalExpectation()}, max_parallel=rows
    )
    svi, data = SVI(model, guide, Adam({"lr": 1e-6}), elbo), torch.tensor(x)
    return lambda: svi.step(data)


def numpyro_steps(options: dict[str, Any], train: np.ndarray, x: np.ndarray, rows: int | None) -> Any:
    """Return a function that takes a training step in NumPyro."""
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO

    model, guide = sbn().numpyro_program(options, train, 0)
    svi = SVI(model, guide, Adam(1e-6), TraceGrad_ELBO(estimators={"*": LocalExpectation()}, max_parallel=rows))
    state = svi.init(jax.random.key(0), x)
    step = jax.jit(svi.update).lower(state, x).compile()
    return lambda: jax.block_until_ready(step(state, x))


def measure(library: str, latents: int, batch: int, rows: int | None) -> dict[str, Any]:
    """Return the row of one process."""
    options = {**OPTIONS, "latents": latents}
    train, _ = sbn().load(options, 0)
    make = {"pyro": pyro_steps, "numpyro": numpyro_steps}[library]
    step = make(options, train, np.asarray(train[:batch], np.float32), rows)
    before = peak()
    step()
    start = time.perf_counter()
    step()
    spent = time.perf_counter() - start
    return {
        "library": library,
        "max_parallel": rows or 0,
        "peak, MiB": round(peak()),
        "steps add, MiB": round(peak() - before),
        "step, s": spent,
    }


def main() -> None:
    """Measure each library with and without chunks, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libraries", nargs="*", default=["pyro", "numpyro"], choices=["pyro", "numpyro"])
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="*", default=[0, 10], help="max_parallel; 0 for all at once")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "memory.csv")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        library, rows = given.one
        print(json.dumps(measure(library, given.latents, given.batch, int(rows) or None)))
        return
    found = []
    for library in given.libraries:
        for rows in given.rows:
            size = ["--latents", str(given.latents), "--batch", str(given.batch)]
            command = [sys.executable, "-m", "benchmarks.memory", *size, "--one", library, str(rows)]
            shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.append(json.loads(shown.splitlines()[-1]))
    frame = pd.DataFrame(found)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(given.out, index=False)
    table = Table(caption=f"0: all rows at once; written to {given.out}")
    for column in frame:
        table.add_column(str(column), justify="left" if column == "library" else "right")
    for _, row in frame.iterrows():
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
