"""A study: which estimators are compared on which program, and how. Written on the command line or in a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pplgrad.errors import did_you_mean
from pplgrad.lab.script import PROGRAMS, ScriptError
from pplgrad.lab.specs import objective, specification


@dataclass(frozen=True)
class Gradients:
    """Estimators at the same parameters: bias, variance, time, at snapshots of one training run.

    `snapshots` are numbers of training steps, taken under `trained_with`; `draws` gradients of each estimator are compared
    with the mean of `reference_draws` of the score function with leave-one-out over ten particles. What an
    estimator learns is learned for `warm_up` steps before. `also` are estimators that are measured here and do not train,
    such as one whose gradient takes too long for many steps.
    """

    snapshots: tuple[int, ...] = (0,)
    draws: int = 200
    reference_draws: int = 1000
    warm_up: int = 200
    trained_with: str = "score+loo @2"
    learning_rate: float = 3e-3
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Training:
    """Training under each estimator: curves over steps and time, and a held-out importance-weighted bound.

    With several `learning_rates` each estimator first trains with each of them on the first seed, and goes on with the one
    whose final train objective is best. `bound_samples` are those of the bound (0: none).
    With a `patience` above 0, a share `validation` of the training rows is held back, and a run stops once the bound on them was no better
    than the best by more than `minimum_change` at so many points of the curve in a row.
    `compile` compiles Pyro's steps; NumPyro's are compiled in any case.
    """

    steps: int = 1000
    learning_rates: tuple[float, ...] = (3e-3,)
    baseline_learning_rate: float = 1e-2
    points: int = 20
    gradient_draws: int = 64
    bound_samples: int = 100
    patience: int = 0
    minimum_change: float = 0.0
    validation: float = 0.1
    compile: bool = False


@dataclass(frozen=True)
class Study:
    """Everything that decides a study's results, but for the script's own text and the versions of packages."""

    script: str
    estimators: tuple[str, ...] = ("score", "score+loo")
    backends: tuple[str, ...] = ()
    """The libraries; none for those that the script has a program for."""
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3
    particles: int = 2
    batch_size: int = 100
    objective: str = "ELBO()"
    gradient_descent: Mapping[str, float] = field(default_factory=dict)
    """Parameters that follow plain gradient descent on the loss per datum instead of Adam, with their rates (0: fixed)."""
    gradients: Gradients | None = None
    training: Training | None = field(default_factory=Training)

    def __post_init__(self) -> None:
        for word in self.estimators:
            specification(word)
        objective(self.objective)
        for name in self.backends:
            if name not in PROGRAMS:
                hint = did_you_mean(name, PROGRAMS) or "."
                raise ScriptError(f"Unknown backend '{name}'; the backends are: {', '.join(PROGRAMS)}{hint}")
        _at_least("seeds", self.seeds, 1, most=10_000)
        for name, value in (("particles", self.particles), ("batch_size", self.batch_size)):
            _at_least(name, value, 1)
        if self.gradients is not None:
            for word in (self.gradients.trained_with, *self.gradients.also):
                specification(word)
            for step in self.gradients.snapshots:
                _at_least("gradients.snapshots", step, 0)
            _at_least("gradients.draws", self.gradients.draws, 20)
            _at_least("gradients.reference_draws", self.gradients.reference_draws, 20)
            _at_least("gradients.warm_up", self.gradients.warm_up, 0)
            _rate("gradients.learning_rate", self.gradients.learning_rate)
            if not self.gradients.snapshots:
                raise ScriptError("gradients.snapshots is empty; give one or more.")
        for name, rate in self.gradient_descent.items():
            _rate(f"gradient_descent.{name}", rate, "rate")
        if self.training is not None:
            _at_least("training.steps", self.training.steps, 1)
            _at_least("training.points", self.training.points, 1)
            for name in ("patience", "gradient_draws", "bound_samples"):
                _at_least(f"training.{name}", getattr(self.training, name), 0)
            for rate in (*self.training.learning_rates, self.training.baseline_learning_rate):
                _rate("training's learning rate", rate, "rate")
            if not 0 < self.training.validation < 1:
                raise ScriptError(
                    f"training.validation = {self.training.validation!r}: give a share, above 0 and below 1."
                )
            _rate("training.minimum_change", self.training.minimum_change)
            if not self.training.learning_rates:
                raise ScriptError("training.learning_rates is empty; give one or more.")

    @property
    def compared(self) -> list[str]:
        """All estimators, each once: those that train, and those that are measured alone."""
        return list(dict.fromkeys([*self.estimators, *(self.gradients.also if self.gradients else ())]))

    def to_dict(self) -> dict[str, Any]:
        """Return the study as plain data, as a TOML file would have it."""
        found = asdict(self)
        if self.training is not None and not self.training.patience:
            # As studies were written that knew of no early stopping.
            for name in ("patience", "minimum_change", "validation"):
                del found["training"][name]
        return found


def _at_least(name: str, value: Any, least: int, most: int = 10**9) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ScriptError(f"{name} = {value!r}: give a whole number, {least} or more.")
    if value > most:
        raise ScriptError(f"{name} is more than {most:,}; give a smaller number.")


def _rate(name: str, value: Any, what: str = "number") -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ScriptError(f"{name} = {value!r}: give a {what}, 0 or more.")


def from_toml(path: Path) -> Study:
    """Return the study that a TOML file describes; its script's path is relative to the file."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ScriptError(f"The study {path} has more than {_LARGEST:,} bytes; a study's file is a page of text.")
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise ScriptError(f"The study {path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ScriptError(f"The study {path} is not TOML: {error}.") from None
    if not isinstance(found.get("script"), str):
        raise ScriptError(f'The study {path} names no script; write script = "..." with the path of a model script.')
    parts = {name: _part(kind, found.pop(name), name, path) for name, kind in PARTS.items() if name in found}
    script = path.parent / found.pop("script")
    if "training" not in parts:
        parts["training"] = None
    given = _checked(Study, found, path, "")
    return Study(script=str(script), **given, **parts)


PARTS: dict[str, type[Gradients] | type[Training]] = {"gradients": Gradients, "training": Training}
"""The parts of a study that may be left out."""
_LARGEST = 10**6
_TABLES, _WORDS = ("options", "gradient_descent"), ("estimators", "backends", "also")


def _part(kind: type, found: Any, name: str, path: Path) -> Any:
    if not isinstance(found, dict):
        raise ScriptError(f"The study {path}: [{name}] is a table.")
    return kind(**_checked(kind, found, path, f"[{name}] "))


def _checked(kind: type, found: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Return values for a dataclass, lists as tuples; refuse what it does not know."""
    known = {f.name: f.default for f in fields(kind)}
    for name in found:
        if name not in known:
            hint = did_you_mean(name, known) or "."
            raise ScriptError(f"The study {path}: {where}knows no '{name}'; it knows {', '.join(known)}{hint}")
    for name, value in found.items():
        if isinstance(known[name], tuple) and not isinstance(value, list):
            raise ScriptError(f"The study {path}: {where}{name} is a list.")
        if name in _TABLES and not isinstance(value, dict):
            raise ScriptError(f"The study {path}: {where}{name} is a table.")
        if name in _WORDS and not all(isinstance(word, str) for word in value):
            raise ScriptError(f"The study {path}: {where}{name} is a list of words in quotes.")
        if isinstance(known[name], float) and type(value) not in (int, float):
            raise ScriptError(f"The study {path}: {where}{name} is a number; got {value!r}.")
        if type(known[name]) in (bool, int, str) and type(value) is not type(known[name]):
            raise ScriptError(
                f"The study {path}: {where}{name} is of type {type(known[name]).__name__}; got {value!r}."
            )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
