"""`pplgrad check`: certificates for a script's program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.checking import REFERENCES
from pplgrad.lab.cli_faults import FAULT, Faults, traceback_option
from pplgrad.lab.cli_shared import json_option, opened, script_argument, seed_option, settings_option, show_json
from pplgrad.lab.progress import CheckProgress
from pplgrad.lab.script import Script
from pplgrad.lab.specs import objective, specification
from pplgrad.lab.tasks import Task, check_backend, make_run, unsound

# The worst verdict decides.
_CODES = {"unbiased": 0, "biased": 1, "broken": 1, "unknown": 3}


@click.command()
@script_argument
@click.option(
    "--estimator",
    "words",
    multiple=True,
    help="As in Python, 'DisARM()' or 'z=DisARM(),w=Reparam()', or score+loo; may be repeated.",
)
@click.option(
    "--elbo", "elbos", multiple=True, help="An ELBO of the library itself, such as TraceGraph_ELBO; may be repeated."
)
@click.option(
    "--objective",
    "target",
    default="ELBO()",
    show_default=True,
    help="Such as 'IWAE()', 'Renyi(0.5)', 'Expectation()'.",
)
@click.option("--particles", default=2, show_default=True, type=click.IntRange(1), help="Particles of each estimator.")
@click.option(
    "--batch-size", default=5, show_default=True, type=click.IntRange(1), help="Small ones can be enumerated."
)
@click.option(
    "--train", "steps", default=0, show_default=True, type=click.IntRange(0), help="Training steps before the check."
)
@click.option("--draws", default=2000, show_default=True, type=click.IntRange(100), help="Gradients of each estimator.")
@click.option(
    "--reference", type=click.Choice(REFERENCES), default="auto", show_default=True, help="What they are compared with."
)
@click.option(
    "--outcomes", default=4096, show_default=True, type=click.IntRange(1), help="As many are enumerated at most."
)
@click.option("--level", default=0.01, show_default=True, type=float, help="Rate of false alarms of a check.")
@click.option(
    "--tolerance", default=0.05, show_default=True, type=float, help="Bias that is called none, by the gradient's norm."
)
@seed_option
@settings_option
@click.option("--quiet", is_flag=True, help="No progress bar.")
@json_option
@traceback_option
def check(
    script: Path,
    backends: tuple[str, ...],
    words: tuple[str, ...],
    elbos: tuple[str, ...],
    target: str,
    particles: int,
    batch_size: int,
    steps: int,
    settings: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **budget: Any,
) -> None:
    """Say whether gradient estimators are unbiased on SCRIPT's program.

    Each is compared with the gradient of the enumerated objective where the program has few outcomes (a smaller
    batch or fewer latents help), else with the score function at every site: the bias with an interval, its z-score, variance
    and a verdict in words, for the whole gradient, each parameter and each site.

    \b
    Exit code 0: all unbiased. 1: one is biased. 2: the script raises, or an estimator does not fit; what could be
    checked is shown. 3: cannot tell with this many draws.

    \b
    pplgrad check models/sbn.py --set latents=2 --batch-size 2 --estimator 'DisARM()' --estimator 'GumbelSoftmax(0.5)'
    pplgrad check models/mixture.py --backend numpyro --elbo TraceGraph_ELBO
    """
    words = words or (() if elbos else ("score+loo",))
    loaded, backends, options = opened(script, backends, settings)
    for word in words:
        specification(word)
    objective(target)
    found, worst = [], 0
    total = len(backends) * (len(words) + len(elbos))
    with Faults() as faults, CheckProgress(total, quiet) as progress:
        for backend in backends:
            check_backend(backend)
            task = Task("snapshots", str(script), loaded.digest, options, backend, "score+loo", budget["seed"], particles, batch_size, target,
                        {"snapshots": [steps], "steps": steps, "learning_rate": 3e-3})  # fmt: skip
            for certificate in _certificates(task, loaded, (words, elbos), budget, faults, progress):
                found.append({"backend": backend, **certificate.to_dict()})
                worst = max(worst, _CODES[certificate.status], key=(0, 3, 1).index)
                if not as_json:
                    with progress.aside():
                        _show(backend, certificate)
    if as_json:
        show_json(found)
    raise SystemExit(FAULT if faults else worst)


def _show(backend: str, certificate: GradientCheck) -> None:
    """Print a certificate as wide as the terminal is."""
    from pplgrad.lab.sheet import Sheet, show_lines

    about = f"{certificate.draws:,} draws against {certificate.reference}; z is compared with {certificate.rows[0].critical:.1f}"
    show_lines([f"{backend}, {certificate.estimator}: {certificate.verdict}", about, ""])
    first = ("part", "name", "verdict", "|bias|", "z", "|gradient|", "interval", "variance", "signal/noise")
    heads, *rows = certificate.table()
    Sheet(("part", *heads[1:]), rows, numbers=heads[2:-1], first=first).show()
    click.echo()


def _certificates(
    task: Task,
    loaded: Script,
    asked: tuple[tuple[str, ...], tuple[str, ...]],
    budget: dict[str, Any],
    faults: Faults,
    progress: CheckProgress,
) -> Iterator[GradientCheck]:
    """Yield the certificates of a library, and note what cannot be checked."""
    with faults.of(loaded, task.backend):
        for name, check_one in make_run(task, loaded).certificates(*asked, {**budget, "progress": progress.phase}):
            certificate = None
            progress.begin(f"{task.backend} {name}")
            with faults.of(loaded, task.backend):
                certificate = check_one()
                if not all(math.isfinite(row.z) for row in certificate.rows) or certificate.status == "broken":
                    # A program whose densities are not finite has no gradient, which is no fault of an estimator.
                    if (found := unsound(loaded)) is not None:
                        certificate = None
                        raise found
            progress.end()
            if certificate is not None:
                yield certificate
