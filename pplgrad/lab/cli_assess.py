"""`pplgrad assess`: whether the guide of a script's program fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pplgrad.assessment.result import Assessment
from pplgrad.lab.cli_faults import FAULT, Faults, traceback_option
from pplgrad.lab.cli_shared import json_option, need, opened, script_argument, seed_option, settings_option, show_json
from pplgrad.lab.specs import objective, specification
from pplgrad.lab.tasks import Task, check_backend, make_run, unsound


@click.command()
@script_argument
@click.option(
    "--train", "--steps", "steps", default=0, show_default=True, type=click.IntRange(0), help="Training steps before."
)
@click.option(
    "--estimator", "word", default="score+loo", show_default=True, help="Of the training, as in Python, or score+loo."
)
@click.option("--objective", "target", default="ELBO()", show_default=True, help="Of the training, such as 'IWAE()'.")
@click.option("--particles", default=2, show_default=True, type=click.IntRange(1), help="Particles in training.")
@click.option(
    "--learning-rate", default=3e-3, show_default=True, type=click.FloatRange(0, min_open=True), help="Of the training."
)
@click.option(
    "--batch-size", default=100, show_default=True, type=click.IntRange(1), help="Data in a step, and data assessed."
)
@click.option(
    "--data", "which", type=click.Choice(["train", "test"]), default="train", show_default=True, help="Data assessed."
)
@click.option("--samples", default=1000, show_default=True, type=click.IntRange(100), help="Draws of the guide.")
@click.option(
    "--simulations", default=0, show_default=True, type=click.IntRange(0), help="Data sets of the calibration, or 0."
)
@click.option("--level", default=0.01, show_default=True, type=float, help="Rate of false alarms of each part.")
@click.option(
    "--tolerated", default=0.05, show_default=True, type=float, help="Share of the data whose weights may be poor."
)
@click.option(
    "--outcomes", default=4096, show_default=True, type=click.IntRange(0), help="As many are enumerated at most."
)
@seed_option
@settings_option
@json_option
@traceback_option
def assess(
    script: Path,
    backends: tuple[str, ...],
    steps: int,
    word: str,
    target: str,
    particles: int,
    learning_rate: float,
    batch_size: int,
    which: str,
    settings: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Say whether the guide of SCRIPT's program fits, on a batch of its data.

    Importance weights of the guide's draws (Pareto's k, effective sample size), the evidence, posterior predictive checks, elements
    that have collapsed, and, with --simulations, simulation-based calibration.

    \b
    Exit code 0: no fault of the fit is seen. 1: the fit is poor. 2: the script raises, or cannot be assessed.

    \b
    pplgrad assess models/sbn.py --train 500
    pplgrad assess my_model.py --train 2000 --data test --simulations 100
    """
    need("assess", "arviz_stats", "arviz_base", "scipy", extra="assess")
    loaded, backends, own = opened(script, backends, settings)
    specification(word)
    objective(target)
    found: list[tuple[str, Assessment]] = []
    known = {"snapshots": [steps], "steps": steps, "learning_rate": learning_rate}
    with Faults() as faults:
        for backend in backends:
            check_backend(backend)
            task = Task("assess", str(script), loaded.digest, own, backend, word, options["seed"], particles, batch_size, target, known)  # fmt: skip
            with faults.of(loaded, backend):
                run = make_run(task, loaded)
                assessment = run.assessment(which, **options)
                # A program whose densities are not finite has no evidence, which is no fault of the guide.
                if assessment.evidence.bound == float("-inf") and (wrong := unsound(loaded)) is not None:
                    raise wrong
                found.append((backend, assessment))
                if not as_json:
                    click.echo(f"{backend}\n{assessment}\n")
    if as_json:
        show_json([{"backend": backend, **assessment.to_dict()} for backend, assessment in found])
    if faults:
        raise SystemExit(FAULT)
    raise SystemExit(0 if all(assessment.passed for _, assessment in found) else 1)
