"""What a user types at the terminal, and the plain words that come back."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from click.testing import CliRunner

from pplgrad.lab import cli, load_study
from pplgrad.lab.cli_compare import _failed as failed_estimators
from pplgrad.lab.script import ScriptError, check_parameters, load_script
from tests.lab.processes import COMMAND
from tests.lab.test_crashes import BACKENDS, COMMANDS, MODEL, SCRIPT, given, told

# Nothing here is about the page.
pytestmark = pytest.mark.usefixtures("no_page")


def write(folder, text=SCRIPT, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return path


def invoke(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def without(text, backend):
    """Return the script without one library's program."""
    start = text.index(f"def {backend}_program")
    end = text.find("\ndef ", start + 1)
    return text[:start] + (text[end + 1 :] if end > 0 else "")


# DISCRETE.


@pytest.mark.parametrize("backend", BACKENDS)
def test_discrete_may_be_one_name(tmp_path, backend):
    path = write(tmp_path, SCRIPT.replace('("z",)', '"z"'))
    assert load_script(path, (backend,)).discrete == ("z",)
    result = invoke(*given("check", path, [backend]))
    assert result.exit_code in (0, 3) and "score" in result.stdout.lower(), result.output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_typo_in_discrete_is_told_in_the_scripts_words(tmp_path, command, backend):
    path = write(tmp_path, SCRIPT.replace('("z",)', '("zz",)'))
    (line,) = told(invoke(*given(command, path, [backend], tmp_path / "out")))
    assert line == (
        f"pplgrad: {path}:5: DISCRETE names 'zz', which the program does not have; its latent sites are: 'z'; did you mean 'z'? ({backend})."
    )


def test_an_observed_site_in_discrete_is_told_in_the_scripts_words(tmp_path):
    path = write(tmp_path, SCRIPT.replace('("z",)', '("z", "x")'))
    (line,) = told(invoke(*given("check", path, ["pyro"])))
    assert line.startswith(f"pplgrad: {path}:5: DISCRETE names 'x', ") and "latent sites are: 'z'" in line


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("command", ["check", "compare"])
def test_a_typo_in_an_estimators_site_is_told_in_the_commands_words(tmp_path, command, backend):
    path = write(tmp_path)
    small = given(command, path, [backend], tmp_path / "out")
    if command == "compare":
        small = small[: small.index("--estimator")] + small[small.index("--estimator") + 2 :]
    (line,) = told(invoke(*small, "--estimator", "zz=DisARM()"))
    assert "an estimator is given for 'zz', which the program does not have" in line and "did you mean 'z'?" in line


# --backend.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_for_one_library_needs_no_backend(tmp_path, command, backend):
    other = BACKENDS[backend == "pyro"]
    path = write(tmp_path, without(SCRIPT, other))
    result = invoke(*given(command, path, [], tmp_path / "out"))
    assert result.exit_code in (0, 3), result.output
    assert backend in result.stdout.split() or f"{backend}," in result.stdout
    (line,) = told(invoke(*given(command, path, [other], tmp_path / "out")))
    assert f"has no '{other}_program'" in line


def test_a_script_without_a_program_is_refused(tmp_path):
    path = write(tmp_path, without(without(SCRIPT, "pyro"), "numpyro"))
    (line,) = told(invoke(*given("check", path, [])))
    assert "has no 'pyro_program' and no 'numpyro_program'" in line


def test_a_study_names_no_library_for_a_script_that_has_one(tmp_path):
    write(tmp_path, without(SCRIPT, "numpyro"))
    study = write(tmp_path, 'script = "mine.py"\nestimators = ["score"]\n[training]\nsteps = 1\n', "study.toml")
    result = invoke(*given("compare", study, [], tmp_path / "out"))
    assert result.exit_code == 0, result.output


# Exit codes of `compare`.


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_comparison_with_failed_estimators_has_an_exit_code_of_its_own(tmp_path, backend):
    path = write(tmp_path)
    result = invoke(*given("compare", path, [backend], tmp_path / "out"), "--estimator", "Reparam()")
    assert result.exit_code == 4, result.output
    assert result.stderr == "pplgrad: 1 of 2 estimators failed, the others are done: Reparam().\n"
    assert "failed: training" in result.stdout
    # All of it is kept, and the same command says the same.
    assert invoke(*given("compare", path, [backend], tmp_path / "out"), "--estimator", "Reparam()").exit_code == 4
    assert (
        "4 `compare`" in invoke("--help").stdout and "4: some estimators failed" in invoke("compare", "--help").stdout
    )


def test_a_learning_rate_that_fails_is_no_failed_estimator(tmp_path):
    def result(rate, **more):
        task = dict(kind="training", estimator="score", backend="pyro", seed=0, settings={"learning_rate": rate})
        return {"task": task, **more}

    assert failed_estimators([result(0.1, error="the objective is not finite"), result(0.01)]) == []
    assert failed_estimators([result(0.1, error="the objective is not finite")]) == ["score"]


# One study in a folder.


def study_of(path, out, *more, steps=1, words=("score",)):
    chosen = [part for word in words for part in ("--estimator", word)]
    small = ["--backend", "pyro", "--batch-size", 4, "--bound-samples", 0, "--quiet", "--seeds", 1, "--steps", steps]
    return invoke("compare", path, *chosen, *small, *more, "--out", out)


@pytest.mark.slow
def test_a_second_study_never_replaces_anothers_results_silently(tmp_path):
    path, out = write(tmp_path), tmp_path / "out"
    assert study_of(path, out).exit_code == 0
    before = (out / "study.parquet").read_bytes()
    (line,) = told(study_of(path, out, steps=2))
    assert line == (
        f"pplgrad: The folder {out} holds another study, mine.py with score (1 finished run); it differs in steps, 1. Give another "
        "folder with --out, or --replace to put the results of this study in the place of those."
    )
    assert "particles, 2" in told(study_of(path, out, "--particles", 3))[0]
    assert "option scale, 1.0" in told(study_of(path, out, "--set", "scale=2"))[0]
    assert "estimators, score;" not in told(study_of(path, out, words=["score+loo"]))[0]
    assert "estimators, score." in told(study_of(path, out, words=["score+loo"]))[0]
    other = write(tmp_path, SCRIPT.replace("0.4", "0.3"), "other.py")
    assert f"the script, {path}" in told(study_of(other, out))[0]
    path.write_text(SCRIPT.replace("0.4", "0.3"))
    assert "the script's text, which has changed since" in told(study_of(path, out))[0]
    assert (out / "study.parquet").read_bytes() == before
    assert study_of(path, out, "--replace").exit_code == 0
    assert (out / "study.parquet").read_bytes() != before and len(list((out / "runs").iterdir())) == 2


@pytest.mark.slow
def test_the_same_study_goes_on_and_may_grow(tmp_path):
    path, out = write(tmp_path), tmp_path / "out"
    assert study_of(path, out).exit_code == 0
    first = {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    # The folder is the same from elsewhere, and an option that is given as it was by default changes nothing.
    assert study_of(path, out, "--set", "scale=1.0", "--seeds", 2, words=["score", "score+loo"]).exit_code == 0
    assert all(file.stat().st_mtime_ns == when for file, when in first.items())
    assert len(list((out / "runs").iterdir())) == 4
    assert "it differs in estimators, score score+loo; seeds, 2. Give" in told(study_of(path, out))[0]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_measured_needs_its_large_files_no_longer(tmp_path, jobs):
    """Parameters at the snapshots and references may be taken away; they are made again for a measurement that is missing."""
    path, out = write(tmp_path), tmp_path / "out"
    more = ("--snapshots", "0", "--draws", 20, "--jobs", jobs)
    assert study_of(path, out, *more).exit_code == 0
    before, runs = load_study(out).frame, out / "runs"
    large = [file for kind in ("snapshots", "reference") for file in runs.glob(f"{kind}-*")]
    for file in large:
        file.unlink()
    assert len(large) == 2 and study_of(path, out, *more).exit_code == 0
    assert not any(file.exists() for file in large) and load_study(out).frame.equals(before)
    assert study_of(path, out, *more, words=["score", "score+loo"]).exit_code == 0
    assert all(file.exists() for file in large) and "6/6" in (out / "log.txt").read_text()


@pytest.mark.slow
def test_a_folder_of_before_is_known_by_its_dataset(tmp_path):
    path, out = write(tmp_path), tmp_path / "out"
    assert study_of(path, out).exit_code == 0
    (out / "study.json").unlink()
    assert "it differs in steps, 1." in told(study_of(path, out, steps=2))[0]
    assert study_of(path, out).exit_code == 0
    (out / "study.json").write_text("{}")
    assert "is not what a study leaves" in told(study_of(path, out))[0]


@pytest.mark.slow
def test_a_study_of_before_a_setting_was_known_has_its_default(tmp_path):
    path, out = write(tmp_path), tmp_path / "out"
    assert study_of(path, out).exit_code == 0
    held = json.loads((out / "study.json").read_text())
    del held["study"]["training"]["compile"]
    (out / "study.json").write_text(json.dumps(held))
    assert "compile, False" in told(study_of(path, out, "--compile"))[0]
    assert study_of(path, out).exit_code == 0


def test_an_unfinished_study_is_not_replaced_either(tmp_path):
    path, out = write(tmp_path, SCRIPT.replace(MODEL, MODEL + "        raise KeyboardInterrupt\n")), tmp_path / "out"
    assert study_of(path, out).exit_code == 130
    assert "(0 finished runs)" in told(study_of(path, out, steps=2))[0]


# An interruption.


def interrupted_after(folder, runs, *arguments):
    """Start a command in a process of its own, press Ctrl-C after so many finished runs; return what it said."""
    command = [*COMMAND, *map(str, arguments)]
    # What was started in the background of a shell ignores Ctrl-C and hands that on, unless this process handles it.
    # (`preexec_fn` would fork, which JAX warns of where a test before this one has loaded it.)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    for _ in range(6000):
        if len(list((folder / "runs").glob("*.json"))) >= runs or process.poll() is not None:
            break
        time.sleep(0.02)
    # As the terminal does: to every process of the group.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, jobs):
    path, out = write(tmp_path), tmp_path / "out"
    small = ["--backend", "pyro", "--batch-size", 4, "--bound-samples", 0, "--seeds", 4, "--steps", 200, "--jobs", jobs]
    command = ["compare", path, "--estimator", "score+loo", *small, "--out", out]
    code, _, err = interrupted_after(out, 1, *command)
    assert code == 130, err
    assert re.fullmatch(
        rf"pplgrad: interrupted: [123] of 4 runs are finished and kept in {re.escape(str(out))}; the same command goes on "
        r"from there\.\n", err
    ), err  # fmt: skip
    kept = {file: file.stat().st_mtime_ns for file in (out / "runs").glob("*.json")}
    assert invoke(*command[:-2], "--out", out, "--quiet").exit_code == 0
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())


@pytest.mark.parametrize("command", ["check", "choose"])
def test_ctrl_c_says_that_nothing_is_kept_where_nothing_is(tmp_path, command):
    path = write(tmp_path, SCRIPT.replace(MODEL, MODEL + "        raise KeyboardInterrupt\n"))
    result = invoke(*given(command, path, ["pyro"]))
    assert result.exit_code == 130
    assert result.stderr == "pplgrad: interrupted: nothing is kept; the same command starts anew.\n"


# Did you mean.


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--estimator", "disarm()"], "did you mean DisARM()?"),
        (["--estimator", "ScoreFunktion(LeaveOneOut())"], "did you mean ScoreFunction()?"),
        (["--estimator", "scor+loo"], "did you mean score?"),
        (["--estimator", "score+lou"], "did you mean 'loo'?"),
        (["--estimator", "ScoreFunction(sample=4)"], "did you mean 'samples'?"),
        (["--objective", "IWEA()"], "did you mean IWAE()?"),
        (["--set", "scales=2"], "did you mean 'scale'?"),
        (["--elbo", "TraceGraf_ELBO"], "did you mean 'TraceGraph_ELBO'?"),
        (["--estimator", "zz=score+loo"], "did you mean 'z'?"),
        (["--estimatr", "score"], "Did you mean '--estimator'?"),
        (["--backend", "piro"], "'pyro'"),
        (["--reference", "scor"], "'score'"),
    ],
)
def test_what_is_misspelt_on_the_command_line_is_named(tmp_path, words, meant):
    path = write(tmp_path)
    result = invoke("check", path, "--backend", "pyro", "--draws", 100, "--batch-size", 2, *words)
    assert result.exit_code == 2 and meant in " ".join(result.stderr.split()), result.stderr


def test_what_is_misspelt_elsewhere_is_named(tmp_path):
    write(tmp_path)
    wrong = invoke("comprae", "mine.py")
    assert wrong.exit_code == 2 and "compare" in wrong.stderr
    for text, meant in (
        ("particle = 3", "did you mean 'particles'?"),
        ('backends = ["numpiro"]', "did you mean 'numpyro'?"),
        ("[training]\nstep = 3", "did you mean 'steps'?"),
    ):
        study = write(tmp_path, f'script = "mine.py"\n{text}\n', "study.toml")
        assert meant in told(invoke("compare", study))[0]
    with pytest.raises(ScriptError, match="did you mean 'weights'?"):
        check_parameters({"gradient_descent": {"weight": 0.1}}, ["weights", "bias"])


# Progress.


@pytest.mark.slow
def test_check_shows_how_far_it_is_in_a_terminal_and_nothing_elsewhere(tmp_path):
    path = write(tmp_path)
    words = ["check", str(path), "--backend", "pyro", "--draws", "100", "--batch-size", "2", "--estimator", "DisARM()"]

    def checked(*more, terminal):
        runner = CliRunner(env={"FORCE_COLOR": "1"} if terminal else {})
        return runner.invoke(cli.main, [*words, *more])

    found = checked("--estimator", "score+loo", terminal=True)
    assert found.exit_code in (0, 3), found.output
    for told_ in ("pyro DisARM(): first half", "second half", "pyro score+loo", "2/2", "checks", "left:"):
        assert told_ in found.stderr, (told_, found.stderr)
    assert "first half" not in found.stdout
    assert checked("--quiet", terminal=True).stderr == ""
    assert checked(terminal=False).stderr == ""
