"""`pplgrad compare`: what it leaves, how it goes on after an interruption, and how it says no."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from benchmarks.published import study_table
from pplgrad.lab.cli import main
from pplgrad.lab.data import evaluation_steps
from pplgrad.lab.results import KEYS, UNITS, failures, read
from pplgrad.lab.summaries import gradient_table, training_table
from pplgrad.lab.tasks import Task
from tests.lab.test_crashes import SCRIPT

SBN = Path(__file__).parents[2] / "models" / "sbn.py"
SMALL = ["--set", "latents=5", "--steps", "6", "--seeds", "1", "--quiet", "--batch-size", "20", "--bound-samples", "5"]
WORDS = ["DisARM()", "score+average+neural", "z*=Reparam()"]
# What the command line has no option for takes longest by default: the steps in which a baseline learns, and draws at the end.
STUDY = f"""
script = "{SBN.as_posix()}"
estimators = {WORDS}
particles = 2
[gradients]
warm_up = 10
[training]
points = 2
gradient_draws = 8
"""
# After SMALL, whose steps they replace.
STEPS = ["--steps", "4", "--snapshots", "0,4", "--draws", "20"]


def run(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)], catch_exceptions=False)


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert message.startswith("pplgrad: ") and "\n" not in message
    return message


def values(frame, **wanted):
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    return frame["value"]


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    (out / "study.toml").write_text(STUDY)
    result = run(out / "study.toml", *SMALL, *STEPS, "--out", out)
    # One of them does not fit.
    assert result.exit_code == 4, result.output
    return out, result.output


@pytest.mark.slow
def test_leaves_one_dataset_that_says_what_it_is(study):
    out, shown = study
    frame, about = read(out)
    assert list(frame.columns)[: len(KEYS)] == KEYS and {"machine_cores", "version_pplgrad"} <= set(frame.columns)
    assert set(frame["quantity"].dropna()) <= set(UNITS)
    assert about["versions"]["pplgrad"] and about["machine"]["cores"] and about["study"]["options"]["latents"] == "5"
    assert about["command"].startswith("pplgrad ")
    curve = values(frame, kind="training", backend="pyro", estimator="DisARM()", seed=0, quantity="test")
    assert len(curve) == len(evaluation_steps(4, 2))
    # Nothing is counted twice.
    assert not frame.duplicated([k for k in KEYS if k not in ("value", "unit", "error")]).any()
    for quantity in ("bias2", "variance", "mse", "milliseconds", "evaluations", "peak_bytes"):
        found = values(frame, kind="gradients", part="program", quantity=quantity)
        assert len(found) == 2 * 2 * 2 and (quantity == "bias2" or (found > 0).all()), quantity
    sites = frame[(frame["kind"] == "gradients") & (frame["part"] == "site")]
    assert set(sites["name"]) == {"z1"}
    assert "DisARM()" in shown and "importance-weighted bound" in shown


@pytest.mark.slow
def test_an_estimator_that_does_not_fit_is_reported_and_ends_nothing(study):
    out, shown = study
    frame, _ = read(out)
    bad = failures(frame)
    assert set(bad["estimator"]) == {"z*=Reparam()"} and set(bad["kind"]) == {"training", "gradients"}
    assert bad["error"].str.contains("Bernoulli has no reparameterized sampler").all()
    assert "failed: training pyro z*=Reparam(): " in shown
    # The script's line stands before the sentence.
    assert "Reparam() cannot be used at site 'z1'" in " ".join(shown.split())


@pytest.mark.slow
def test_the_table_of_the_published_comparisons(study):
    frame, _ = read(study[0])
    _, _, *rows = (line.strip("| ").split(" | ") for line in study_table(study[0]).splitlines())
    # Those that do not fit have no row. Least evaluations first, and among those the least variance.
    for library in ("pyro", "numpyro"):
        mine = [row for row in rows if row[0] == library]
        assert {row[1] for row in mine} == {"`DisARM()`", "`score+average+neural`"}
        assert [int(row[2]) for row in mine] == sorted(int(row[2]) for row in mine)
    one = dict(backend="numpyro", estimator="DisARM()", seed=0)
    row = next(row for row in rows if row[:2] == ["numpyro", "`DisARM()`"])
    wanted = [
        values(frame, **one, kind="gradients", part="site", step=stop, quantity="variance").item() for stop in (0, 4)
    ]
    assert [float(text.replace(",", "")) for text in row[3:5]] == pytest.approx(wanted, abs=0.51)
    test = values(frame, **one, kind="training", step=4, quantity="test").item()
    assert float(row[7]) == pytest.approx(test, abs=0.0051) and row[9] == "1"


@pytest.mark.slow
def test_tables_are_means_of_the_dataset(study):
    frame, _ = read(study[0])
    table = gradient_table(frame)
    row = table.loc[(4, "numpyro", "DisARM()")]
    wanted = {q: values(frame, kind="gradients", backend="numpyro", estimator="DisARM()", step=4, part="program", quantity=q).mean()
              for q in ("mse", "evaluations", "milliseconds")}  # fmt: skip
    assert row["mse × ms", "mean"] == pytest.approx(wanted["mse"] * wanted["milliseconds"])
    assert row["efficiency", "mean"] == pytest.approx(1 / row["mse × ms", "mean"])
    # Two particles, each with one more run.
    assert row["evaluations", "mean"] == wanted["evaluations"] == 4
    trained = training_table(frame).loc[("pyro", "DisARM()")]
    ends = values(frame, kind="training", backend="pyro", estimator="DisARM()", step=4, quantity="test")
    assert trained["test", "mean"] == pytest.approx(ends.mean()) and len(ends) == 1


@pytest.mark.slow
def test_both_libraries_start_at_the_same_objective_and_have_the_same_gradients(study):
    frame, _ = read(study[0])
    start = {b: values(frame, kind="training", backend=b, step=0, quantity="train").mean() for b in ("pyro", "numpyro")}
    assert abs(start["pyro"] - start["numpyro"]) < 0.5
    table = gradient_table(frame)["variance", "mean"]
    for name in WORDS[:-1]:
        assert table[(4, "pyro", name)] == pytest.approx(table[(4, "numpyro", name)], rel=0.9)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_is_never_repeated_and_the_page_is_the_same(study):
    out, _ = study
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    page, data = (out / "report.html").read_text(), read(out)[0]
    result = run(out / "study.toml", *SMALL, *STEPS, "--out", out)
    assert result.exit_code == 4
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == before
    pd.testing.assert_frame_equal(read(out)[0], data)
    # The minute in which it was made may be another one.
    pages = [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", x) for x in (page, (out / "report.html").read_text())]
    assert pages[0].split("<h2>")[1:-1] == pages[1].split("<h2>")[1:-1]
    assert "was done" in (out / "log.txt").read_text()


@pytest.fixture
def little(tmp_path):
    """A script with one latent a datum and twelve data, for what does not depend on the program."""
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_another_configuration_is_another_run(little, tmp_path):
    base = [little, "--backend", "pyro", "--estimator", "score", "--seeds", "1", "--bound-samples", "0", "--quiet"]
    for extra in (["--steps", "2"], ["--steps", "3"], ["--steps", "3", "--learning-rate", "0.1"]):
        assert run(*base, *extra, "--out", tmp_path, "--replace").exit_code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert set(read(tmp_path)[0]["learning_rate"]) == {0.1}


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_the_learning_rate_is_searched_on_the_first_seed(tmp_path):
    rates = ["--learning-rate", "1e-6", "--learning-rate", "0.1"]
    given = [SBN, "--backend", "pyro", "--estimator", "score+loo", *SMALL[:2], "--steps", "12", "--seeds", "2"]
    assert run(*given, *rates, "--bound-samples", "0", "--quiet", "--out", tmp_path).exit_code == 0
    frame, _ = read(tmp_path)
    assert set(frame[frame["seed"] == 0]["learning_rate"]) == {1e-6, 0.1}
    assert set(frame[frame["seed"] == 1]["learning_rate"]) == {0.1}
    assert list(training_table(frame)["learning_rate"]) == [0.1]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(tmp_path):
    """`kill -9` after the first finished run: nothing half is left, and the same command finishes the rest."""
    command = [
        *(sys.executable, "-m", "pplgrad.lab", "compare", str(SBN), "--backend", "pyro", "--estimator", "score"),
        *(
            "--set",
            "latents=5",
            "--steps",
            "100",
            "--seeds",
            "4",
            "--bound-samples",
            "0",
            "--quiet",
            "--out",
            str(tmp_path),
        ),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "runs"
    for _ in range(600):
        if runs.exists() and list(runs.glob("*.json")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert 0 < len(finished) < 4
    for path in finished:
        json.loads(path.read_text())
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "score" in done.stdout and len(list(runs.glob("*.json"))) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_a_full_disk_writes_no_half_file(little, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    command = [little, "--backend", "pyro", "--estimator", "score", *SMALL[2:], "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in refused(*command)
    assert list((tmp_path / "runs").iterdir()) == []
    assert run(*command).exit_code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_side_by_side_gives_the_same_results_bit_for_bit(little, tmp_path):
    words = ["--estimator", "score+loo", "--estimator", "DisARM()"]
    base = [little, "--backend", "pyro", *words, *SMALL[2:], "--snapshots", "0", "--draws", "20"]
    run(*base, "--out", tmp_path / "one")
    run(*base, "--jobs", "2", "--out", tmp_path / "two")
    one, two = (read(tmp_path / name)[0] for name in ("one", "two"))
    timed = one["quantity"].isin(["seconds", "milliseconds", "peak_bytes", "load"])
    # Workers say how many threads they were given.
    one, two = (frame[~timed].drop(columns="machine_threads") for frame in (one, two))
    assert len(one) and one["error"].isna().all()
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_compiled_steps_of_pyro_train_alike(little, tmp_path):
    base = [little, "--backend", "pyro", "--estimator", "score+loo", "--steps", "40", "--seeds", "1"]
    base += ["--bound-samples", "0", "--quiet"]
    ends = {}
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert run(*base, *more, "--out", tmp_path / name).exit_code == 0
        (file,) = (tmp_path / name / "runs").glob("*.json")
        result = json.loads(file.read_text())
        ends[name] = result["curve"][-1]["train"]
        assert result["task"]["settings"].get("compile", False) == (name == "compiled")
    assert ends["compiled"] == pytest.approx(ends["eager"], abs=0.5)


def test_refusals(tmp_path):
    assert "no model script at" in refused(tmp_path / "none.py")
    script = tmp_path / "half.py"
    script.write_text("OPTIONS = {}\nDISCRETE = ('z',)\n")
    assert "has no 'load'" in refused(script, "--backend", "pyro")
    script.write_text("import nothing_of_this_name\n")
    assert "cannot be loaded: ModuleNotFoundError" in refused(script)
    assert "Unknown name 'DisARMS' in 'DisARMS()'; did you mean DisARM()?" in refused(SBN, "--estimator", "DisARMS()")
    assert "write DisARM()" in refused(SBN, "--estimator", "DisARM")
    assert "Unknown baseline 'magic'" in refused(SBN, "--estimator", "score+magic")
    assert "only one baseline" in refused(SBN, "--estimator", "score+loo+optimal")
    assert "'IWAE(' cannot be read" in refused(SBN, "--objective", "IWAE(")
    assert "has no option 'size'" in refused(SBN, "--set", "size=3")
    assert "is of type int" in refused(SBN, "--set", "latents=many")
    assert "NAME=VALUE" in refused(SBN, "--set", "latents")
    assert "nothing to compare" in refused(SBN, "--steps", "0")
    assert "give --snapshots" in refused(SBN, "--draws", "50")
    assert "--snapshots takes numbers" in refused(SBN, "--snapshots", "early")
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in refused(SBN, "--out", file / "results")
    missing = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert missing.exit_code == 2 and "no study.parquet" in missing.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "cannot be written" in refused(SBN, "--out", tmp_path / "results")


@pytest.mark.parametrize("command", ["init", "check", "choose", "compare", "report", "estimators", "completion"])
def test_every_option_has_its_help(command):
    for option in main.commands[command].params:
        assert option.help or option.param_type_name == "argument", option.name
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0 and "_PPLGRAD_COMPLETE" in result.output


def test_evaluation_steps_and_file_names():
    assert evaluation_steps(3, 20) == [0, 1, 2, 3]
    common = dict(
        kind="training", script="a.py", digest="0", options={}, backend="pyro", estimator="z*=ARMS(4), w=Reparam()"
    )
    common |= dict(seed=0, particles=2, batch_size=1, objective="ELBO()")
    one = Task(**common)
    # The path of the script does not decide the result, its content does.
    assert one.file == Task(**{**common, "script": "b.py"}).file
    assert one.file != Task(**{**common, "digest": "1"}).file
    assert not set(one.file) & set("*()=, /")


@pytest.mark.slow
def test_a_reward_is_compared_as_a_reward(tmp_path):
    """Training ends near the best outcome's 11, where the evidence lower bound would be log 4 less."""
    small = [
        "--steps",
        "150",
        "--learning-rate",
        "0.1",
        "--seeds",
        "1",
        "--batch-size",
        "16",
        "--particles",
        "4",
        "--quiet",
    ]
    script = SBN.with_name("lottery.py")
    result = run(script, "--objective", "Expectation()", "--estimator", "score+loo", *small, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    frame, _ = read(tmp_path)
    for backend in ("pyro", "numpyro"):
        curve = values(frame, kind="training", backend=backend, quantity="test").tolist()
        assert curve[0] < 10.6 and curve[-1] > 10.8
    assert set(frame.loc[frame["quantity"] == "test", "unit"]) == {"reward / datum"}
    assert "weighted_bound" not in set(frame["quantity"])
    page = (tmp_path / "report.html").read_text()
    assert "test reward, end, reward / datum" in page and "ELBO" not in page and "nats" not in page
