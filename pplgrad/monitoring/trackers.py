"""Callbacks of `Watch` that send its records to an experiment tracker."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pplgrad.errors import ConfigurationError
from pplgrad.monitoring.watch import Record, by_name


def to_wandb(run: Any = None) -> Callable[[Record], None]:
    """Return a callback of `Watch` that logs to a run of Weights & Biases.

    The names of the numbers are those of the TensorBoard event file, such as `z/entropy`. They are drawn over `watch_step`, the training
    step, and not over the run's own count of calls, so that nothing is dropped beside what the training logs by itself.

    Args:
        run: what `wandb.init` returned. Default: None, the run that is active.

    Returns:
        The callback.

    Raises:
        ConfigurationError: no run is given and none is active, or wandb is not installed.

    Example:
        >>> class Run:
        ...     def define_metric(self, name, step_metric): pass
        ...     def log(self, numbers): print(numbers)
        >>> to_wandb(Run())({"step": 200, "loss": 1.5, "sites": {"z": {"entropy": 0.25}}})
        {'loss': 1.5, 'z/entropy': 0.25, 'watch_step': 200}

    References:
        https://docs.wandb.ai/guides/track/log/customize-logging-axes.
    """
    if run is None:
        run = _imported("wandb", "to_wandb").run
    if run is None:
        raise ConfigurationError(
            "to_wandb() finds no active run; call wandb.init(...) before, or give its run as to_wandb(run)."
        )
    known: set[str] = set()

    def log(record: Record) -> None:
        numbers = by_name(record)
        for name in numbers.keys() - known:
            run.define_metric(name, step_metric="watch_step")
            known.add(name)
        run.log({**numbers, "watch_step": record["step"]})

    return log


def to_mlflow(run_id: str | None = None) -> Callable[[Record], None]:
    """Return a callback of `Watch` that logs to a run of MLflow.

    The names of the numbers are those of the TensorBoard event file, such as `z/entropy`; characters that MLflow does not allow become
    `_`. The run is fixed here: MLflow has an active run for each thread, and JAX calls back from threads of its own.

    Args:
        run_id: the run's id. Default: None, the run that is active.

    Returns:
        The callback.

    Raises:
        ConfigurationError: no run is given and none is active, or MLflow is not installed.

    Example:
        >>> to_mlflow("0123")  # doctest: +SKIP
        <function to_mlflow.<locals>.log at ...>

    References:
        https://mlflow.org/docs/latest/ml/tracking/tracking-api.
    """
    mlflow = _imported("mlflow", "to_mlflow")
    if run_id is None:
        active = mlflow.active_run()
        if active is None:
            raise ConfigurationError(
                "to_mlflow() finds no active run; call mlflow.start_run() before, or give a run's id as to_mlflow(run_id)."
            )
        run_id = active.info.run_id

    def log(record: Record) -> None:
        numbers = {re.sub(r"[^\w\-./ :]", "_", name): value for name, value in by_name(record).items()}
        mlflow.log_metrics(numbers, step=record["step"], run_id=run_id)

    return log


def _imported(name: str, function: str) -> Any:
    try:
        return __import__(name)
    except ModuleNotFoundError:
        raise ConfigurationError(f"{function} needs {name}, which is not installed; pip install {name}.") from None
