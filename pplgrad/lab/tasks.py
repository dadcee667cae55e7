"""The independent pieces of a study, each kept in a file of its own, so that none is lost or done twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pplgrad.errors import (
    ImpossibleValueError,
    PplgradError,
    ProgramError,
    UnmatchedNameError,
    did_you_mean,
    listed,
)
from pplgrad.lab.faults import Diverged, ScriptFault, begins, named_at, placed, raised_in, sentence
from pplgrad.lab.script import PROGRAMS, Script, ScriptError, load_script

LOG = logging.getLogger("pplgrad.lab")
PACKAGES = ("pplgrad", "torch", "pyro-ppl", "jax", "numpyro")
Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One piece of work: its `kind`, and everything that decides its result.

    `kind` is "snapshots" (train, and keep parameters), "reference" and "gradients" (at one snapshot), or "training".
    `settings` are those of the kind.
    """

    kind: str
    script: str
    digest: str
    options: dict[str, Any]
    backend: str
    estimator: str
    seed: int
    particles: int
    batch_size: int
    objective: str
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A digest of everything that decides the result."""
        known = {name: value for name, value in asdict(self).items() if name != "script"}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def file(self) -> str:
        """The name of the result's file."""
        # Letters that any file system takes, one byte each: a name of 255 bytes is the longest that most take.
        word = re.sub(r"[^\w.*-]+", "_", self.estimator, flags=re.ASCII).strip("_")[:60].replace("*", "")
        return f"{self.kind}-{self.backend}-{word}-{self.seed}-{self.key}.json"

    @property
    def title(self) -> str:
        """The task in words, for logs."""
        return f"{self.kind} {self.backend} {self.estimator} seed {self.seed}"


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Return what a reader of timings wants to know of the machine."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not limited"),
    }


def _load() -> float:
    """Return how many processes ask for each core, on average over the last minute; above 1 they wait for one another."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:  # pragma: no cover
        return 0.0


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


def perform(task: Task, runs: Path | None, needs: dict[str, Result] | None = None) -> Result:
    """Do a task and keep its result, or read it if it was done before.

    `needs` are results of other tasks. A program or an estimator that fails is a result too: `error` is its reason, `fault` the
    same if it is the script's, and `details` the traceback. It is kept if it is one of pplgrad's own, which will not change. What
    the machine fails at (a full disk, no memory) is raised. Without a folder nothing is kept.
    """
    path = None if runs is None else runs / task.file
    if runs is not None and (found := kept(task, runs)) is not None:
        return found
    result: Result = {"task": asdict(task), "machine": machine(), "began": time.time()}
    script, details, load = None, None, _load()
    try:
        script = load_script(Path(task.script), (task.backend,))
        run = make_run(task, script)
        if path is not None:
            run.keep_in(path.with_suffix(".checkpoint.npz"))
        result |= getattr(run, task.kind)(needs or {})
    except (KeyboardInterrupt, GeneratorExit, MemoryError, NotWrittenError):
        raise
    except BaseException as error:
        details = "".join(traceback.format_exception(error))
        result |= _failed(error, Path(task.script), script, task.backend)
        # Any other failure may have an external cause (a package, a file), and is retried next time.
        path = path if _lasting(error) else None
    result["seconds_taken"] = time.time() - result["began"]
    result["load"] = max(load, _load())
    if path is not None:
        write_atomically(path, json.dumps(result))
        path.with_suffix(".checkpoint.npz").unlink(missing_ok=True)
    return result if details is None else {**result, "details": details}


def kept(task: Task, runs: Path) -> Result | None:
    """Return the result that is kept of a task, or None if there is none.

    A file that is no such result (cut short, written by something else) counts as none, and gets another name: its task is done again.
    """
    path = runs / task.file
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    if _is_result(found, task):
        return found
    aside = path.with_suffix(".unreadable")
    LOG.warning("%s is not the result of a run; it is now %s, and the run is done again", path.name, aside.name)
    os.replace(path, aside)
    return None


_PARTS: dict[str, dict[str, Any]] = {
    "training": {"curve": list},
    "gradients": {"snapshots": dict, "evaluations": (int, float)},
    "snapshots": {"snapshots": dict},
    "reference": {"references": dict},
}
"""What the result of each kind of task has."""


def _is_result(found: Any, task: Task) -> bool:
    """Whether plain data are what a task left: its own description, and the reason of a failure or all parts of its kind."""
    if not isinstance(found, dict) or not isinstance(found.get("task"), dict):
        return False
    # The script may lie elsewhere now; its text is in the digest.
    mine = json.loads(json.dumps({k: v for k, v in asdict(task).items() if k != "script"}))
    if {k: v for k, v in found["task"].items() if k != "script"} != mine:
        return False
    if "error" in found:
        return isinstance(found["error"], str)
    return (
        all(isinstance(found.get(name), kind) for name, kind in _PARTS[task.kind].items()) and found.get("curve") != []
    )


def _failed(error: BaseException, path: Path, script: Script | None, backend: str) -> Result:
    """Return what a failure leaves: its sentence, and whose fault it is."""
    if isinstance(error, Diverged):
        return {"error": str(error), "diverged": True}
    text = account(error, path, script, backend)
    # What an estimator refuses is its own, unless every one of them does.
    refusal = isinstance(error, PplgradError) and not isinstance(error, (ScriptFault, ImpossibleValueError))
    refusal = refusal and (script is None or _in_its_words(error, path, script) is None)
    return {"error": text} if refusal else {"error": text, "fault": text}


def _lasting(error: BaseException) -> bool:
    """Whether a failure is decided by what decides the task's result."""
    cause = error.__cause__ if isinstance(error, ScriptFault) else None
    return isinstance(error, PplgradError) and (cause is None or isinstance(cause, PplgradError))


def make_run(task: Task, script: Script) -> Any:
    """Return the script's program in the task's library; see `ScriptRun`."""
    return import_module(f"pplgrad.lab.run_{task.backend}").Run(task, script)


def unsound(script: Script) -> PplgradError | None:
    """Return the error for a program that is none, whatever estimates its gradient: such as a density that is not finite."""
    try:
        script.made["run"].look()
    except (ImpossibleValueError, ProgramError) as found:
        return found
    except Exception:
        # Other errors are reported where they occur.
        return None
    return None


def account(error: BaseException, path: Path, script: Script | None, backend: str) -> str:
    """Return what went wrong in a library as one sentence with the script's line, and the site where one is known.

    Under `jit` nothing is raised where a density is NaN, and what is said later says less: the program is looked at once more.
    """
    if type(error) is ScriptError:
        # Of what was asked for, and not of the script.
        return str(error)
    run = None if script is None else script.made.get("run")
    if script is None or run is None or run.backend != backend:
        return sentence(error, path)
    if (told := _in_its_words(error, path, script)) is not None:
        return told
    if isinstance(error, UnmatchedNameError) and error.key in run.named:
        return f"an estimator is given for {_not_there(error)}"
    own = isinstance(error, PplgradError)
    if not isinstance(error, (ScriptFault, ImpossibleValueError)) and (own or not raised_in(error, path)):
        found = unsound(script)
        error = error if found is None or (own and not isinstance(found, ImpossibleValueError)) else found

    def lines() -> Any:
        with suppress(Exception):
            return run.lines()
        return {}

    start = begins(getattr(run, "guide", None), path) or named_at(path, PROGRAMS[backend])
    return sentence(error, path, lines, start)


def _in_its_words(error: BaseException, path: Path, script: Script) -> str | None:
    """Return what is wrong with a name in the script's DISCRETE, if that is what an error of the guide's wrapper is about."""
    where = placed(path, named_at(path, "DISCRETE"))
    if isinstance(error, UnmatchedNameError):
        return f"{where}: DISCRETE names {_not_there(error)}" if error.key in script.discrete else None
    # The guide's wrapper and the ELBO are both told the script's names.
    told = re.match(
        r"(?:config_estimators|TraceGrad_ELBO\(estimators=\.\.\.\)) (names '([^']+)'.*)", str(error), re.DOTALL
    )
    if told is None or told[2] not in script.discrete or not isinstance(error, PplgradError):
        return None
    return f"{where}: DISCRETE {told[1]}"


def _not_there(error: UnmatchedNameError) -> str:
    """Return that a program has no site of a name, and which it has."""
    hint = did_you_mean(error.key, error.sites) or "."
    return f"'{error.key}', which the program does not have; its latent sites are: {listed(error.sites)}{hint}"


class NotWrittenError(ScriptError):
    """A file of a study could not be written, such as on a full disk."""


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write a file so that it is either whole or not there, whenever the process is killed."""
    try:
        _write(path, text)
    except OSError as error:
        raise NotWrittenError(
            f"{path.name} cannot be written to {path.parent} ({error.strerror}); what is finished is kept, and the same command goes "
            "on from there once there is room."
        ) from None


def _write(path: Path, text: str | bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        # As any file of the user's would be, not as a temporary one.
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
