"""Scripts that raise: one sentence with the script's line and the site, and an exit code that no verdict has."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from pplgrad.lab import cli
from pplgrad.lab.faults import shortened
from tests.lab.processes import COMMAND

BACKENDS = ["pyro", "numpyro"]
COMMANDS = ["check", "choose", "compare"]
SCRIPT = """
import numpy as np

OPTIONS = {"scale": 1.0}
DISCRETE = ("z",)

def load(options, seed):
    x = np.random.default_rng(seed).normal(size=(12, 3))
    return x, x

def prepare(options, batch, rng):
    return batch

def program(ppl, dist, array, options):
    def model(x):
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Bernoulli(array(0.4)))
            ppl.sample("x", dist.Normal(2.0 * z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        w = ppl.param("w", array([0.1, 0.2, 0.3]))
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", dist.Bernoulli(logits=x @ w))

    return model, guide

def pyro_program(options, train, seed):
    import pyro, torch
    return program(pyro, pyro.distributions, torch.tensor, options)

def numpyro_program(options, train, seed):
    import jax.numpy as jnp, numpyro
    return program(numpyro, numpyro.distributions, jnp.asarray, options)
"""
MODEL, GUIDE = "    def model(x):\n", "    def guide(x):\n"
W = 'ppl.param("w", array([0.1, 0.2, 0.3]))'
Z = 'ppl.sample("z", dist.Bernoulli(logits=x @ w))'
X = "dist.Normal(2.0 * z[..., None], 1.0).to_event(1), obs=x"


# The pages of what is left beside a crash are those of any study.
pytestmark = pytest.mark.usefixtures("no_page")


@dataclass(frozen=True)
class Crash:
    """A change to the script, the text of the line (or its start) that must be named, and what else must be said."""

    old: str
    new: str
    line: str
    says: str


NAN = "array([0.1, float('nan'), 0.3])"
CRASHES = {
    "syntax": Crash("    return batch\n", "    return batch +\n", "    return batch +", "SyntaxError"),
    "no such module": Crash("import numpy", "import nothing_there\nimport numpy", "import nothing_there", "ModuleNotFoundError"),
    "exit while loading": Crash("OPTIONS =", "raise SystemExit(0)\nOPTIONS =", "raise SystemExit", "SystemExit"),
    "options are none": Crash('{"scale": 1.0}', "None", "OPTIONS", "OPTIONS is None; write a dict"),
    "names are a number": Crash('("z",)', '3', "DISCRETE", "DISCRETE is 3; write the name of a latent site"),
    "load is no function": Crash("def prepare", "load = 3\ndef prepare", "load = 3", "load is 3; write a function"),
    "load returns one array": Crash("return x, x", "return x", "def load", "return (train, test)"),
    "load returns unequal rows": Crash("return x, x", "return {'a': x, 'b': x[1:]}, x", "def load", "arrays of unequal length, 'a' with 12, 'b' with 11 rows"),
    "load returns an empty dict": Crash("return x, x", "return {}, x", "def load", "train data without a row"),
    "load returns no rows": Crash("return x, x", "return x[:0], x", "def load", "train data without a row"),
    "load takes nothing": Crash("def load(options, seed)", "def load()", "def load", "load is called with 2 arguments"),
    "load misses a file": Crash("    return x, x", "    open('/nowhere/at_all')", "    open(", "FileNotFoundError"),
    "load indexes badly": Crash("    return x, x", "    return x[99], x", "    return x[99]", "IndexError"),
    "prepare returns words": Crash("    return batch", "    return 'words'", "def prepare", "prepare returned 'words'"),
    "prepare raises": Crash("    return batch", "    return batch / {}", "    return batch / {}", "TypeError"),
    "the builder returns none": Crash("    return model, guide", "    pass", "def {backend}_program", "returned None; return (model, guide)"),
    "the builder raises": Crash(MODEL, "    options['sale']\n" + MODEL, "    options['sale']", "KeyError"),
    "the builder misses a module": Crash(MODEL, "    import nothing_there\n" + MODEL, "    import nothing_there", "ModuleNotFoundError"),
    "the builder exits": Crash(MODEL, "    raise SystemExit(1)\n" + MODEL, "    raise SystemExit(1)", "SystemExit: 1"),
    "the model takes nothing": Crash("def model(x)", "def model()", "    def model()", "the model is called with one batch"),
    "the model raises": Crash(MODEL, MODEL + "        1 / 0\n", "        1 / 0", "ZeroDivisionError: division by zero"),
    "the model exits": Crash(MODEL, MODEL + "        raise SystemExit(1)\n", "        raise SystemExit(1)", "SystemExit: 1"),
    "the model misses a file": Crash(MODEL, MODEL + "        open('/nowhere/at_all')\n", "        open(", "FileNotFoundError"),
    "the guide has a typo": Crash("x @ w))", "x @ v))", "            ppl.sample(\"z\", dist.Bernoulli(logits", "at site 'z': name 'v'"),
    "the guide's shapes": Crash(W, 'ppl.param("w", array([0.1, 0.2]))', "            ppl.sample(\"z\", dist.Bernoulli(logits", "at site 'z'"),
    "the model's shapes": Crash(X, X.replace("2.0 * z[..., None]", "2.0 * z[..., None] + array([1.0, 2.0])"), '            ppl.sample("x"', "'x'"),
    "a parameter is NaN": Crash(W, f'ppl.param("w", {NAN})', "", "NaN|nan|invalid"),
    "a density of the guide is NaN": Crash("logits=x @ w", "logits=x @ w + array(float('nan'))", '            ppl.sample("z", dist.Bernoulli(logits', "'z'"),
    "a density of the model is NaN": Crash("obs=x", "obs=x * array(float('nan'))", '            ppl.sample("x"', "'x'"),
    "a site is not in the model": Crash(Z, Z.replace('"z"', '"y"'), "", "'(y|z)'"),
    "the guide draws nothing": Crash(Z, "None", "", "'z'|no latent|no site|without"),
    "a callback raises": Crash("obs=x)", "obs=x)\n            assert x.shape[0] > 99, 'too few'", "            assert x", "AssertionError: too few"),
}  # fmt: skip


def script_of(folder, crash, backend="pyro"):
    """Write the script with a change; return its path and the numbers of the lines that may be named."""
    text = SCRIPT.replace(crash.old, crash.new)
    assert text != SCRIPT
    path = folder / "mine.py"
    path.write_text(text)
    line = crash.line.replace("{backend}", backend)
    return path, [n for n, found in enumerate(text.splitlines(), 1) if found.startswith(line)]


def given(command, path, backends, out=None):
    """Return a command that is done in no time."""
    small = {
        "check": ["--draws", "100", "--batch-size", "2"],
        "choose": ["--seconds", "0.1", "--batch-size", "4", "--estimator", "score+loo"],
        "compare": ["--steps", "1", "--seeds", "1", "--batch-size", "4", "--bound-samples", "0", "--estimator", "score+loo"],
    }  # fmt: skip
    chosen = [word for backend in backends for word in ("--backend", backend)]
    return [command, str(path), *chosen, *small[command], *(["--out", str(out)] if command == "compare" else [])]


def told(result):
    """Return the sentences on standard error, none of which is a traceback or a table."""
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert all(line.startswith("pplgrad: ") for line in lines), result.stderr
    for line in lines:
        assert "Traceback" not in line and "Trace Shapes" not in line and len(line) < 1000, line
        assert not re.search(r"\d\.\d{6}", line), line
    return lines


# Each crash under one command in one library is quick; the rest of the product is slow.
PAIRS = [(command, backend) for command in COMMANDS for backend in BACKENDS]
EACH = [
    pytest.param(name, *pair, marks=() if number % len(PAIRS) == place else pytest.mark.slow)
    for number, name in enumerate(CRASHES)
    for place, pair in enumerate(PAIRS)
]


@pytest.mark.grid
@pytest.mark.parametrize(("name", "command", "backend"), EACH)
def test_a_crash_is_one_sentence_with_the_line(name, command, backend, tmp_path):
    crash = CRASHES[name]
    path, numbers = script_of(tmp_path, crash, backend)
    result = CliRunner().invoke(cli.main, given(command, path, [backend], tmp_path / "out"))
    (line,) = told(result)
    named = re.search(rf"{re.escape(str(path))}:(\d+)", line)
    assert named is not None and int(named[1]) in numbers, line
    assert re.search(crash.says, line) or crash.says in line, line


@pytest.mark.parametrize("command", COMMANDS)
def test_both_libraries_have_one_account_of_one_failure(command, tmp_path):
    path, (number,) = script_of(tmp_path, CRASHES["the model raises"])
    result = CliRunner().invoke(cli.main, given(command, path, BACKENDS, tmp_path / "out"))
    assert told(result) == [f"pplgrad: {path}:{number}: ZeroDivisionError: division by zero."]
    assert "ZeroDivisionError" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("broken", BACKENDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_one_library_raises_leaves_the_results_of_the_other(command, broken, tmp_path):
    other = BACKENDS[broken == "pyro"]
    path, (number,) = script_of(
        tmp_path, Crash(f"def {broken}_program(options, train, seed):\n", f"def {broken}_program(options, train, seed):\n    1 / 0\n", "    1 / 0", "")
    )  # fmt: skip
    result = CliRunner().invoke(cli.main, [*given(command, path, BACKENDS, tmp_path / "out"), "--json"])
    assert told(result) == [f"pplgrad: {path}:{number}: ZeroDivisionError: division by zero ({broken})."]
    found = json.loads(result.stdout)
    rows = found["rows"] if command == "compare" else found
    assert {row["backend"] for row in rows if not row.get("error")} == {other}
    shown = CliRunner().invoke(cli.main, given(command, path, BACKENDS, tmp_path / "out"))
    assert shown.exit_code == 2 and other in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_estimator_that_does_not_fit_leaves_the_certificates_of_the_others(backend, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    words = ["--estimator", "score+loo", "--estimator", "Reparam()", "--estimator", "DisARM()", "--json"]
    result = CliRunner().invoke(cli.main, [*given("check", path, [backend]), *words])
    (line,) = told(result)
    assert "Reparam() cannot be used at site 'z'" in line and re.search(r"mine\.py:\d+", line)
    assert len(json.loads(result.stdout)) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_traceback_is_shown_where_it_is_asked_for(command, tmp_path):
    path, _ = script_of(tmp_path, CRASHES["the model raises"])
    result = CliRunner().invoke(cli.main, [*given(command, path, ["pyro"], tmp_path / "out"), "--traceback"])
    assert result.exit_code == 2 and "Traceback (most recent call last)" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("pplgrad: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interruption_is_no_error_of_the_script(command, tmp_path):
    path, _ = script_of(tmp_path, Crash(MODEL, MODEL + "        raise KeyboardInterrupt\n", "", ""))
    result = CliRunner().invoke(cli.main, given(command, path, ["pyro"], tmp_path / "out"))
    assert (
        result.exit_code == 130 and result.stderr.startswith("pplgrad: interrupted") and "mine.py" not in result.stderr
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_asked_for_wrongly_is_refused_as_before(command, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    one = given(command, path, ["pyro"], tmp_path / "out")
    (line,) = told(CliRunner().invoke(cli.main, [*one, "--estimator", "DisARMS()"]))
    assert "did you mean DisARM()?" in line
    usage = CliRunner().invoke(cli.main, [*one, "--no-such-option"])
    assert usage.exit_code == 2 and usage.stderr.startswith("Usage:")
    for text, what in ((b"\x00\x01\xff", "SyntaxError"), (b"", "has no 'OPTIONS'")):
        path.write_bytes(text)
        (line,) = told(CliRunner().invoke(cli.main, one))
        assert what in line and str(path) in line
    missing = [str(tmp_path / "none.py") if word == str(path) else word for word in one]
    assert "There is no model script at" in told(CliRunner().invoke(cli.main, missing))[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_neighbour_that_raises_is_named_beside_the_scripts_line(command, tmp_path):
    # Modules stay loaded, and the next test has others.
    beside = f"beside_{command}"
    (tmp_path / f"{beside}.py").write_text("def helper():\n    return 1 / 0\n")
    path, (number,) = script_of(
        tmp_path,
        Crash(MODEL, f"    from {beside} import helper\n" + MODEL + "        helper()\n", "        helper()", ""),
    )
    (line,) = told(CliRunner().invoke(cli.main, given(command, path, ["numpyro"], tmp_path / "out")))
    assert line.startswith(f"pplgrad: {path}:{number} ({beside}.py:2): ZeroDivisionError")


@pytest.mark.exhaustive  # Without workers it is tested above, and a worker that is lost below.
@pytest.mark.slow
def test_in_worker_processes_it_is_the_same(tmp_path):
    path, (number,) = script_of(tmp_path, CRASHES["the model raises"])
    command = [sys.executable, "-m", "pplgrad.lab", *given("compare", path, BACKENDS, tmp_path / "out"), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip() == f"pplgrad: {path}:{number}: ZeroDivisionError: division by zero."


@pytest.mark.slow
def test_a_worker_that_is_lost_is_one_sentence(tmp_path):
    path, _ = script_of(tmp_path, Crash(MODEL, "    import os; os._exit(1)\n" + MODEL, "", ""))
    command = [*COMMAND, *given("compare", path, ["pyro"], tmp_path / "out"), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.strip().startswith("pplgrad: A worker process ended"), done.stderr
    assert "\n" not in done.stderr.strip()


@pytest.mark.slow
def test_gradients_at_snapshots_have_one_account_too(tmp_path):
    """Three kinds of pieces fail at the same line, in both libraries; what follows from them is not told again."""
    path, (number,) = script_of(tmp_path, CRASHES["the model's shapes"])
    small = ["--steps", "0", "--snapshots", "0", "--draws", "20", "--seeds", "2"]
    result = CliRunner().invoke(cli.main, [*given("compare", path, ["numpyro"], tmp_path / "out"), *small])
    (line,) = told(result)
    assert f"mine.py:{number}: " in line and "'x'" in line and "what it is compared with" not in result.output


@pytest.mark.slow
def test_messages_are_cut_short():
    assert shortened("bad:\n[[1.25, 2., 3., 4.],\n [5., 6., 7., 8.]] here") == "bad: [[1.25, 2., 3., ...]] here"
    assert shortened("at 'z'\n Trace Shapes:\n  Param Sites:\n") == "at 'z'"
    assert (
        shortened("RuntimeError: Traceback (most recent call last):\n  File x\nValueError: no\n\n") == "ValueError: no"
    )
    assert len(shortened("word " * 500)) <= 300
    assert shortened("choose one of [DisARM(), ARMS(4), Reparam()]") == "choose one of [DisARM(), ARMS(4), Reparam()]"
