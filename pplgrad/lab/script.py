"""Model scripts: plain Python files with a few functions (see models/README.md)."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pplgrad.errors import did_you_mean
from pplgrad.lab.faults import ScriptError, ScriptFault, begins, named_at, placed, sentence, shortened
from pplgrad.lab.rows import Data, arrays_of, mapped

__all__ = ["PROGRAMS", "Script", "ScriptError", "check_parameters", "load_script"]
PROGRAMS = {"pyro": "pyro_program", "numpyro": "numpyro_program"}


@dataclass(frozen=True)
class Script:
    """A loaded model script."""

    path: Path
    module: ModuleType
    digest: str
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was made of the script last, for the account of a failure."""

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the script's options with the given ones, strings converted to the defaults' types."""
        options = dict(self.module.OPTIONS)
        for name, text in given.items():
            if name not in options:
                known = ", ".join(sorted(options)) or "none"
                hint = did_you_mean(name, options) or "."
                raise ScriptError(f"{self.path} has no option '{name}'; its options are: {known}{hint}")
            options[name] = _converted(name, text, options[name])
        return options

    def program(self, backend: str, options: dict[str, Any], train: Data, seed: int) -> tuple[Callable, Callable]:
        """Return (model, guide) for a backend."""
        name = PROGRAMS[backend]
        found = self._call(name, options, train, seed)
        if not isinstance(found, (tuple, list)) or len(found) != 2 or not all(map(callable, found)):
            raise self._refused(
                name, f"returned {_described(found)}", "return (model, guide), two functions of a batch"
            )
        for part, function in zip(("model", "guide"), found, strict=True):
            if (problem := _refuses(function, 1)) is not None:
                where = placed(self.path, begins(function, self.path) or named_at(self.path, name))
                raise ScriptFault(f"{where}: the {part} is called with one batch, which it does not take ({problem}).")
        return found[0], found[1]

    def load(self, options: dict[str, Any], seed: int) -> tuple[Data, Data]:
        """Return the train and the test data; the script's `ValueError` is shown as its refusal of an option."""
        found = self._call("load", options, seed)
        remedy = "return (train, test), two NumPy arrays (or dicts of arrays) with one datum a row"
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise self._refused("load", f"returned {_described(found)}", remedy)
        made = []
        for which, data in zip(("train", "test"), found, strict=True):
            made.append(mapped(_as_array, data))
            if not all(array is not None and array.ndim and array.dtype != object for array in arrays_of(made[-1])):
                raise self._refused("load", f"returned {_described(data)} as {which} data", remedy)
            if not all(map(len, arrays_of(made[-1]))) or not arrays_of(made[-1]):
                raise self._refused("load", f"returned {which} data without a row", remedy)
            self._refuse_uneven("load", made[-1])
        return made[0], made[1]

    def prepare(self, options: dict[str, Any], batch: Data, rng: np.random.Generator) -> Data:
        """Return a batch as the model sees it, in float32."""
        name = "prepare" if getattr(self.module, "prepare", None) is not None else "load"
        found = batch if name == "load" else self._call(name, options, batch, rng)
        made = mapped(lambda data: _as_array(data, np.float32), found)
        if not arrays_of(made) or any(array is None or array.ndim == 0 for array in arrays_of(made)):
            raise self._refused(
                name,
                f"returned {_described(found)}",
                "return an array of numbers with one datum a row, or a dict of them",
            )
        self._refuse_uneven(name, made)
        return made

    def _refuse_uneven(self, name: str, data: Data) -> None:
        """Refuse arrays of one dict that have unequally many rows."""
        lengths = {len(array) for array in arrays_of(data)}
        if len(lengths) > 1:
            shown = ", ".join(f"'{key}' with {len(array)}" for key, array in data.items())
            raise self._refused(
                name, f"returned arrays of unequal length, {shown} rows", "give each datum a row in each"
            )

    def _call(self, name: str, *args: Any) -> Any:
        """Call a function of the script; what it raises becomes a sentence with its line."""
        function = getattr(self.module, name)
        if (problem := _refuses(function, len(args))) is not None:
            raise self._refused(name, f"is called with {len(args)} arguments, which it does not take ({problem})", _SEE)
        try:
            return function(*args)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            text = sentence(error, self.path, start=begins(function, self.path))
            if name == "load" and type(error) is ValueError and _is_said(error):
                where = text.partition(": ")[0]
                raise ScriptFault(f"{where} refuses its options: {shortened(str(error), 900)}") from error
            raise ScriptFault(text) from error

    def _refused(self, name: str, what: str, remedy: str) -> ScriptFault:
        """Return the error for a part of the script that is not what it must be."""
        line = begins(getattr(self.module, name, None), self.path) or named_at(self.path, name)
        return ScriptFault(f"{placed(self.path, line)}: {name} {what}; {remedy}.")

    @property
    def discrete(self) -> tuple[str, ...]:
        """The names or patterns of the sites under comparison."""
        names = self.module.DISCRETE
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def backends(self) -> tuple[str, ...]:
        """The libraries that the script has a program for."""
        return tuple(backend for backend, name in PROGRAMS.items() if hasattr(self.module, name))

    @property
    def whole_data(self) -> bool:
        """Whether every step must see all train data."""
        return bool(getattr(self.module, "WHOLE_DATA", False))

    def baseline_inputs(self, x: Any) -> Any:
        """Return the inputs of a learned baseline."""
        inputs = getattr(self.module, "baseline_inputs", None)
        if inputs is None and isinstance(x, dict):
            raise ScriptError(
                f"{self.path}: a learned baseline reads one array, and the batch is a dict of {', '.join(map(repr, x))}; write "
                f"baseline_inputs(x) in the script, such as `return x[{next(iter(x))!r}]`."
            )
        return x if inputs is None else inputs(x)


def check_parameters(settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse gradient descent for a parameter that the program does not have."""
    known = sorted(names)
    for name in settings.get("gradient_descent", {}):
        if name not in known:
            hint = did_you_mean(name, known) or "."
            raise ScriptError(
                f"[gradient_descent] names '{name}', which is no parameter; the parameters are: {', '.join(known)}{hint}"
            )


def load_script(path: Path, backends: tuple[str, ...]) -> Script:
    """Load a model script, and check that it has what the backends need; without backends, those that it has a program for."""
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
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        where, _, what = sentence(error, path).partition(": ")
        raise ScriptFault(f"{where} cannot be loaded: {what}") from error
    script = Script(path, module, _digest(path))
    _check_names(script, tuple(PROGRAMS[backend] for backend in backends or script.backends))
    return script


_SEE = "models/README.md says what it gets"


def _check_names(script: Script, programs: tuple[str, ...]) -> None:
    """Check that a script has what it must have, of the right kinds."""
    path, module = script.path, script.module
    for name in ("OPTIONS", "DISCRETE", "load", *programs):
        if not hasattr(module, name):
            raise ScriptError(f"{path} has no '{name}', which a model script needs (models/README.md lists them).")
    if not programs:
        known = " and no ".join(f"'{name}'" for name in PROGRAMS.values())
        raise ScriptError(f"{path} has no {known}; a model script needs one of them (models/README.md).")
    if not isinstance(module.OPTIONS, Mapping) or not all(isinstance(name, str) for name in module.OPTIONS):
        raise script._refused("OPTIONS", f"is {_described(module.OPTIONS)}", "write a dict of defaults by name")
    names = module.DISCRETE
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, (tuple, list)) or not all(isinstance(name, str) for name in listed):
        remedy = "write the name of a latent site, or a tuple of them, such as ('z', 'w*')"
        raise script._refused("DISCRETE", f"is {_described(names)}", remedy)
    optional = [name for name in ("prepare", "baseline_inputs") if getattr(module, name, None) is not None]
    for name in ("load", *programs, *optional):
        if not callable(getattr(module, name)):
            raise script._refused(name, f"is {_described(getattr(module, name))}", f"write a function; {_SEE}")


def _described(value: Any) -> str:
    """Return what a value is, in a few words.

    >>> _described(None), _described((1, 2, 3)), _described("z")
    ('None', 'a tuple of 3', "'z'")
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return shortened(repr(value), 40)
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"a dict with the keys {shortened(', '.join(map(repr, value)), 80)}"
    return f"an object of type {type(value).__name__}"


def _as_array(value: Any, kind: Any = None) -> np.ndarray | None:
    """Return an array, or None for what cannot be one."""
    try:
        return np.asarray(value, kind)
    except (TypeError, ValueError, RuntimeError):
        return None


def _refuses(function: Callable, count: int) -> str | None:
    """Return why a function cannot be called with so many arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError as error:
        return str(error)
    except ValueError:
        # What is not written in Python says nothing of its arguments.
        return None
    return None


def _is_said(error: BaseException) -> bool:
    """Whether an error was raised on purpose, by a `raise` in Python, and not by what a library found in its arguments."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    return step is not None and "site-packages" not in step.tb_frame.f_code.co_filename


def _digest(path: Path) -> str:
    """Return a digest of the script and of the neighbours that it imports, as text, wherever they lie."""
    texts: dict[Path, bytes] = {}
    waiting = [path.resolve()]
    while waiting:
        file = waiting.pop()
        if file in texts or not file.is_file():
            continue
        texts[file] = file.read_bytes()
        try:
            tree = ast.parse(texts[file])
        except (SyntaxError, ValueError):
            # Imported or not, it is part of the run; what it says of itself is said when it is imported.
            continue
        for node in ast.walk(tree):
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
