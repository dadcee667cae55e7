"""What a step costs on a GPU, beside the least that its arithmetic and its memory would need: `make bench-gpu`, where there is one.

Each library has a process of its own, in which the contestants of a work follow one another; each is timed in several turns, and a turn ends
when the GPU has done it all. The least time is the longer of two: of the matrix products (counted in the hand-written step) at the rate of a large product on this GPU, and of the
bytes that a step must at least move (parameters, gradients and Adam's two averages, read and written, and the data) at that of a large
copy. "bf16" means matrix products in bfloat16 and all else in float32, as `torch.autocast` and JAX's `BF16_BF16_F32` do it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import contestants
from benchmarks.contestants import CONTESTANTS
from benchmarks.shared import ROOT
from benchmarks.works import Arrays, Work, arrays, start

ONE, MANY = Work("sbn", 200), Work("sbn", 200, particles=1000)
WORKS = [
    ("float32", ONE),
    ("float32", MANY),
    ("bf16", MANY),
    ("float32", Work("plate", 200, batch=10_000)),
    ("float32", Work("sbn", 200, particles=100)),
    ("float32", Work("sbn", 200, 2, 10)),
    ("float32", Work("chain", 50)),
]
"""What is measured, with the precision of matrix products: what comes last is left out where the time is short."""
ESTIMATORS = ("default", "DisARM()", "LocalExpectation()", "REBAR(learn=False)")
"""Estimators that are measured on the first work, compiled in Pyro, and beside versions by hand in JAX."""

TORCH = tuple(
    name for name in CONTESTANTS if name.startswith(("Pyro ", "PyTorch ")) and "Enum" not in name and "Jit" not in name
)
JAX = tuple(f"NumPyro {name}" for name in ("Trace_ELBO", "TraceGraph_ELBO", "TraceGrad_ELBO")) + ("JAX by hand",)
OF_ESTIMATORS = {
    "torch": tuple(f"Pyro {text} compiled" for text in ESTIMATORS),
    "jax": tuple(form.format(text) for text in ESTIMATORS for form in ("NumPyro {}", "JAX by hand, {}")),
}
PRODUCTS = {"float32": "highest", "bf16": "BF16_BF16_F32"}
"""JAX's names of the precisions."""

LATE = "not measured in the time"
TURNS, SECONDS = 20, 1.0
"""How often, and about how long at most, a contestant is timed."""


Around = Callable[[], AbstractContextManager]


def torch_tools(precision: str) -> tuple[Around, Callable[[], None]]:
    """Return what stands around a step in a precision, with tensors on the GPU, and what waits for it."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.set_default_device("cuda")
    low = precision == "bf16"
    return (lambda: torch.autocast("cuda", torch.bfloat16) if low else nullcontext()), torch.cuda.synchronize


def jax_tools(precision: str) -> tuple[Around, Callable[[], None]]:
    """Return what stands around tracing in a precision; each step waits by itself."""
    import jax

    return (lambda: jax.default_matmul_precision(PRODUCTS[precision])), lambda: None


def ceilings() -> dict[str, float]:
    """Return this GPU's bytes per second in a large copy, and operations per second in a large product in each precision."""
    import torch

    def seconds(function: Callable[[], Any], times: int) -> float:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    torch.set_float32_matmul_precision("highest")
    source = torch.rand(2**29, device="cuda")
    target = torch.empty_like(source)
    found = {"bytes": 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), 20)}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[name] = 2 * 8192**3 / seconds(lambda a=a, b=b: a @ b, 10)
    return found


def least(work: Work, data: Arrays, params: Arrays) -> tuple[float, float]:
    """Return the operations of the hand-written step's matrix products, and the bytes that a step must move."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import by_hand_torch as by_hand

    leaves = {name: leaf.requires_grad_() for name, leaf in by_hand.tensors(params).items()}
    with FlopCounterMode(display=False) as counter:
        by_hand.estimate(work, leaves, by_hand.tensors(data))[1].backward()
    numbers = sum(x.numel() for x in leaves.values())
    # Adam reads parameter, gradient and two averages, and writes all but the gradient, which was written before.
    return float(counter.get_total_flops()), 4.0 * (8 * numbers + data["x"].size)


def measure(
    work: Work, names: list[str], precision: str, tools: Callable, seed: int, until: float = math.inf
) -> Iterator[dict[str, Any]]:
    """Yield a row for each contestant: the milliseconds of its turns, or why there are none. None starts after `until`."""
    data = arrays(work, seed)
    around, wait = tools(precision)
    for name in names:
        row = {"work": work.name, "precision": precision, "contestant": name}
        began = time.perf_counter()
        if began > until:
            yield {**row, "reason": LATE}
            continue
        try:
            with around():
                once = contestants.contestant(name).build(work, data, seed).step
            step = once if precision == "float32" else partial(inside, around, once)
            for _ in range(5):
                step()
            wait()
            yield {**row, "ready_s": time.perf_counter() - began, "ms": turns(step, wait)}
        except Exception as error:  # Whatever a contestant fails with is its row's reason.
            yield {**row, "reason": f"{type(error).__name__}: {error}"[:400]}
        finally:
            if "pyro" in sys.modules:
                sys.modules["pyro"].clear_param_store()
                sys.modules["torch"].compiler.reset()  # Nothing of one contestant is found compiled by the next.


def inside(around: Around, step: Callable[[], Any]) -> None:
    """Take one step in a context of its own: autocast keeps what it has cast until its end."""
    with around():
        step()


def turns(step: Callable[[], Any], wait: Callable[[], None]) -> list[float]:
    """Return the milliseconds of a step in each of several turns."""
    began = time.perf_counter()
    step()
    wait()
    count = int(np.clip(0.05 / (time.perf_counter() - began), 1, 200))
    found: list[float] = []
    while len(found) < 3 or (len(found) < TURNS and sum(found) * count < SECONDS * 1e3):
        began = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        found.append(1e3 * (time.perf_counter() - began) / count)
    return found


def run(library: str, works: tuple[str, ...], names: tuple[str, ...], out: Path, seed: int, seconds: float) -> None:
    """Measure what matches of one library, as far as the time goes, and write each row as soon as it is known."""
    until = time.perf_counter() + seconds
    able, tools = (TORCH, torch_tools) if library == "torch" else (JAX, jax_tools)
    contestants.REPEATED_BELOW_S = 0.0
    with (out / f"gpu-{library}.jsonl").open("w") as file:
        for precision, work in WORKS:
            if not matches(work.name, works):
                continue
            # NumPyro's TraceGraph_ELBO takes minutes to compile a chain.
            left = [
                n for n in able if matches(n, names) and not (work.kind == "chain" and n == "NumPyro TraceGraph_ELBO")
            ]
            if (precision, work) == WORKS[0]:
                # One does without `default`, which has no version by hand.
                left += [n for n in OF_ESTIMATORS[library] if matches(n, names) and n != "JAX by hand, default"]
            for row in measure(work, left, precision, tools, seed, until):
                print(json.dumps(row), file=file, flush=True)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a name matches a pattern; there may be none."""
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def about(out: Path, seed: int) -> None:
    """Write what the GPU is and can do, and the least that each work needs."""
    import torch

    torch.set_default_device("cuda")
    needs = {}
    for _, work in WORKS:
        data = arrays(work, seed)
        needs[work.name] = least(work, data, start(work, data, seed))
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": ceilings(), "needs": needs}
    (out / "gpu.json").write_text(json.dumps(found, indent=1))


def markdown(out: Path) -> str:
    """Return the table of what was measured: milliseconds, and the part of it that the least would be."""
    known = json.loads((out / "gpu.json").read_text())
    peak = known["ceilings"]
    files = [path for library in ("torch", "jax") if (path := out / f"gpu-{library}.jsonl").exists()]
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    cells: dict[str, dict[tuple[str, str], str]] = {}
    least: dict[tuple[str, str], float] = {}
    for row in rows:
        column = (row["work"], row["precision"])
        operations, moved = known["needs"][row["work"]]
        least[column] = 1e3 * max(operations / peak[row["precision"]], moved / peak["bytes"])
        middle = float(np.median(row["ms"])) if "ms" in row else math.nan
        text = (
            f"{middle:.3g} ({least[column] / middle:.2g})" if "ms" in row else {LATE: ""}.get(row["reason"], "failed")
        )
        cells.setdefault(row["contestant"], {})[column] = text
    late = [f"{row['work']}, {row['precision']}, {row['contestant']}" for row in rows if row.get("reason") == LATE]
    lines = [
        f"{known['gpu']}, torch {known['torch']}: {peak['bytes'] / 1e12:.2f} TB/s copied, {peak['float32'] / 1e12:.0f} (float32) and "
        f"{peak['bf16'] / 1e12:.0f} (bf16) TFLOP/s in a product of 8192 x 8192. A step in ms (the least / it):",
        "",
        "| contestant | " + " | ".join(f"{work}, {precision}" for work, precision in least) + " |",
        "|---|" + "---:|" * len(least),
        *(f"| {name} | " + " | ".join(found.get(c, "") for c in least) + " |" for name, found in cells.items()),
        "| the least | " + " | ".join(f"{ms:.2g}" for ms in least.values()) + " |",
        "",
        *(
            f"{row['work']}, {row['precision']}, {row['contestant']}: {row['reason']}"
            for row in rows
            if row.get("reason", LATE) != LATE
        ),
        *([f"Not measured in the time: {'; '.join(late)}."] if late else []),
    ]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--library", type=click.Choice(["torch", "jax"]), help="One library alone, in this process.")
@click.option("--work", "works", multiple=True, help="Only works that match, such as 'sbn*'.")
@click.option("--contestant", "names", multiple=True, help="Only contestants that match, such as 'Pyro *'.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--minutes", default=9.0, show_default=True, help="The time that all of it may take, three fifths of it in torch."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "results" / "gpu")
def main(
    library: str | None, works: tuple[str, ...], names: tuple[str, ...], seed: int, minutes: float, out: Path
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if library is not None:
        run(library, works, names, out, seed, 60 * minutes * {"torch": 0.6, "jax": 0.4}[library])
        return
    about(out, seed)
    for each in ("torch", "jax"):
        again = [sys.executable, "-m", "benchmarks.gpu", "--library", each, *sys.argv[1:]]
        subprocess.run(again, env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, cwd=ROOT, check=False)
    (out / "gpu.md").write_text(text := markdown(out))
    click.echo(text)


if __name__ == "__main__":
    main()
