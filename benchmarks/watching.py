"""What watching a run costs, on the sigmoid belief network of models/sbn.py: `make bench-watching`.

The same training, plain and watched as `Watch` does by default, takes turns of 200 steps each on one thread; the cost is the
ratio of the median turns less one. Each is made twice: what two equal ones differ by (where they lie in memory) is shown beside
it. In NumPyro a turn is one compiled loop, as in `SVI.run`, and compiling it is measured too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.shared import OPTIONS, in_turns, sbn  # sets one thread, before any library is imported
from pplgrad import DisARM, LeaveOneOut, ScoreFunction, Watch

ESTIMATORS: dict[str, tuple[Any, int]] = {
    "score+loo, 2 particles": (ScoreFunction(LeaveOneOut()), 2),
    "DisARM": (DisARM(), 1),
}
WATCH = Watch(lambda record: None)
TURN = WATCH.every
RUNS = {"plain": None, "watched": WATCH, "plain again": None, "watched again": WATCH}


def in_pyro(
    estimator: Any, particles: int, seconds: float, latents: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return the times of turns in Pyro."""
    import pyro
    import torch
    from pyro.infer import SVI
    from pyro.optim import Adam

    from pplgrad.pyro import TraceGrad_ELBO, config_estimators

    torch.set_num_threads(1)
    pyro.clear_param_store()
    train, _ = sbn().load(OPTIONS, 0)
    model, guide = sbn().pyro_program({**OPTIONS, "latents": latents}, train, 0)
    x = torch.tensor(train[:100], dtype=torch.float32)
    turns: dict[str, Callable] = {}
    for name, watch in RUNS.items():
        elbo = TraceGrad_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(model, config_estimators(guide, {"*": estimator}, watch=watch), Adam({"lr": 1e-6}), elbo)
        turns[name] = lambda svi=svi: [svi.step(x) for _ in range(TURN)]
        turns[name]()
    return in_turns(turns, seconds), {}


def in_numpyro(
    estimator: Any, particles: int, seconds: float, latents: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return the times of turns in NumPyro, and those of compiling."""
    import jax
    import jax.numpy as jnp
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    train, _ = sbn().load(OPTIONS, 0)
    model, guide = sbn().numpyro_program({**OPTIONS, "latents": latents}, train, 0)
    x = jnp.asarray(train[:100], jnp.float32)
    turns: dict[str, Callable] = {}
    compiling: dict[str, float] = {}
    for name, watch in RUNS.items():
        configured = config_estimators(guide, {"*": estimator}, watch=watch)
        svi = SVI(model, configured, Adam(1e-6), TraceGrad_ELBO(particles))
        states = [svi.init(jax.random.key(0), x)]

        def advance(state: Any, svi: Any = svi) -> Any:
            return jax.lax.scan(lambda s, _: svi.update(s, x), state, None, TURN)

        start = time.perf_counter()
        compiled = jax.jit(advance).lower(states[0]).compile()
        compiling[name] = time.perf_counter() - start

        def turn(compiled: Any = compiled, states: list = states) -> None:
            states[0], losses = compiled(states[0])
            losses.block_until_ready()

        turns[name] = turn
        turn()
    return in_turns(turns, seconds), compiling


def main() -> None:
    """Measure, show a table, and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libraries", nargs="+", default=["pyro", "numpyro"], choices=["pyro", "numpyro"])
    parser.add_argument("--seconds", type=float, default=30.0, help="per row")
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/watching.csv"))
    given = parser.parse_args()
    rows = []
    for library in given.libraries:
        for name, (estimator, particles) in ESTIMATORS.items():
            measure = {"pyro": in_pyro, "numpyro": in_numpyro}[library]
            times, compiling = measure(estimator, particles, given.seconds, given.latents)
            plain, watched, *again = (float(np.median(times[name])) / TURN for name in RUNS)
            rows.append(
                {
                    "library": library,
                    "estimator": name,
                    "plain ms a step": f"{(plain + again[0]) / 2:.2f}",
                    "cost of watching": f"{100 * ((watched + again[1]) / (plain + again[0]) - 1):+.1f}%",
                    "plain against plain": f"{100 * (again[0] / plain - 1):+.1f}%",
                    "compile s": " → ".join(f"{compiling[name]:.1f}" for name in list(compiling)[:2]) or "–",
                }
            )
    frame = pd.DataFrame(rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(given.out, index=False)
    table = Table(*frame.columns)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    Console().print(table)


if __name__ == "__main__":
    main()
