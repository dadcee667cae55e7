"""`pplgrad compare`: a study from the command line or from a TOML file."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pplgrad.lab.cli_faults import FAULT, Faults, say, traceback_option
from pplgrad.lab.cli_shared import PAGE, need, parsed, resumable, show_json
from pplgrad.lab.progress import LOG, StudyProgress, duration
from pplgrad.lab.script import PROGRAMS, ScriptError
from pplgrad.lab.study import Gradients, Study, Training, from_toml

SOME_FAILED = 4
"""The exit code of a comparison in which some estimators failed, and others did not."""


@click.command()
@click.argument("script", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    "backends",
    type=click.Choice(list(PROGRAMS)),
    multiple=True,
    help="Library; may be repeated. Those of the script by default.",
)
@click.option(
    "--estimator",
    "estimators",
    multiple=True,
    help="As in Python, 'DisARM()'; by site, 'z=DisARM(),w=Reparam()'; or score with baselines, score+loo, +average, +neural, "
    "+optimal, +optimal-past. '@4' at the end: four particles. May be repeated.",
)
@click.option("--objective", help="What is estimated, such as 'IWAE()'.  [default: ELBO()]")
@click.option("--steps", type=click.IntRange(0), help="Training steps of each run; 0 for no training.  [default: 1000]")
@click.option(
    "--snapshots", metavar="N,N,...", help="Compare gradients too, after so many training steps, such as 0,100,2000."
)
@click.option(
    "--draws",
    type=click.IntRange(20),
    help="Gradients of each estimator at a snapshot, a fifth of the reference's.  [default: 200]",
)
@click.option("--seeds", type=click.IntRange(1), help="Runs of each estimator, with seeds 0, 1, ...  [default: 3]")
@click.option(
    "--out", default="results", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
@click.option("--replace", is_flag=True, help="Put the results in the place of another study's in that folder.")
@click.option("--particles", type=click.IntRange(1), help="Particles of each estimator.  [default: 2]")
@click.option("--batch-size", type=click.IntRange(1), help="Data in each step.  [default: 100]")
@click.option(
    "--learning-rate",
    "learning_rates",
    multiple=True,
    type=float,
    help="Adam's; repeated, each estimator takes the best on the first seed.  [default: 0.003]",
)
@click.option("--compile", is_flag=True, help="Compile Pyro's training steps; NumPyro's are compiled in any case.")
@click.option("--baseline-learning-rate", type=float, help="Adam's, for learned baselines.  [default: 0.01]")
@click.option(
    "--bound-samples",
    type=click.IntRange(0),
    help="Samples of the held-out importance-weighted bound; 0 for none.  [default: 100]",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the model script; may be repeated."
)
@click.option("--data", help="The script's option 'data': a name, or the path of a local copy.")
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(1), help="Runs side by side, in processes of their own."
)
@click.option("--cluster", metavar="ADDRESS", help="Run on the workers of a Dask scheduler, such as tcp://host:8786.")
@click.option("--quiet", is_flag=True, help="No progress bar; the log in the folder is written all the same.")
@click.option("--json", "as_json", is_flag=True, help="Print the tables' numbers as JSON.")
@traceback_option
def compare(
    script: Path, out: Path, replace: bool, jobs: int, cluster: str | None, quiet: bool, as_json: bool, **given: Any
) -> None:
    """Compare estimators on SCRIPT's program, or run the study that a TOML file describes.

    Trains under each estimator, and (with --snapshots) measures bias, variance, time and memory of their gradients at the same
    parameters. Leaves tables on the screen, study.parquet (one row a number), report.html, and pictures as PNG and SVG. What
    is finished is never repeated: interrupt at any time, and give the same command again to go on, with more estimators or
    seeds if you like. Another study needs another folder (--out), or --replace. An estimator that does not fit, or fails, is
    reported with its reason.

    \b
    Exit code 0: done. 1: training diverged under every estimator. 2: the script raises, or no estimator fits; what
    else there is, is shown and kept. 4: some estimators failed, the others are done.

    \b
    pplgrad compare models/sbn.py --estimator score+loo --estimator 'DisARM()' --snapshots 0,100,1000 --jobs 2
    pplgrad compare studies/disarm_2020_linear.toml --data digits --steps 1000 --snapshots 0,100,1000
    """
    need("compare", "joblib", "rich", *PAGE)
    from pplgrad.lab.folder import alone, claim
    from pplgrad.lab.report import write_report
    from pplgrad.lab.results import write
    from pplgrad.lab.runner import Plan, Workers, perform_study
    from pplgrad.lab.tables import show
    from pplgrad.lab.tasks import check_folder

    plan = Plan(_study(script, given))
    study = plan.study
    runs = check_folder(out)
    began = time.time()
    with alone(out):
        claim(plan, out, replace)
        with StudyProgress(plan, out, quiet) as progress, resumable(lambda: _so_far(progress, out)):
            results = perform_study(plan, runs, Workers(jobs, cluster), progress.on_result)
        about = _about(results)
        frame = write(results, study, about, out)
        page = write_report(out)
    LOG.info("finished: %d runs, %s", len(results), duration(time.time() - began))
    faults = _faults(results)
    if as_json:
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        show_json({**about, "study": study.to_dict(), "rows": rows})
    elif not frame["error"].notna().all() or not faults:
        show(frame, page, faults.found)
    with faults:
        pass
    if faults:
        raise SystemExit(FAULT)
    if len(frame) and frame["error"].notna().all():
        raise SystemExit(1)
    if failed := _failed(results):
        say(f"{len(failed)} of {len(study.compared)} estimators failed, the others are done: {', '.join(failed)}.")
        raise SystemExit(SOME_FAILED)


def _about(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a reader of the results wants to know beside the study itself."""
    from pplgrad.lab.report import command_line
    from pplgrad.lab.tasks import installed_versions, machine

    return {
        "command": command_line(sys.argv[1:]),
        "versions": installed_versions(),
        "machine": machine(),
        "finished": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "wall_time": duration(sum(r.get("seconds_taken", 0.0) for r in results)) + " of work",
    }


def _so_far(progress: StudyProgress, out: Path) -> str:
    """Return what an interruption leaves."""
    return f"{progress.finished()} of {progress.total} runs are finished and kept in {out}; the same command goes on from there"


def _failed(results: list[dict[str, Any]]) -> list[str]:
    """Return the estimators that failed; one that has a result at another learning rate of the search did not."""
    runs: dict[tuple, list[bool]] = {}
    for task, bad in ((result["task"], "error" in result) for result in results):
        if task["kind"] in ("training", "gradients"):
            key = (task["estimator"], task["backend"], task["kind"], task["seed"])
            runs.setdefault(key, []).append(bad)
    return list(dict.fromkeys(key[0] for key, bad in runs.items() if all(bad)))


def _faults(results: list[dict[str, Any]]) -> Faults:
    """Return the failures that are the script's: what it raised, and what every estimator failed at in a library."""
    faults = Faults()
    for result in results:
        if "fault" in result:
            faults.add(result["fault"], result["task"]["backend"], result.get("details"))
    for backend in dict.fromkeys(result["task"]["backend"] for result in results):
        own = [r for r in results if r["task"]["backend"] == backend and r["task"]["kind"] in ("training", "gradients")]
        if all("error" in r and "diverged" not in r for r in own):
            for result in own:
                # A consequence of another failure was reported with that failure.
                if "fault" not in result and "because" not in result:
                    faults.add(result["error"], backend, result.get("details"))
    return faults


def _study(script: Path, given: dict[str, Any]) -> Study:
    """Return the study: of the TOML file, or of the script; what is said on the command line goes before it."""
    options: dict[str, Any] = dict(parsed(given["settings"]))
    if given["data"] is not None:
        options["data"] = given["data"]
    named = {
        k: given[k] for k in ("backends", "estimators", "objective", "seeds", "particles", "batch_size") if given[k]
    }
    study = from_toml(script) if script.suffix == ".toml" else Study(str(script))
    training = study.training if given["steps"] is None or given["steps"] > 0 else None
    if training is None and given["steps"]:
        training = Training()
    if training is not None:
        names = ("steps", "learning_rates", "baseline_learning_rate", "bound_samples", "compile")
        training = replace(training, **{k: given[k] for k in names if given[k] not in (None, (), False)})
    gradients = study.gradients
    if given["snapshots"]:
        gradients = replace(gradients or Gradients(), snapshots=_numbers(given["snapshots"]))
    if given["draws"]:
        if gradients is None:
            raise ScriptError(
                "--draws are those of gradients at snapshots; give --snapshots, such as --snapshots 0,100,1000."
            )
        gradients = replace(gradients, draws=given["draws"], reference_draws=5 * given["draws"])
    if training is None and gradients is None:
        raise ScriptError(
            "There is nothing to compare: --steps 0 leaves out training; give --snapshots, such as --snapshots 0."
        )
    return replace(study, **named, options={**study.options, **options}, training=training, gradients=gradients)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ScriptError(f"--snapshots takes numbers of steps, such as 0,100,2000; got '{text}'.") from None
