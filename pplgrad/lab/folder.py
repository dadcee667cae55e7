"""Whose results an output folder holds: a second study never replaces another's without being told to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # pragma: no cover
    # A system without POSIX's locks: nothing keeps two processes apart there.
    fcntl = None  # type: ignore[assignment]

from pplgrad.lab.faults import ScriptError, shortened
from pplgrad.lab.runner import Plan
from pplgrad.lab.study import PARTS
from pplgrad.lab.tasks import write_atomically

FILE, LOCK = "study.json", ".lock"
_GROWS = ("estimators", "backends", "seeds", "also")
"""Settings that may grow: what was finished before stays a part of the study."""


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep a second process from writing a study into the folder at the same time; the lock ends with the process, however that ends.

    Workers write for the process that holds it. A file system without locks has none.
    """
    if fcntl is None:  # pragma: no cover
        yield
        return
    with open(out / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ScriptError(
                f"Another `pplgrad compare`{_holder(file.read(200))} is writing into {out}; wait for it, or give another folder with --out."
            ) from None
        except OSError:
            pass
        else:
            file.truncate(0)
            file.write(f"{os.getpid()} {platform.node()}\n")
            file.flush()
        yield


def _holder(text: str) -> str:
    pid, _, node = text.strip().partition(" ")
    return f" (process {pid} on {shortened(node, 60)})" if pid.isdecimal() else ""


def claim(plan: Plan, out: Path, replace: bool) -> None:
    """Note in the folder which study it holds; refuse to put another's results in the place of those that are there.

    The same study goes on, and so does one that adds estimators, libraries, seeds or a part (training, gradients).
    """
    mine = {"study": {**plan.study.to_dict(), "options": plan.options}, "digest": plan.script.digest}
    mine = json.loads(json.dumps(mine, default=str))
    theirs = None if replace else _held(out)
    if theirs is not None and (differences := list(_differences(theirs, mine))):
        raise ScriptError(
            f"The folder {out} holds another study, {_told(theirs['study'], out)}; it differs in {'; '.join(differences)}. "
            "Give another folder with --out, or --replace to put the results of this study in the place of those."
        )
    write_atomically(out / FILE, json.dumps(mine, indent=1))


def _held(out: Path) -> dict[str, Any] | None:
    """Return the study whose results a folder holds, as far as it is known."""
    try:
        found = json.loads((out / FILE).read_text())
        return found if isinstance(found["study"], dict) else None
    except FileNotFoundError:
        return _of_dataset(out)
    except (OSError, ValueError, KeyError, TypeError):
        raise ScriptError(
            f"{out / FILE} is not what a study leaves; give another folder with --out, or --replace."
        ) from None


def _of_dataset(out: Path) -> dict[str, Any] | None:
    """Return the study of a dataset that was written before folders said whose they are; its options are as they were given."""
    from pplgrad.lab.results import FILE as DATASET
    from pplgrad.lab.results import read

    return {"study": read(out)[1]["study"]} if (out / DATASET).exists() else None


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words what one study has otherwise than another, but for what it adds."""
    old, new = theirs["study"], mine["study"]
    if "digest" in theirs and theirs["digest"] != mine["digest"]:
        other = Path(old["script"]).name != Path(new["script"]).name
        yield f"the script, {old['script']}" if other else "the script's text, which has changed since"
    elif "digest" not in theirs and old["script"] != new["script"]:
        yield f"the script, {old['script']}"
    for name, value in old.items():
        if name == "script" or name not in new:
            continue
        if name == "options":
            # A dataset of before has only those that were given, as text.
            yield from _of_tables(
                "option ", value, {k: v for k, v in new[name].items() if k in value}, "digest" in theirs
            )
        elif name in _GROWS:
            if value and not _grown(value, new[name]):
                yield f"{name}, {_shown(value)}"
        elif isinstance(value, dict) and isinstance(new[name], dict):
            # A setting that was not known when the folder was written had its default.
            known = json.loads(json.dumps(asdict(PARTS[name]()))) if name in PARTS else {}
            yield from _of_tables("" if name == "training" else f"{name}.", known | value, known | new[name], True)
        elif value is not None and value != new[name]:
            yield f"{name}, {'which this one leaves out' if new[name] is None else _shown(value)}"


def _grown(old: Any, new: Any) -> bool:
    """Return whether a setting holds what it held before, and maybe more."""
    return set(old) <= set(new) if isinstance(old, list) else old <= new


def _of_tables(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any], typed: bool) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        one, other = old.get(name), new.get(name)
        if name in _GROWS and _grown(one, other):
            continue
        if one != other and (typed or str(one) != str(other)):
            yield f"{prefix}{name}, {_shown(one)}"


def _shown(value: Any) -> str:
    """Return a setting as a user would write it.

    >>> _shown(["score", "DisARM()"]), _shown(3), _shown([])
    ('score DisARM()', '3', 'none')
    """
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _told(study: Mapping[str, Any], out: Path) -> str:
    """Return which study it is, and how far it came."""
    runs = len(list((out / "runs").glob("*.json")))
    count = f"{runs} finished run" + "s" * (runs != 1)
    return f"{Path(study['script']).name} with {', '.join(study['estimators'])} ({count})"
