"""`pplgrad choose`: the estimators with the best efficiency on a script's program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pplgrad.diagnostics.choosing import Choice
from pplgrad.lab.cli_faults import FAULT, Faults, traceback_option
from pplgrad.lab.cli_shared import json_option, opened, script_argument, seed_option, settings_option, show_json
from pplgrad.lab.specs import objective, specification
from pplgrad.lab.tasks import Task, check_backend, make_run, unsound


@click.command()
@script_argument
@click.option(
    "--seconds", default=60.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Time for each library."
)
@click.option(
    "--estimator", "words", multiple=True, help="A candidate, as in Python; all unbiased ones that fit by default."
)
@click.option("--objective", "target", default="ELBO()", show_default=True, help="Such as 'IWAE()', 'Renyi(0.5)'.")
@click.option("--particles", default=2, show_default=True, type=click.IntRange(1), help="Particles of each estimator.")
@click.option("--batch-size", default=100, show_default=True, type=click.IntRange(1), help="Data in each step.")
@click.option(
    "--train", "steps", default=0, show_default=True, type=click.IntRange(0), help="Training steps before measuring."
)
@seed_option
@settings_option
@json_option
@traceback_option
def choose(
    script: Path,
    backends: tuple[str, ...],
    seconds: float,
    words: tuple[str, ...],
    target: str,
    particles: int,
    batch_size: int,
    steps: int,
    seed: int,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the estimators that fit each site of SCRIPT's program, and say which to use.

    Candidates are drawn in turns, and the worse half of them is dropped after each round; what decides is variance × time of the
    whole gradient. Prints the table, how sure the choice is, and the text to paste into the program. Early and late in
    training the answer may differ: see --train.

    \b
    Exit code 0: chosen. 2: the script raises, or no candidate fits; what another library chose is shown.

    \b
    pplgrad choose models/sbn.py --backend pyro --seconds 60
    pplgrad choose models/sbn.py --train 500 --estimator 'DisARM()' --estimator 'ARMS(4)' --estimator score+loo
    """
    loaded, backends, options = opened(script, backends, settings)
    candidates = [estimator for word in words for estimator in specification(word).all] or None
    objective(target)
    chosen: list[tuple[str, Choice]] = []
    with Faults() as faults:
        for backend in backends:
            check_backend(backend)
            known = {"snapshots": [steps], "steps": steps, "learning_rate": 3e-3}
            common: dict[str, Any] = dict(
                kind="choose", script=str(script), digest=loaded.digest, options=options, backend=backend
            )
            common |= dict(
                estimator="score+loo", seed=seed, particles=particles, batch_size=batch_size, objective=target
            )
            with faults.of(loaded, backend):
                choice = make_run(Task(**common, settings=known), loaded).choice(candidates, seconds)
                # A site with one candidate is not measured, and nothing was asked of the program's densities.
                if not choice.table and (wrong := unsound(loaded)) is not None:
                    raise wrong
                chosen.append((backend, choice))
            if not as_json and chosen and chosen[-1][0] == backend:
                _show(*chosen[-1])
    if as_json:
        show_json([{"backend": backend, **choice.to_dict()} for backend, choice in chosen])
    if faults:
        raise SystemExit(FAULT)


def _show(backend: str, choice: Choice) -> None:
    """Print a choice as wide as the terminal is; the text to paste is never broken."""
    from pplgrad.lab.sheet import Sheet, show_lines

    heads, *rows = choice.lines()
    first = ("estimators", "variance × ms", "note", "variance", "ms", "draws")
    click.echo(backend)
    Sheet(heads, rows, numbers=heads[1:-1], first=first).show()
    show_lines(["", f"# {choice.summary}"])
    click.echo(f"{choice.code}\n")
