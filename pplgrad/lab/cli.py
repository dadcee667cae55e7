"""The command line."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import click
except ModuleNotFoundError:  # pragma: no cover
    sys.exit("The command line needs click and more, which are not installed; pip install 'pplgrad[research]'.")

from pplgrad.errors import PplgradError
from pplgrad.estimators import registry
from pplgrad.lab.script import PROGRAMS, ScriptError, load_script
from pplgrad.lab.study import RunConfig, check_backend, check_folder, installed_versions, perform
from pplgrad.lab.words import SIMPLE, estimator

# Asked for before anything runs: the files are written only after the last run.
_NEEDED = ("joblib", "matplotlib", "pandas", "pyarrow", "rich")
_BACKENDS = click.Choice(list(PROGRAMS))


class _Group(click.Group):
    """A command group that shows pplgrad's own errors as one sentence, with exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PplgradError as error:
            click.echo(f"pplgrad: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pplgrad")
def main() -> None:
    """A gradient estimator for each latent sample site, in Pyro and in NumPyro."""


@main.command()
@click.option("--format", "form", type=click.Choice(["table", "markdown"]), default="table", show_default=True)
def estimators(form: str) -> None:
    """List all estimators with what they declare."""
    if form == "markdown":
        click.echo(registry.markdown())
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(caption="evaluations: of the program, beyond the primary draw, for each site")
    for column in registry.COLUMNS:
        shown.add_column(column, overflow="fold")
    for row in registry.table():
        shown.add_row(*row)
    Console().print(shown)


@main.command()
@click.argument("script", type=click.Path(path_type=Path))
@click.option("--backend", "backends", type=_BACKENDS, multiple=True, help="Library to train in; may be repeated.")
@click.option(
    "--estimator",
    "words",
    multiple=True,
    help="score, or score with baselines: score+loo, score+average, score+neural, score+optimal, score+optimal-past; or "
    f"{', '.join(SIMPLE)}; may be repeated.",
)
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(1), help="Training steps of each run.")
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(1), help="Runs of each estimator, with seeds 0, 1, ..."
)
@click.option(
    "--out", default="results", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
@click.option(
    "--particles", default=2, show_default=True, type=click.IntRange(1), help="Particles, the same for every estimator."
)
@click.option("--batch-size", default=100, show_default=True, type=click.IntRange(1), help="Data in each step.")
@click.option("--learning-rate", default=3e-3, show_default=True, type=float, help="Adam's, for model and guide.")
@click.option(
    "--baseline-learning-rate", default=1e-2, show_default=True, type=float, help="Adam's, for learned baselines."
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the model script; may be repeated."
)
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(1), help="Runs side by side, in processes of their own."
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def compare(
    script: Path,
    backends: tuple[str, ...],
    words: tuple[str, ...],
    steps: int,
    seeds: int,
    out: Path,
    particles: int,
    batch_size: int,
    learning_rate: float,
    baseline_learning_rate: float,
    settings: tuple[str, ...],
    jobs: int,
    quiet: bool,
) -> None:
    """Train SCRIPT's model under each estimator, and compare them.

    Leaves a table on the screen, runs.csv, runs.parquet and curves.parquet (one row a run, one row a point), and the
    curves as curves.png and curves.svg. A run that is finished is never repeated: interrupt at any time, and give
    the same command again to go on.

    The gradient variance is the trace of the covariance of the guide's gradient of the loss per datum, from 64
    draws on one batch at the final parameters. The time of a step is the median without the first ones.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ScriptError(f"compare needs {', '.join(missing)}, not installed; pip install 'pplgrad[research]'.")
    backends = backends or tuple(PROGRAMS)
    words = words or ("score", "score+loo")
    loaded = load_script(script, backends)
    options = loaded.options(_parsed(settings))
    for backend in backends:
        check_backend(backend)
    for word in words:
        estimator(word)
        if particles < 2 and {"loo", "optimal"} & set(word.split("+")):
            raise ScriptError(f"Estimator '{word}' needs at least two particles; pass --particles 2.")
    loaded.load(options, 0)
    runs = check_folder(out)
    versions = installed_versions()
    configs = [
        RunConfig(
            script=str(script),
            digest=loaded.digest,
            options=options,
            backend=backend,
            estimator=word,
            seed=seed,
            steps=steps,
            particles=particles,
            batch_size=batch_size,
            learning_rate=learning_rate,
            baseline_learning_rate=baseline_learning_rate,
            versions=versions,
        )
        for backend in dict.fromkeys(backends)
        for word in dict.fromkeys(words)
        for seed in range(seeds)
    ]
    results = _perform_all(configs, runs, jobs, quiet)
    _show(results, out, f"{script.name}, {steps} steps, {particles} particles")


def _parsed(settings: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ScriptError(f"--set takes NAME=VALUE; got '{setting}'.")
        pairs[name] = value
    return pairs


def _perform_all(configs: list[RunConfig], runs: Path, jobs: int, quiet: bool) -> list[dict[str, Any]]:
    """Do all runs that are not done yet, with a progress bar over their steps; return all results in order."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    waiting = [config for config in configs if not (runs / config.file).exists()]
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        total = sum(config.steps for config in configs)
        done = sum(config.steps for config in configs) - sum(config.steps for config in waiting)
        task = bar.add_task("comparing", total=total, completed=done)
        if jobs == 1:
            for config in waiting:
                bar.update(task, description=f"{config.backend} {config.estimator} seed {config.seed}")
                perform(config, runs, lambda steps: bar.advance(task, steps))
        else:
            from joblib import Parallel, delayed

            # Backends side by side keep the processes of equal length.
            shuffled = sorted(waiting, key=lambda config: (config.seed, config.estimator, config.backend))
            calls = (delayed(perform)(config, runs) for config in shuffled)
            with warnings.catch_warnings():
                # A worker that has grown is replaced by a new one, which loses nothing.
                warnings.filterwarnings("ignore", message="A worker stopped while some jobs")
                for result in Parallel(n_jobs=jobs, return_as="generator_unordered")(calls):
                    bar.advance(task, result["config"]["steps"])
    return [perform(config, runs) for config in configs]


def _show(results: list[dict[str, Any]], out: Path, title: str) -> None:
    from rich.console import Console

    from pplgrad.lab.results import table, write

    try:
        frame, files = write(results, out, title)
    except OSError as error:
        raise ScriptError(f"The results cannot be written to {out} ({error.strerror}).") from None
    console = Console()
    wide = console if console.is_terminal else Console(width=120)
    wide.print(table(frame))
    wide.print("written: " + ", ".join(str(file) for file in files), soft_wrap=True, highlight=False)
