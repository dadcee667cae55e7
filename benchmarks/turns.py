"""Contestants of one work, each in its own process, that take turns on one core."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.shared import ROOT
from benchmarks.works import Work

COLD = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""No contestant finds what an earlier one compiled, compiles on other cores, or spins while another has its turn."""

IN = " in "
"""Between a contestant's name and the folder of another checkout that it is taken from."""

STORCHASTIC = ROOT / ".venv-storchastic" / "bin" / "python"


@dataclass(frozen=True)
class Rules:
    """How long things are measured, and when they are given up.

    `turns` of `seconds` / `turns` each; `limit_s` is what a contestant may take until its first step is done, and for any one
    turn, `limit_gib` the memory that it may hold.
    """

    turns: int = 20
    seconds: float = 2.0
    limit_s: float = 60.0
    limit_gib: float = 8.0


@dataclass
class Found:
    """What was found of one contestant: `numbers` are lists by quantity, `turns` the milliseconds of a step by turn."""

    contestant: str
    numbers: dict[str, list[float]] = field(default_factory=dict)
    turns: dict[int, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""
    status: str = "measured"  # or "failed", "skipped", "given up"
    reason: str = ""


class Gone(Exception):
    """A contestant is out of the race; its `Found` says why."""


class Runner:
    """A contestant's process."""

    def __init__(self, name: str, work: Work, data: Path, seed: int, rules: Rules) -> None:
        self.found, self.rules, self.phase = Found(name), rules, "import"
        name, _, folder = name.partition(IN)
        self._root = Path(folder) if folder else ROOT
        self._asked = {"contestant": name, "work": asdict(work), "data": str(data), "seed": seed, "core": one_core()}
        self._log = tempfile.TemporaryFile("w+")
        self._lines: queue.Queue[str] = queue.Queue()
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process, and wait until the first steps are done."""
        python = STORCHASTIC if self.found.contestant == "Storchastic" else Path(sys.executable)
        if not python.exists():
            self._out("skipped", "Storchastic's environment is not there; `make storchastic` makes it")
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.cell", json.dumps(self._asked)],
            cwd=self._root,  # First on the path of the modules, so before what is installed.
            env={**os.environ, **COLD},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()
        imported = self._hear("imported")
        self.found.versions = imported["versions"]
        self._keep(imported, "import_s", "imported_mib")
        self.phase = "tracing and compiling"
        built = self._hear("built")
        self.found.note = built["note"]
        self._keep(built, "trace_s", "compile_s")
        self.phase = "first step"
        self._keep(self._hear("stepped"), "build_s", "first_step_s")
        self.found.numbers["to_first_step_s"] = [time.perf_counter() - self._began]
        self.phase = "steps until all is compiled"
        ready = self._hear("ready")
        self._keep(ready, "trace_s", "compile_s")
        self.found.numbers["to_full_speed_s"] = [time.perf_counter() - self._began]
        self.phase, self.step_s = "a turn", self._hear("tried")["step_s"]

    def _listen(self, stream: Any) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put("")

    def _keep(self, heard: dict[str, Any], *names: str) -> None:
        for name in names:
            values = heard[name] if isinstance(heard[name], list) else [heard[name]]
            if values:
                self.found.numbers[name] = values

    def turn(self, number: int) -> None:
        """Take one turn."""
        length = self.rules.seconds / self.rules.turns
        count = int(np.clip(round(length / self.step_s), 1, 10_000))
        assert self._process is not None and self._process.stdin is not None
        self._began = time.perf_counter()
        with suppress(BrokenPipeError):  # It is no more; what it left says why.
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
        self.found.turns[number] = self._hear("turn")["ms"]

    def takes_part(self, number: int) -> bool:
        """Whether a contestant takes part in a turn: slow ones in fewer, spread over all."""
        if self.found.status != "measured":
            return False
        affordable = max(5, int(4 * self.rules.seconds / self.step_s))
        if affordable >= self.rules.turns:
            return True
        return number in np.linspace(0, self.rules.turns - 1, affordable).round()

    def stop(self) -> None:
        """End the process, and keep its peak memory."""
        assert self._process is not None and self._process.stdin is not None
        self._began = time.perf_counter()
        self._process.stdin.close()
        self._keep(self._hear("done"), "peak_mib")
        self._process.wait()

    def kill(self) -> None:
        """End the process at once if it is still there, and close what was opened for it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._listener.join()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                with suppress(BrokenPipeError):
                    stream.close()
            self._process = None
        self._log.close()

    def _hear(self, event: str) -> dict[str, Any]:
        assert self._process is not None
        while True:
            try:
                line = self._lines.get(timeout=0.2)
                break
            except queue.Empty:
                self._check_limits()
        if not line:
            self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or [""])[-1]
            self._out("failed", f"ended with status {self._process.returncode} in {self.phase}. {last}"[:300].strip())
        heard = json.loads(line)
        if heard["event"] == "failed":
            self._out("skipped" if heard["skipped"] else "failed", heard["reason"])
        assert heard["event"] == event, heard
        return heard

    def _check_limits(self) -> None:
        assert self._process is not None
        if time.perf_counter() - self._began > self.rules.limit_s:
            self._out("given up", f"> {self.rules.limit_s:g} s ({self.phase})")
        try:
            held = psutil.Process(self._process.pid).memory_info().rss / 2**30
        except psutil.NoSuchProcess:
            return
        if held > self.rules.limit_gib:
            self._out("given up", f"> {self.rules.limit_gib:g} GiB ({self.phase})")

    def _out(self, status: str, reason: str) -> None:
        self.kill()
        self.found.status, self.found.reason = status, reason
        raise Gone(reason)


def one_core() -> int | None:
    """Return the core that all contestants share: the last of those that this process may use."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def race(names: list[str], work: Work, data: dict[str, np.ndarray], seed: int, rules: Rules) -> list[Found]:
    """Measure contestants of a work: start them one after the other, then let them take turns in a new order each time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, **data)  # type: ignore[arg-type]
        runners = [Runner(name, work, path, seed, rules) for name in names]
        try:
            for runner in runners:
                with suppress(Gone):
                    runner.start()
            rng = np.random.default_rng(seed)
            for number in range(rules.turns):
                for i in rng.permutation(len(runners)):
                    if runners[i].takes_part(number):
                        with suppress(Gone):
                            runners[i].turn(number)
            for runner in runners:
                if runner.found.status == "measured":
                    with suppress(Gone):
                        runner.stop()
        finally:
            for runner in runners:
                runner.kill()
    return [runner.found for runner in runners]
