"""What branches cost in arithmetic: `make bench-arithmetic`.

For each estimator, the floating-point operations of a loss with its gradient, as XLA counts them in NumPyro's compiled program (a
loop once) and as PyTorch counts them in Pyro's matrix products, and those of one evaluation of the program: the loss alone.
What an estimator does beyond the score function is then given for each of its branches, as a multiple of one evaluation: 1 where a branch
is the program run once more, less where branches share what they have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd

from benchmarks.shared import ROOT
from benchmarks.tables import table
from benchmarks.works import Work, arrays, numpyro_program, pyro_program, start
from pplgrad import Estimator
from pplgrad.lab.measure import evaluations
from pplgrad.lab.specs import specification

ESTIMATORS = ("ARM()", "DisARM()", "ARMS()", "MuProp()", "LocalExpectation()", "MeasureValued()")
COLUMNS = ("library", "estimator", "branches", "operations of a step, millions", "of a branch", "/ one evaluation")


# The evaluations of a step, and what counts the operations of a loss, and of one with its gradient.
Counted = tuple[int, Callable[[], float], Callable[[], float]]


def in_numpyro(estimators: dict[str, Estimator], work: Work, seed: int) -> Counted:
    """Return what is counted in NumPyro."""
    import jax
    import jax.numpy as jnp

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    data = arrays(work, seed)
    model, guide, args = numpyro_program(work, data, seed)
    guide, elbo, key = config_estimators(guide, estimators), TraceGrad_ELBO(), jax.random.key(seed)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in start(work, data, seed).items()}

    def loss(params: dict, key: jax.Array) -> jax.Array:
        return elbo.loss(key, params, model, guide, *args)

    def operations(function: Callable) -> float:
        return jax.jit(function).lower(params, key).compile().cost_analysis()["flops"]

    count = evaluations(elbo, elbo.describe(key, params, model, guide, *args))
    return count, lambda: operations(loss), lambda: operations(jax.value_and_grad(loss))


def in_pyro(estimators: dict[str, Estimator], work: Work, seed: int) -> Counted:
    """Return what is counted in Pyro."""
    import pyro
    from torch.utils.flop_counter import FlopCounterMode

    from pplgrad.pyro import TraceGrad_ELBO, config_estimators

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide, args = pyro_program(work, arrays(work, seed), seed)
    guide = config_estimators(guide, estimators)
    elbo = TraceGrad_ELBO(vectorize_particles=True, max_plate_nesting=work.plates)

    def operations(function: Callable) -> float:
        counts = []
        with FlopCounterMode(display=False) as counter:
            for _ in range(3):  # The first two steps look at the program, and run it once more to compare.
                function(model, guide, *args)
                counts.append(counter.get_total_flops())
        return counts[2] - counts[1]

    count = evaluations(elbo, elbo.describe(model, guide, *args))
    return count, lambda: operations(elbo.loss), lambda: operations(elbo.loss_and_grads)


LIBRARIES = {"Pyro": in_pyro, "NumPyro": in_numpyro}


def multiples(library: str, texts: tuple[str, ...], work: Work, seed: int) -> pd.DataFrame:
    """Return a row for each estimator, with operations in millions and a branch's as a multiple of an evaluation's."""
    count = LIBRARIES[library]
    _, evaluation, step = count(specification("ScoreFunction()").mapping(("z*",)), work, seed)
    one, without = evaluation(), step()
    rows = []
    for text in texts:
        times, _, step = count(specification(text).mapping(("z*",)), work, seed)
        whole = step()
        each = (whole - without) / (times - 1)
        rows.append((library, text, times - 1, whole / 1e6, each / 1e6, each / one))
    return pd.DataFrame(rows, columns=COLUMNS)


@click.command(help=__doc__)
@click.option("--latents", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=ROOT / "results" / "bench-arithmetic.csv"
)
def main(latents: int, seed: int, out: Path) -> None:
    work = Work("sbn", latents)
    frame = pd.concat([multiples(library, ESTIMATORS, work, seed) for library in LIBRARIES])
    out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out, index=False)
    rows = [
        (library, f"`{text}`", f"{n}", f"{a:,.0f}", f"{b:.2f}", f"{c:.2f}")
        for library, text, n, a, b, c in frame.values
    ]
    click.echo(f"{table(COLUMNS, rows)}\nwritten: {out}")


if __name__ == "__main__":
    main()
