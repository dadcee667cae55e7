"""Model scripts: plain Python files with a few functions (see models/README.md)."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pplgrad.errors import PplgradError

PROGRAMS = {"pyro": "pyro_program", "numpyro": "numpyro_program"}


class ScriptError(PplgradError):
    """A model script, an option or an output folder cannot be used as given."""


@dataclass(frozen=True)
class Script:
    """A loaded model script."""

    path: Path
    module: ModuleType
    digest: str

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the script's options with the given ones, strings converted to the defaults' types."""
        options = dict(self.module.OPTIONS)
        for name, text in given.items():
            if name not in options:
                known = ", ".join(sorted(options)) or "none"
                raise ScriptError(f"{self.path} has no option '{name}'; its options are: {known}.")
            options[name] = _converted(name, text, options[name])
        return options

    def program(self, backend: str, options: dict[str, Any], train: np.ndarray, seed: int) -> tuple[Callable, Callable]:
        """Return (model, guide) for a backend."""
        return getattr(self.module, PROGRAMS[backend])(options, train, seed)

    def load(self, options: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the train and the test data; the script's `ValueError` is shown as its refusal of an option."""
        try:
            return self.module.load(options, seed)
        except ValueError as error:
            raise ScriptError(f"{self.path} refuses its options: {error}") from error

    def prepare(self, options: dict[str, Any], batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a batch as the model sees it, in float32."""
        prepare = getattr(self.module, "prepare", None)
        return np.asarray(batch if prepare is None else prepare(options, batch, rng), np.float32)

    @property
    def discrete(self) -> tuple[str, ...]:
        """The names or patterns of the sites under comparison."""
        return tuple(self.module.DISCRETE)

    @property
    def whole_data(self) -> bool:
        """Whether every step must see all train data."""
        return bool(getattr(self.module, "WHOLE_DATA", False))

    def baseline_inputs(self, x: Any) -> Any:
        """Return the inputs of a learned baseline."""
        inputs = getattr(self.module, "baseline_inputs", None)
        return x if inputs is None else inputs(x)


def check_parameters(settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse gradient descent for a parameter that the program does not have."""
    known = sorted(names)
    for name in settings.get("gradient_descent", {}):
        if name not in known:
            raise ScriptError(
                f"[gradient_descent] names '{name}', which is no parameter; the parameters are: {', '.join(known)}."
            )


def load_script(path: Path, backends: tuple[str, ...]) -> Script:
    """Load a model script, and check that it has what the backends need."""
    if not path.is_file():
        raise ScriptError(f"There is no model script at {path}.")
    spec = importlib.util.spec_from_file_location(f"pplgrad_script_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ScriptError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # As under `python SCRIPT`: its neighbours can be imported (later too, from inside its functions), and dataclasses
    # find their module. Last in the path, so that a neighbour never hides an installed package.
    sys.modules[spec.name] = module
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ScriptError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    for name in ("OPTIONS", "DISCRETE", "load", *(PROGRAMS[backend] for backend in backends)):
        if not hasattr(module, name):
            raise ScriptError(f"{path} has no '{name}', which a model script needs (models/README.md lists them).")
    return Script(path, module, _digest(path))


def _digest(path: Path) -> str:
    """Return a digest of the script and of the neighbours that it imports, as text, wherever they lie."""
    texts: dict[Path, bytes] = {}
    waiting = [path.resolve()]
    while waiting:
        file = waiting.pop()
        if file in texts or not file.is_file():
            continue
        texts[file] = file.read_bytes()
        for node in ast.walk(ast.parse(texts[file])):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            waiting += [path.resolve().parent / f"{name.split('.')[0]}.py" for name in names]
    digest = hashlib.sha256()
    for text in sorted(texts.values()):
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()


def _converted(name: str, given: Any, default: Any) -> Any:
    kind = type(default)
    if isinstance(given, str) and kind is bool:
        if given.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ScriptError(f"Option '{name}' is true or false; got '{given}'.")
        return given.lower() in ("true", "1", "yes")
    try:
        return kind(given) if isinstance(given, str) or kind is float else _of(kind, given)
    except (TypeError, ValueError):
        raise ScriptError(f"Option '{name}' is of type {kind.__name__}; got '{given}'.") from None


def _of(kind: type, given: Any) -> Any:
    if type(given) is not kind:
        raise TypeError
    return given
