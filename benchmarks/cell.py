"""One contestant in a process of its own: `python -m benchmarks.cell`, started by turns.py and spoken to in lines of JSON.

It pins itself to one core, imports, makes its step and takes it once, telling what each took; then it answers each line on its input (a
number of steps) with the milliseconds of one, and at the end of its input with its peak memory.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from benchmarks.contestants import Contestant, Skip, contestant
from benchmarks.works import Work

PACKAGES = ("torch", "pyro-ppl", "jax", "jaxlib", "numpyro", "funsor", "storchastic", "numpy", "pplgrad")
WARM_UP = 3
"""Steps after the first that are not measured: some contestants compile on their second or third."""
TRIED = 4
"""Steps that tell how long a turn is. A step at which a compiled program is looked at again takes hundreds of times as long as others."""


def main() -> None:
    """Do what the module says, for the cell described by the first argument."""
    # Whatever a library prints goes to the log; the protocol keeps the standard output for itself.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**words: Any) -> None:
        print(json.dumps(words), file=channel, flush=True)

    asked = json.loads(sys.argv[1])
    pin(asked["core"])
    try:
        step = prepare(asked, say)
    except Exception as error:  # Whatever a contestant fails with is its row's reason.
        skipped = isinstance(error, Skip)
        text = (str(error).strip().splitlines() or ["no reason given"])[0]
        say(event="failed", reason=(text if skipped else f"{type(error).__name__}: {text}")[:300], skipped=skipped)
        return
    for line in sys.stdin:
        say(event="turn", ms=turn(step, int(line)))
    say(event="done", peak_mib=peak_mib())


def pin(core: int | None) -> None:
    """Let this process, and all threads that it starts, run on one core."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def prepare(asked: dict[str, Any], say: Any) -> Any:
    """Import, build and take the first steps; return the step."""
    who: Contestant = contestant(asked["contestant"])
    work = Work(**asked["work"])
    with np.load(asked["data"]) as stored:
        data = dict(stored)
    began = time.perf_counter()
    for name in who.imports:
        importlib.import_module(name)
    imported = time.perf_counter()
    say(event="imported", import_s=imported - began, imported_mib=peak_mib(), versions=versions())
    seed_all(asked["seed"])
    ready = who.build(work, data, asked["seed"])
    built = time.perf_counter()
    say(event="built", trace_s=ready.trace_s, compile_s=ready.compile_s, note=ready.note)
    ready.step()
    first = time.perf_counter()
    say(event="stepped", build_s=built - imported, first_step_s=first - built)
    for _ in range(WARM_UP):
        last = timed(ready.step)
    tracing, compiling = torch_compiling(time.perf_counter() - built)
    say(event="ready", trace_s=tracing, compile_s=compiling)
    tried = [timed(ready.step) for _ in range(TRIED if last < 1 else 0)]
    say(event="tried", step_s=min([last, *tried]))
    return ready.step


def timed(step: Any) -> float:
    """Return the seconds that a step takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def seed_all(seed: int) -> None:
    """Seed the generators that are global."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
        sys.modules["torch"].set_num_threads(1)
    if "pyro" in sys.modules:
        sys.modules["pyro"].set_rng_seed(seed)


def torch_compiling(seconds: float) -> tuple[list[float], list[float]]:
    """Return what the first steps in torch spent on tracing (all but compiling) and on compiling; none if nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    spent = dynamo.calculate_time_spent() if dynamo else {}
    compiling = max((spent.get(phase, 0.0) for phase in ("backend_compile", "inductor_compile")), default=0.0)
    return ([seconds - compiling], [compiling]) if compiling else ([], [])


def turn(step: Any, count: int) -> float:
    """Return the mean milliseconds of some steps, after one that brings the program back into the caches if they are short."""
    if count > 1:
        step()
    began = time.perf_counter()
    for _ in range(count):
        step()
    return 1e3 * (time.perf_counter() - began) / count


def peak_mib() -> float:
    """Return the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the times of this process."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
