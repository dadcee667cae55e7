"""A study: many independent runs, each kept in a file of its own, so that none is lost or done twice."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from pplgrad.lab.script import Script, ScriptError, load_script

PACKAGES = ("pplgrad", "torch", "pyro-ppl", "jax", "numpyro")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    script: str
    digest: str
    options: dict[str, Any]
    backend: str
    estimator: str
    seed: int
    steps: int
    particles: int
    batch_size: int
    learning_rate: float
    baseline_learning_rate: float
    points: int = 20
    gradient_draws: int = 64
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of the run's file, which changes with anything that decides the result."""
        known = {name: value for name, value in asdict(self).items() if name != "script"}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.backend}-{self.estimator.replace('+', '_')}-{self.seed}-{digest}.json"


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_backend(backend: str) -> None:
    """Refuse a backend whose library is not installed."""
    try:
        import_module(f"pplgrad.{backend}")
    except ModuleNotFoundError as error:
        raise ScriptError(
            f"Backend '{backend}' needs {error.name}, which is not installed; pip install 'pplgrad[{backend}]'."
        ) from None


def check_folder(out: Path) -> Path:
    """Make the output folder and its runs, and refuse one that cannot be written."""
    runs = out / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise ScriptError(f"The output folder {out} cannot be written ({error.strerror}); choose another.") from None
    return runs


def perform(config: RunConfig, runs: Path, progress: Progress = lambda steps: None) -> dict[str, Any]:
    """Do a run, or read it if it was done before; return its result."""
    path = runs / config.file
    if path.exists():
        return json.loads(path.read_text())
    script = load_script(Path(config.script), (config.backend,))
    train = import_module(f"pplgrad.lab.train_{config.backend}").train
    result = {"config": asdict(config), **train(config, script, progress)}
    write_atomically(path, json.dumps(result))
    return result


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there, whenever the process is killed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Batches:
    """The batches of a run: the same for every estimator and backend with the same seed."""

    def __init__(self, config: RunConfig, script: Script) -> None:
        self.config = config
        self.script = script
        self.train, self.test = script.load(config.options, config.seed)
        self.rng = np.random.default_rng([config.seed, 1])
        self.size = len(self.train) if script.whole_data else min(config.batch_size, len(self.train))

    def next(self) -> np.ndarray:
        """Return the next step's batch."""
        chosen = slice(None) if self.script.whole_data else self.rng.choice(len(self.train), self.size, replace=False)
        return self.script.prepare(self.config.options, self.train[chosen], self.rng)

    def fixed(self, which: str) -> np.ndarray:
        """Return the data on which the objective is evaluated, prepared once."""
        data = self.train if which == "train" else self.test
        return self.script.prepare(self.config.options, data, np.random.default_rng([self.config.seed, 2]))


def evaluation_steps(steps: int, points: int) -> list[int]:
    """Return the steps after which the objective is evaluated: the start, the end and between.

    >>> evaluation_steps(10, 5)
    [0, 2, 4, 6, 8, 10]
    """
    return sorted({round(i * steps / points) for i in range(points + 1)})


def total_variance(gradients: np.ndarray) -> float:
    """Return the trace of the covariance of gradient draws, of shape (draws, parameters)."""
    return float(gradients.var(axis=0, ddof=1).sum())
