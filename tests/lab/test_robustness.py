"""What a disk, a machine or another process may do to a study: nothing is lost, and what happens is said in a sentence."""

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from pplgrad.lab import cli, tasks
from pplgrad.lab.folder import alone
from pplgrad.lab.progress import _Log, bar
from pplgrad.lab.script import ScriptError
from pplgrad.lab.tasks import NotWrittenError, kept, perform
from tests.lab.processes import COMMAND, PAGELESS
from tests.lab.test_crashes import SCRIPT, given, told
from tests.lab.test_long_runs import BACKENDS, numbers, plan_of, task_of

# Tasks that are done in no time.
QUICK = {"steps": 4, "points": 2, "gradient_draws": 0, "bound_samples": 0}


def compared(folder, *more):
    path = folder / "mine.py"
    path.write_text(SCRIPT)
    return CliRunner().invoke(cli.main, [*given("compare", path, ["pyro"], folder / "out"), *more])


# One folder, two processes.

HOLD = """
import sys
from pathlib import Path
from pplgrad.lab.folder import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_a_second_process_is_told_to_wait_and_a_killed_one_leaves_no_lock(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    held = subprocess.Popen([sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert held.stdout.readline() == b"held\n"
        (line,) = told(compared(tmp_path))
        assert "Another `pplgrad compare`" in line and f"process {held.pid} on " in line and "--out" in line
        # The study of the first process is not claimed by the second.
        assert not (out / "study.json").exists()
    finally:
        held.send_signal(signal.SIGKILL)
        held.communicate()
    assert compared(tmp_path).exit_code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_of_two_commands_at_once_one_does_all_and_the_other_loses_nothing(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    command = [*COMMAND, *given("compare", path, ["pyro"], tmp_path / "out")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in both]
    # They may also come one after the other; then the second finds all done.
    assert 0 in [code for _, _, code in ended]
    for _, error, code in ended:
        assert code == 0 or (code == 2 and "Another `pplgrad compare`" in error), error
    again = CliRunner().invoke(cli.main, given("compare", path, ["pyro"], tmp_path / "out"))
    assert again.exit_code == 0 and len(list((tmp_path / "out" / "runs").glob("*.json"))) == 1
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.unreadable"))


def test_where_a_file_system_has_no_locks_a_study_is_written_all_the_same(tmp_path, monkeypatch):
    import fcntl

    def refused(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with alone(tmp_path):
        pass


# Files that are no results.


def broken(whole):
    """Return contents that a run's file may have and that are not its result."""
    found = json.loads(whole)
    without = {name: value for name, value in found.items() if name != "curve"}
    other = {**found, "task": {**found["task"], "seed": 7}}
    return {
        "nothing": b"",
        "cut short": whole[: len(whole) // 2],
        "no text": b"\xff\x00\xfe",
        "a list": b"[1, 2]",
        "a number": b"3",
        "nested": b"[" * 10_000,
        "no task": b"{}",
        "a task that is none": b'{"task": 3}',
        "another task": json.dumps(other).encode(),
        "no curve": json.dumps(without).encode(),
        "a curve that is none": json.dumps({**found, "curve": "no"}).encode(),
        "an empty curve": json.dumps({**found, "curve": []}).encode(),
        "an error that is none": json.dumps({**without, "error": [1]}).encode(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_is_no_result_is_put_aside_and_done_again(backend, tmp_path, monkeypatch):
    task = task_of(plan_of(tmp_path, backend, "score", **QUICK))
    first = perform(task, tmp_path)
    path = tmp_path / task.file
    whole = path.read_bytes()
    assert kept(task, tmp_path) == json.loads(whole)
    for what, content in broken(whole).items():
        path.write_bytes(content)
        assert kept(task, tmp_path) is None, what
        assert path.with_suffix(".unreadable").read_bytes() == content and not path.exists()
    path.write_bytes(whole[:40])
    assert numbers(perform(task, tmp_path)) == numbers(first)
    # A mutant that trusts every file would hand on what it finds.
    monkeypatch.setattr(tasks, "_is_result", lambda found, task: True)
    path.write_bytes(b"[1, 2]")
    assert perform(task, tmp_path) == [1, 2]


def test_a_result_is_found_after_the_script_has_moved(tmp_path):
    task = task_of(plan_of(tmp_path, "pyro", "score", **QUICK))
    first = perform(task, tmp_path)
    assert kept(replace(task, script="elsewhere/model.py"), tmp_path)["began"] == first["began"]


@pytest.mark.exhaustive  # Without workers it is tested above.
@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_with_workers_a_broken_file_is_done_again_too(tmp_path):
    assert compared(tmp_path, "--seeds", "2", "--snapshots", "0", "--draws", "20", "--jobs", "2").exit_code == 0
    files = sorted((tmp_path / "out" / "runs").glob("*.json"))
    before = {path: json.loads(path.read_text()) for path in files}
    for path in files:
        path.write_text(path.read_text()[:100])
    assert compared(tmp_path, "--seeds", "2", "--snapshots", "0", "--draws", "20", "--jobs", "2").exit_code == 0
    after = {path: json.loads(path.read_text()) for path in files}
    for path, result in after.items():
        assert set(result) == set(before[path]), path
        if result["task"]["kind"] == "training":
            assert numbers(result) == numbers(before[path])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["garbage", "cut short", "other parts", "a folder"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_that_is_not_whole_is_as_none(backend, what, tmp_path, monkeypatch):
    task = task_of(plan_of(tmp_path, backend, "score", **QUICK))
    wanted = numbers(perform(task, None))
    path = (tmp_path / task.file).with_suffix(".checkpoint.npz")
    # A checkpoint that is left: the run ends before it takes it away.
    monkeypatch.setattr(tasks, "write_atomically", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        perform(task, tmp_path)
    monkeypatch.undo()
    whole = path.read_bytes()
    if what == "a folder":
        path.unlink()
        path.mkdir()
    elif what == "other parts":
        with np.load(path, allow_pickle=False) as file:
            parts = dict(file)
        np.savez(path, **{**parts, "training": parts["training"][::-1]})
    else:
        path.write_bytes(b"PK garbage" if what == "garbage" else whole[: len(whole) // 2])
    if what == "a folder":
        with pytest.raises((NotWrittenError, OSError)):
            perform(task, tmp_path)
        return
    assert numbers(perform(task, tmp_path)) == wanted and not path.exists()


# A full disk.


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_full_disk_is_one_sentence_and_loses_nothing(at, tmp_path, monkeypatch):
    plain, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle)

    monkeypatch.setattr(os, "fsync", full)
    (line,) = told(compared(tmp_path))
    assert "cannot be written to" in line and "No space left on device" in line and "mine.py:" not in line
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    assert compared(tmp_path).exit_code == 0


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    log = _Log(tmp_path / "log.txt")
    log.stream.close()
    log.emit(logging.makeLogRecord({"msg": "words"}))
    log.close()
    assert capsys.readouterr().err == ""


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_file_that_the_system_does_not_let_grow_is_one_sentence(jobs, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", "-B", "-c", LIMITED + PAGELESS]
    command += [*given("compare", path, ["pyro"], tmp_path / "out"), "--jobs", jobs, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr, done.stderr
    assert not list((tmp_path / "out").rglob("*.part"))


# Names.

ODD_NAMES = [
    "../../../tmp/z=DisARM()",
    "/etc/passwd=DisARM()",
    "..=DisARM()",
    "z\\..\\w=DisARM()",
    "C:\\z=DisARM()",
    "z\0=DisARM()",
    "z\n=DisARM()",
    "ζ" * 300 + "=DisARM()",
    "é" * 1000 + "=DisARM()",
    "-rf=DisARM()",
    "~=DisARM()",
    "con=DisARM()",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_results_file_stays_in_its_folder(name, tmp_path):
    task = replace(task_of(plan_of(tmp_path, "pyro", "score", **QUICK)), estimator=name)
    file = Path(task.file)
    assert file.name == task.file and len(task.file.encode()) <= 200 and task.file.isprintable() and task.file.isascii()
    assert (tmp_path / file).resolve().parent == tmp_path.resolve()
    (tmp_path / task.file).write_text("{}")


def test_names_of_any_letters_have_files_of_their_own(tmp_path):
    task = task_of(plan_of(tmp_path, "pyro", "score", **QUICK))
    files = {replace(task, estimator=name).file for name in ODD_NAMES}
    assert len(files) == len(ODD_NAMES)


def test_brackets_in_a_name_are_no_markup_of_the_bar():
    shown = bar("runs", quiet=False)
    shown.add_task("[/b][red]z=DisARM()", total=2)
    console = Console(file=io.StringIO(), width=200)
    console.print(shown.make_tasks_table(shown.tasks))
    assert "[/b][red]z=DisARM()" in console.file.getvalue()


def test_an_unwritable_file_is_named(tmp_path):
    with pytest.raises(ScriptError, match=r"x\.json cannot be written to .*\(No such file or directory\)"):
        tasks.write_atomically(tmp_path / "none" / "x.json", "{}")
