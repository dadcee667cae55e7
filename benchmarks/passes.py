"""What each pass of the two compilers buys: each turned off by itself, beside all of them on (`make bench-passes`).

A pass is turned off in the process of its contestant, by putting what does nothing in its place. Ratios are of steps that took turns on
one core: 1.20 says that a step takes 20% longer without the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.contestants import CONTESTANTS, Contestant, Ready
from benchmarks.shared import ROOT
from benchmarks.works import Arrays, Work

NEVER = 10**9
FUSED, COMPILED = "NumPyro TraceGrad_ELBO", "Pyro TraceGrad_ELBO compiled, joint optimizer"
WORKS = (
    Work("sbn", 200),
    Work("sbn", 200, particles=100),
    Work("chain", 10),
    Work("chain", 50),
    Work("chain", 200),
    Work("scan", 200),
)


def _without_batching() -> None:
    from pplgrad.numpyro._fusion import batched_evaluation

    batched_evaluation.BatchedProgram = partial(batched_evaluation.BatchedProgram, rows=NEVER)  # type: ignore[misc]


def _without_loop_rerolling() -> None:
    from pplgrad.numpyro._fusion import scheduling

    scheduling.draw_loops = lambda *given: []
    scheduling.key_loops = lambda *given: []


def _without_scan_fission() -> None:
    from pplgrad.numpyro._fusion import batched_evaluation

    batched_evaluation.steps_of = lambda *given: None


def _without_threefry() -> None:
    from pplgrad.numpyro._compat_jax import alone
    from pplgrad.numpyro._fusion import batched_evaluation, scan_fission

    batched_evaluation.operation = alone
    scan_fission.operation = alone


def _without_stacked_views() -> None:
    import jax
    import jax.numpy as jnp

    from pplgrad.numpyro._fusion.stacked_views import StackedViews

    StackedViews.constant = lambda self, x: jax.lax.stop_gradient(x)  # type: ignore[method-assign]
    StackedViews.stack = lambda self, arrays, axis: jnp.stack(arrays, axis=axis)  # type: ignore[method-assign]


def _without_scalarization() -> None:
    from pplgrad.pyro._compile import backends

    backends.scalarize = lambda graph: False


def _without_broadcast_sinking() -> None:
    from pplgrad.pyro._compile import backends

    backends._sinking_pass = lambda: None  # type: ignore[assignment]


def _without_torchs_generator() -> None:
    from pplgrad.pyro._compile import backends

    backends._MANY = NEVER


PASSES: dict[str, dict[str, Callable[[], None]]] = {
    FUSED: {
        "batched evaluation": _without_batching,
        "loop re-rolling": _without_loop_rerolling,
        "scan fission": _without_scan_fission,
        "threefry written out": _without_threefry,
        "stacked views": _without_stacked_views,
    },
    COMPILED: {
        "scalarization": _without_scalarization,
        "broadcast sinking": _without_broadcast_sinking,
        "torch's generator for large draws": _without_torchs_generator,
    },
}
"""The passes of each contestant, and what turns each off."""


def ablated(name: str) -> Contestant:
    """Return a contestant with one pass turned off, by its name: `NumPyro TraceGrad_ELBO without scan fission`."""
    whole, _, without = name.partition(" without ")
    plain, turn_off = CONTESTANTS[whole], PASSES[whole][without]

    def build(work: Work, data: Arrays, seed: int) -> Ready:
        turn_off()
        return plain.build(work, data, seed)

    return Contestant(plain.library, plain.imports, build)


def table(frame: pd.DataFrame) -> str:
    """Return what each pass buys on each work, as Markdown: the step and the compilation without it, over those with all passes."""
    lines = ["| contestant | pass turned off | " + " | ".join(frame["work"].unique()) + " |"]
    lines.append("|---|---|" + "---:|" * frame["work"].nunique())
    for whole, passes in PASSES.items():
        for name in passes:
            cells = (_bought(frame[frame["work"] == work], whole, name) for work in frame["work"].unique())
            lines.append(f"| {whole} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bought(frame: pd.DataFrame, whole: str, name: str) -> str:
    """Return the ratios of one pass on one work: that of the step, and in brackets that of tracing and compiling."""
    step, compiling = (
        [_median(frame, contestant, quantities) for contestant in (f"{whole} without {name}", whole)]
        for quantities in (("step_ms",), ("trace_s", "compile_s"))
    )
    if None in step:
        return "-"
    words = f"{step[0] / step[1]:.2f}"  # type: ignore[operator]
    return words if None in compiling else f"{words} ({compiling[0] / compiling[1]:.2f})"  # type: ignore[operator]


def _median(frame: pd.DataFrame, contestant: str, quantities: tuple[str, ...]) -> float | None:
    found = frame[(frame["contestant"] == contestant) & frame["quantity"].isin(quantities)]
    return None if found.empty else float(found.groupby("quantity")["value"].median().sum())


@click.command(help=__doc__)
@click.option("--work", "patterns", multiple=True, help="Only works that match, such as 'sbn*' or 'chain 50'.")
@click.option("--turns", default=20, show_default=True, help="Turns of each contestant.")
@click.option("--seconds", default=1.0, show_default=True, help="Measuring time of each contestant on a work.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "results" / "bench-passes")
def main(patterns: tuple[str, ...], turns: int, seconds: float, out: Path) -> None:
    from benchmarks.suite import Cell, chosen, measured

    names = {whole: (whole, *(f"{whole} without {name}" for name in passes)) for whole, passes in PASSES.items()}
    cells = chosen([Cell(work, several, 600) for work in WORKS for several in names.values()], patterns, ())
    text = table(measured(cells, turns, seconds, 0, out))
    (out / "passes.md").write_text(text + "\n")
    Console().print(Markdown(text))


if __name__ == "__main__":
    main()
