"""Step time of TraceGrad_ELBO beside the hosts' own ELBOs, in one run: `make bench`.

Chains of 10, 50 and 200 Bernoulli sites, and the sigmoid belief network of models/sbn.py at a batch of 100. All ELBOs
of a row take turns, one step each, on one thread; a figure is the median of the turns in milliseconds, with the
quartiles. In NumPyro a step is one jitted `SVI.update` (with `--gradient`, the loss and its gradient alone), and compiling
it is measured too. The score function has no baseline here, since the hosts' ELBOs have none.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pplgrad import ScoreFunction
from pplgrad.lab.script import load_script

ROOT = Path(__file__).parents[1]


def sbn() -> Any:
    """Return the module models/sbn.py."""
    return load_script(ROOT / "models" / "sbn.py", ()).module


OPTIONS = dict(sbn().OPTIONS)


def chain(ppl: Any, dist: Any, zeros: Callable, length: int) -> tuple[Callable, Callable]:
    """Return a chain of Bernoulli sites, each with one observation."""

    def model(x: Any) -> None:
        p, z = ppl.param("p", zeros(3)), zeros(())
        for t in range(length):
            z = ppl.sample(f"z{t}", dist.Bernoulli(logits=p[0] + p[1] * z))
            ppl.sample(f"x{t}", dist.Normal(p[2] * z, 1.0), obs=x)

    def guide(x: Any) -> None:
        q, z = ppl.param("q", zeros(2)), zeros(())
        for t in range(length):
            z = ppl.sample(f"z{t}", dist.Bernoulli(logits=q[0] + q[1] * z))

    return model, guide


def in_turns(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, np.ndarray]:
    """Return the times of steps taken in turn, in milliseconds, for about as long as asked."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(values) for name, values in times.items()}


def in_pyro(work: str, size: int, seconds: float, skip: list[str]) -> list[dict[str, Any]]:
    """Measure the ELBOs of Pyro on one program."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
    from pyro.optim import Adam

    from pplgrad.pyro import TraceGrad_ELBO

    torch.set_num_threads(1)
    pyro.clear_param_store()
    if work == "chain":
        model, guide = chain(pyro, dist, torch.zeros, size)
        x = torch.tensor(0.5)
    else:
        module = sbn()
        train, _ = module.load(OPTIONS, 0)
        model, guide = module.pyro_program({**OPTIONS, "latents": size}, train, 0)
        x = torch.tensor(train[:100], dtype=torch.float32)
    elbos = {"Trace_ELBO": Trace_ELBO(), "TraceGraph_ELBO": TraceGraph_ELBO()}
    elbos["TraceGrad_ELBO"] = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    svis = {name: SVI(model, guide, Adam({"lr": 1e-6}), elbo) for name, elbo in elbos.items() if name not in skip}
    for svi in svis.values():
        for _ in range(3):
            svi.step(x)
    times = in_turns({name: (lambda svi=svi: svi.step(x)) for name, svi in svis.items()}, seconds)  # type: ignore[misc]
    return rows("pyro", work, size, times, {})


def in_numpyro(work: str, size: int, seconds: float, skip: list[str], gradient: bool = False) -> list[dict[str, Any]]:
    """Measure the ELBOs of NumPyro on one program."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO

    if work == "chain":
        model, guide = chain(numpyro, dist, jnp.zeros, size)
        x = jnp.array(0.5)
    else:
        module = sbn()
        train, _ = module.load(OPTIONS, 0)
        model, guide = module.numpyro_program({**OPTIONS, "latents": size}, train, 0)
        x = jnp.asarray(train[:100], jnp.float32)
    elbos = {"Trace_ELBO": Trace_ELBO(), "TraceGraph_ELBO": TraceGraph_ELBO()}
    elbos["TraceGrad_ELBO"] = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    steps, compiling = {}, {}
    for name, elbo in elbos.items():
        if name in skip:
            continue
        # Trace_ELBO has no gradient for discrete sites: it is here for its time.
        elbo.can_infer_discrete = True
        svi = SVI(model, guide, Adam(1e-6), elbo)
        state = svi.init(jax.random.key(0), x)

        def step(state: Any, x: Any, svi: Any = svi, elbo: Any = elbo) -> Any:
            if not gradient:
                return svi.update(state, x)
            return jax.value_and_grad(lambda p: elbo.loss(state.rng_key, p, model, guide, x))(svi.get_params(state))

        start = time.perf_counter()
        compiled = jax.jit(step).lower(state, x).compile()
        compiling[name] = time.perf_counter() - start
        steps[name] = lambda c=compiled, s=state: jax.block_until_ready(c(s, x))  # type: ignore[misc]
    return rows("numpyro", work, size, in_turns(steps, seconds), compiling)


def rows(library: str, work: str, size: int, times: dict[str, np.ndarray], compiling: dict) -> list[dict[str, Any]]:
    """Return one row for each ELBO, with its ratio to Trace_ELBO turn by turn."""
    found = []
    for name, values in times.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        row = {"library": library, "work": f"{work} {size}", "elbo": name, "ms": middle, "ms_25": low, "ms_75": high}
        row["ratio"] = float(np.median(values / times["Trace_ELBO"]))
        row["compile_s"] = compiling.get(name, np.nan)
        found.append(row)
    return found


def main() -> None:
    """Run the suite, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="measuring time of each row")
    parser.add_argument("--lengths", type=int, nargs="*", default=[10, 50, 200], help="lengths of the chains")
    parser.add_argument("--latents", type=int, nargs="*", default=[50, 200], help="latents of the belief network")
    parser.add_argument("--libraries", nargs="*", default=["pyro", "numpyro"], choices=["pyro", "numpyro"])
    parser.add_argument("--skip", nargs="*", default=[], help="ELBOs to leave out, such as TraceGraph_ELBO")
    parser.add_argument("--gradient", action="store_true", help="NumPyro: without the optimizer's update")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "steps.csv")
    given = parser.parse_args()
    work = [("chain", n) for n in given.lengths] + [("sbn", n) for n in given.latents]
    found: list[dict[str, Any]] = []
    for library in given.libraries:
        measure = {"pyro": in_pyro, "numpyro": partial(in_numpyro, gradient=given.gradient)}[library]
        for kind, size in tqdm(work, desc=library):
            found += measure(kind, size, given.seconds, given.skip)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(found)
    frame.to_csv(given.out, index=False)
    table = Table(caption=f"medians on one thread; written to {given.out}")
    for column in ("library", "work", "ELBO", "step, ms (quartiles)", "/ Trace_ELBO", "compile, s"):
        table.add_column(column, justify="left" if column in ("library", "work", "ELBO") else "right")
    for _, row in frame.iterrows():
        spread = f"{row['ms']:.3g} ({row['ms_25']:.3g} to {row['ms_75']:.3g})"
        compiling = "" if np.isnan(row["compile_s"]) else f"{row['compile_s']:.1f}"
        table.add_row(row["library"], row["work"], row["elbo"], spread, f"{row['ratio']:.2f}", compiling)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
