"""Run the pieces of a study side by side: processes of this machine, or a Dask cluster."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pplgrad.lab.script import Script, ScriptError, load_script
from pplgrad.lab.study import Study
from pplgrad.lab.tasks import Result, Task, check_backend, installed_versions, kept, perform, write_atomically

Needs = dict[str, Result]


@dataclass(frozen=True)
class Workers:
    """Where tasks run: `jobs` processes of this machine, or the workers of a Dask scheduler."""

    jobs: int = 1
    cluster: str | None = None


class Plan:
    """A study as tasks, in stages: what a stage needs of an earlier one is known when it begins."""

    def __init__(self, study: Study) -> None:
        self.script: Script = load_script(Path(study.script), tuple(study.backends))
        self.study = study = replace(study, backends=study.backends or self.script.backends)
        for backend in study.backends:
            check_backend(backend)
        self.options = self.script.options(study.options)
        self.script.load(self.options, 0)
        self.versions = installed_versions()

    def task(self, kind: str, backend: str, estimator: str, seed: int, **settings: Any) -> Task:
        """Return a task of the study."""
        study = self.study
        return Task(
            kind=kind,
            script=study.script,
            digest=self.script.digest,
            options=self.options,
            backend=backend,
            estimator=estimator,
            seed=seed,
            particles=study.particles,
            batch_size=study.batch_size,
            objective=study.objective,
            settings=settings,
            versions=self.versions,
        )

    def snapshots(self, backend: str, seed: int) -> Task:
        """Return the training run whose parameters are kept."""
        plan = self.study.gradients
        assert plan is not None
        steps = sorted(set(plan.snapshots))
        settings = {"snapshots": steps, "steps": max(steps), "learning_rate": plan.learning_rate, **self._descent()}
        return self.task("snapshots", backend, plan.trained_with, seed, **settings)

    def _descent(self) -> dict[str, Any]:
        found = dict(self.study.gradient_descent)
        return {"gradient_descent": found} if found else {}

    def reference(self, backend: str, seed: int) -> Task:
        """Return the task that finds the gradient at the snapshots."""
        plan = self.study.gradients
        assert plan is not None
        settings = {"draws": plan.reference_draws, "of": self.snapshots(backend, seed).key}
        return self.task("reference", backend, "score", seed, **settings)

    def gradients(self, backend: str, seed: int, estimator: str) -> Task:
        """Return the task that measures an estimator at the snapshots."""
        plan = self.study.gradients
        assert plan is not None
        settings = {"draws": plan.draws, "warm_up": plan.warm_up, "against": self.reference(backend, seed).key}
        return self.task("gradients", backend, estimator, seed, **settings)

    def training(self, backend: str, seed: int, estimator: str, rate: float) -> Task:
        """Return the task that trains under an estimator."""
        plan = self.study.training
        assert plan is not None
        settings = {
            "steps": plan.steps,
            "points": plan.points,
            "learning_rate": rate,
            "baseline_learning_rate": plan.baseline_learning_rate,
            "gradient_draws": plan.gradient_draws,
            "bound_samples": plan.bound_samples,
            **self._descent(),
        }
        if plan.patience:
            names = ("patience", "minimum_change", "validation")
            settings |= {name: getattr(plan, name) for name in names}
        if plan.compile and backend == "pyro":
            settings["compile"] = True
        return self.task("training", backend, estimator, seed, **settings)

    def runs(self) -> Iterator[tuple[str, str, int]]:
        """Yield every backend, estimator and seed that trains."""
        yield from self._each(self.study.estimators)

    def measurements(self) -> Iterator[tuple[str, str, int]]:
        """Yield every backend, estimator and seed whose gradient is measured at the snapshots."""
        if self.study.gradients is not None:
            yield from self._each(self.study.compared)

    def _each(self, estimators: Sequence[str]) -> Iterator[tuple[str, str, int]]:
        for backend in dict.fromkeys(self.study.backends):
            for estimator in dict.fromkeys(estimators):
                for seed in range(self.study.seeds):
                    yield backend, estimator, seed

    def measured(self) -> list[tuple[str, int]]:
        """Return every backend and seed for which gradients are measured."""
        if self.study.gradients is None:
            return []
        return [(b, s) for b in dict.fromkeys(self.study.backends) for s in range(self.study.seeds)]

    def wanted(self, made: Callable[[str, int], Task], runs: Path | None) -> list[tuple[str, int]]:
        """Return every backend and seed whose snapshots, or whose reference, are in the folder of runs or have to be made.

        A measurement that is not there needs both.
        """
        missing = {
            (b, s)
            for b, estimator, s in self.measurements()
            if runs is None or kept(self.gradients(b, s, estimator), runs) is None
        }
        return [
            pair
            for pair in self.measured()
            if pair in missing or (runs is not None and kept(made(*pair), runs) is not None)
        ]

    def total(self, folder: Path | None = None) -> int:
        """Return the number of tasks, where the folder of runs holds some results already."""
        runs, rates = len(list(self.runs())), len(self.study.training.learning_rates) if self.study.training else 0
        pairs = len(set(self.study.backends)) * len(set(self.study.estimators))
        before = sum(len(self.wanted(made, folder)) for made in (self.snapshots, self.reference))
        measured = before + len(list(self.measurements()))
        return measured + (runs + pairs * (rates - 1) if rates else 0)


def perform_study(
    plan: Plan, runs: Path, workers: Workers, on_result: Callable[[Task, Result], None] = lambda task, result: None
) -> list[Result]:
    """Do every task that is not done yet; return all results.

    The parameters at the snapshots and the reference are large files. Once everything is measured with them, they need not be there.
    """
    done: dict[str, Result] = {}

    with _pool(workers) as map_tasks:

        def finish(tasks: list[tuple[Task, Needs]]) -> None:
            for task, result in map_tasks(tasks, runs):
                done[task.key] = result
                on_result(task, result)

        def needs(**tasks: Task) -> Needs:
            # What is not there has been used already.
            return {name: done[task.key] for name, task in tasks.items() if task.key in done}

        references = plan.wanted(plan.reference, runs)
        finish([(plan.snapshots(*pair), {}) for pair in plan.wanted(plan.snapshots, runs)])
        first = [(plan.reference(*pair), needs(snapshots=plan.snapshots(*pair))) for pair in references]
        finish(_possible(first, done, on_result) + _searches(plan))
        second = []
        for backend, estimator, seed in plan.measurements():
            both = needs(snapshots=plan.snapshots(backend, seed), reference=plan.reference(backend, seed))
            second.append((plan.gradients(backend, seed, estimator), both))
        finish(_possible(second, done, on_result) + _rest(plan, done))
    # In the plan's order, whichever came first.
    order = {run: i for i, run in enumerate(dict.fromkeys([*plan.runs(), *plan.measurements()]))}

    def place(result: Result) -> tuple:
        task = result["task"]
        return task["kind"], order.get((task["backend"], task["estimator"], task["seed"]), 0), str(task["settings"])

    return sorted(done.values(), key=place)


def _possible(
    tasks: list[tuple[Task, Needs]], done: dict[str, Result], on_result: Callable[[Task, Result], None]
) -> list[tuple[Task, Needs]]:
    """Return the tasks whose needs are there; the others fail with the reason of what failed before them."""
    result = []
    for task, needs in tasks:
        failed = next((need for need in needs.values() if "error" in need), None)
        if failed is None:
            result.append((task, needs))
        else:
            why: Result = {name: failed[name] for name in ("fault", "diverged", "details") if name in failed}
            text = f"what it is compared with failed: {failed['error']}"
            done[task.key] = {"task": asdict(task), **why, "error": text, "because": failed["error"]}
            on_result(task, done[task.key])
    return result


def _searches(plan: Plan) -> list[tuple[Task, Needs]]:
    """Return the first seed's training runs, with every learning rate."""
    if plan.study.training is None:
        return []
    rates = plan.study.training.learning_rates
    first = [(b, e, s) for b, e, s in plan.runs() if s == 0]
    return [(plan.training(b, s, e, rate), {}) for b, e, s in first for rate in rates]


def _rest(plan: Plan, done: dict[str, Result]) -> list[tuple[Task, Needs]]:
    """Return the other seeds' training runs, with the learning rate that served the first seed best."""
    if plan.study.training is None:
        return []
    return [(plan.training(b, s, e, best_rate(plan, done, b, e)), {}) for b, e, s in plan.runs() if s > 0]


def best_rate(plan: Plan, done: dict[str, Result], backend: str, estimator: str) -> float:
    """Return the learning rate with the best final train objective on the first seed."""
    assert plan.study.training is not None

    def reached(rate: float) -> float:
        result = done[plan.training(backend, 0, estimator, rate).key]
        return result["curve"][-1]["train"] if "error" not in result else -float("inf")

    return max(plan.study.training.learning_rates, key=reached)


Mapped = Callable[[list[tuple[Task, Needs]], Path], Iterator[tuple[Task, Result]]]


@contextmanager
def _pool(workers: Workers) -> Iterator[Mapped]:
    """Return what maps tasks to results as they come."""
    if workers.cluster is None and workers.jobs == 1:
        yield lambda tasks, runs: ((task, perform(task, runs, needs)) for task, needs in tasks)
        return
    from joblib import Parallel, delayed, parallel_config

    with _backend(workers) as backend, parallel_config(**backend), warnings.catch_warnings():
        # A worker that has grown is replaced by a new one, which loses nothing.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs")

        def mapped(tasks: list[tuple[Task, Needs]], runs: Path) -> Iterator[tuple[Task, Result]]:
            waiting = []
            for task, needs in tasks:
                if (found := kept(task, runs)) is not None:
                    yield task, found
                else:
                    waiting.append((task, needs))
            # Long ones last would leave the other workers idle: backends and estimators take turns.
            waiting.sort(key=lambda pair: (pair[0].seed, pair[0].estimator, pair[0].backend))
            calls = (delayed(_remote)(task, str(runs.resolve()), needs) for task, needs in waiting)
            for task, result in _alive(Parallel(return_as="generator_unordered")(calls)):
                if "error" not in result and not (runs / task.file).exists():
                    # A worker elsewhere that does not see this folder hands its result back.
                    _keep(runs, task, result)
                yield task, result

        yield mapped


def _alive(results: Iterator[tuple[Task, Result]]) -> Iterator[tuple[Task, Result]]:
    """Hand results on; say in a sentence that a worker was lost, whatever ended it."""
    try:
        yield from results
    except RuntimeError as error:
        # joblib's own TerminatedWorkerError is of this kind, and what a script raises never gets here.
        if "Worker" not in type(error).__name__ and "Pool" not in type(error).__name__:
            raise
        raise ScriptError(
            "A worker process ended before its work was done (the script ended it, a crash, or no memory left); give the same "
            "command again to go on from there, with --jobs 1 to see what happens."
        ) from error


def _keep(runs: Path, task: Task, result: Result) -> None:
    write_atomically(runs / task.file, json.dumps(result))


def _remote(task: Task, runs: str, needs: Needs) -> tuple[Task, Result]:
    """Do a task in a worker, and keep the result at once if the worker sees the folder."""
    folder = Path(runs)
    return task, perform(task, folder if folder.is_dir() else None, needs)


@contextmanager
def _backend(workers: Workers) -> Iterator[dict[str, Any]]:
    """Return joblib's settings; connect to the cluster if there is one."""
    if workers.cluster is None:
        yield {"backend": "loky", "n_jobs": workers.jobs}
        return
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise ScriptError("--cluster needs Dask, which is not installed; pip install 'pplgrad[cluster]'.") from None
    try:
        client = Client(workers.cluster, timeout="10s")
    except (OSError, ValueError) as error:
        raise ScriptError(f"There is no Dask scheduler at {workers.cluster} ({error}).") from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise ScriptError(
                f"The Dask scheduler at {workers.cluster} has no workers; start one with `dask worker {workers.cluster}`."
            )
        yield {"backend": "dask", "n_jobs": -1}
