"""Texts of a command line or of a TOML file that nobody would write: each gives a specification or a ScriptError, at once, and runs no code."""

import contextlib
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pplgrad
from pplgrad.errors import PplgradError
from pplgrad.lab.cli import main
from pplgrad.lab.script import ScriptError
from pplgrad.lab.specs import NAMES, Specification, objective, specification
from pplgrad.lab.study import Study, from_toml

DEEP = 10_000
HOSTILE = {
    "a megabyte": "D" * 2**20,
    "a megabyte of parts": "z=DisARM()," * 2**17,
    "parentheses": "(" * DEEP + ")" * DEEP,
    "brackets": "ARMS(" + "[" * DEEP + "]" * DEEP + ")",
    "short brackets": "ARMS(" + "[" * 90 + "]" * 90 + ")",
    "calls": "ScoreFunction(" * DEEP,
    "few calls": "ScoreFunction(" * 90 + ")" * 90,
    "signs": "ARMS(" + "-" * DEEP + "1)",
    "fewer signs": "ARMS(" + "-" * 1900 + "1)",
    "a long sum": "ScoreFunction(" + "+".join(["LeaveOneOut()"] * 140) + ")",
    "a power": "ARMS(10**10**10)",
    "a shift": "ARMS(1 << 10**10)",
    "a long word": "ARMS('a'*10**9)",
    "many digits": "ARMS(" + "9" * 1900 + ")",
    "too many digits": "ARMS(" + "9" * 9000 + ")",
    "a large number": "ARMS(99999999999)",
    "an infinite number": "REBAR(1e999)",
    "many particles": "DisARM()@" + "9" * 1900,
    "a raised digit": "DisARM()@²",
    "other digits": "DisARM()@٣",
    "null": "DisARM(\0)",
    "half a letter": "DisARM('\udc80')",
    "a statement": "__import__('os').system('touch {0}')",
    "an attribute": "DisARM().__class__.__mro__[1].__subclasses__()",
    "a comprehension": "[open('{0}', 'w').close() for _ in (1,)]",
    "a format": "ARMS(f'{open(\"{0}\", \"w\").close()}')",
    "a walrus": "(z := open('{0}', 'w').close())",
    "a lambda": "NeuralBaseline(inputs=lambda: open('{0}', 'w'))",
    "stars": "ARMS(*open('{0}', 'w'))",
    "a name twice": "ARMS(n=1, n=2)",
    "an unknown list": "ScoreFunction([1, 2])",
    "a set": "ScoreFunction({1: 2})",
    "a complex number": "ARMS(1+2j)",
    "bytes": "ARMS(b'4')",
    "an ellipsis": "ARMS(...)",
}  # fmt: skip


def read(text):
    """Read a text as an estimator and as an objective; nothing but a ScriptError, or what pplgrad says of a value, may be raised."""
    for reader, kind in ((specification, Specification), (objective, object)):
        try:
            assert isinstance(reader(text), kind)
        except PplgradError as refusal:
            assert len(str(refusal)) < 7000


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused_quickly_and_never_run(name, tmp_path):
    touched = tmp_path / "touched"
    text = HOSTILE[name].replace("{0}", str(touched)) if "{0}" in HOSTILE[name] else HOSTILE[name]
    began = time.perf_counter()
    with pytest.raises(PplgradError):
        specification(text)
    read(text)
    assert time.perf_counter() - began < 2 and not touched.exists()


@pytest.mark.parametrize("name", ["a statement", "a comprehension", "a format", "a walrus"])
def test_the_probes_would_show_a_parser_that_evaluates(name, tmp_path):
    touched = tmp_path / "touched"
    with contextlib.suppress(Exception):
        eval(HOSTILE[name].replace("{0}", str(touched)), dict(vars(pplgrad)))
    assert touched.exists()


# Pieces that come near to a specification, and anything else.
PIECES = st.sampled_from([*NAMES, "score", "loo", "z", "*", "(", ")", ",", "=", "+", "@", "[", "]", "{", "}", "'", '"', "-", "**", ".", ":", "lambda", "\n", "\\", "0", "1e9", "2", "None", "True", "n", "baseline", " "])  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    st.text()
    | st.lists(PIECES, max_size=25).map("".join)
    | st.lists(PIECES | st.text(max_size=3), max_size=40).map("".join)
)
@example("ScoreFunction(3)")
@example("DoubleCV(baseline=LeaveOneOut)")
def test_any_text_is_a_specification_or_is_refused(text):
    read(text)


NAMES_OF_STUDY = [
    "script",
    "estimators",
    "backends",
    "options",
    "seeds",
    "particles",
    "batch_size",
    "objective",
    "gradient_descent",
]
NAMES_OF_PARTS = ["snapshots", "draws", "reference_draws", "warm_up", "trained_with", "learning_rate", "also", "steps", "learning_rates", "baseline_learning_rate", "points", "gradient_draws", "bound_samples", "patience", "minimum_change", "validation"]  # fmt: skip
VALUES = st.sampled_from(["3", "-1", "0", "1e400", "nan", "true", "'DisARM()'", "'x'", "[]", "[1]", "['score']", "[true]", "[nan]", "{}", "{a = 1}", "1979-05-27", "[[1]]", "99999999999999999999", "''", "'../../x'"])  # fmt: skip


def test_what_would_steer_a_terminal_is_written_out(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("OPTIONS = {}")
    said = CliRunner().invoke(main, ["compare", str(path), "--estimator", "\x1b[2J\x07DisARM()"])
    assert said.exit_code == 2 and said.stderr.strip().isprintable() and "\\x1b" in said.stderr


def pairs(names):
    return st.dictionaries(st.sampled_from(names), VALUES, max_size=4).map(
        lambda found: "".join(f"{name} = {value}\n" for name, value in found.items())
    )


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    pairs(NAMES_OF_STUDY), st.sampled_from(["", "[training]\n", "[gradients]\n"]), pairs(NAMES_OF_PARTS), st.booleans()
)
def test_any_study_is_read_or_refused(tmp_path_factory, study, head, part, named):
    path = tmp_path_factory.getbasetemp() / "study.toml"
    start = "script = 'a.py'\n" if named and "script" not in study else ""
    path.write_text(start + study + (head + part if head else ""))
    try:
        assert isinstance(from_toml(path), Study)
    except ScriptError as refusal:
        assert str(path) in str(refusal) or "\n" not in str(refusal)
    except PplgradError:
        pass


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe", b"a = " + b"[" * DEEP + b"]" * DEEP, b"script = 'a.py'\n" * 2, b"#" * 2**21, b"script = 'a.py'\nseeds = 99999999999", b"\0"],
    ids=["no text", "nested", "twice", "long", "many seeds", "null"],
)  # fmt: skip
def test_a_hostile_study_is_refused_quickly(text, tmp_path):
    path = Path(tmp_path) / "study.toml"
    path.write_bytes(text)
    began = time.perf_counter()
    with pytest.raises(ScriptError):
        from_toml(path)
    assert time.perf_counter() - began < 2
