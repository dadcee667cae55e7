"""What a package index and a user who installs half of pplgrad see."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pplgrad

ROOT = Path(__file__).parents[1]
# Tests of the installed wheel have a copy of the tests beside it, and no more.
here = pytest.mark.skipif(not (ROOT / "LICENSE").exists(), reason="not a checkout")

# Modules that are not installed, as far as what follows can tell.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def without(missing, code):
    """Run code in a process that lacks modules; return what it prints and its last line on standard error."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT.format(missing=missing) + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1], done.returncode


@pytest.mark.parametrize(
    ("missing", "module", "extra"),
    [
        (("jax",), "pplgrad.numpyro", "numpyro"),
        (("numpyro",), "pplgrad.numpyro", "numpyro"),
        (("torch",), "pplgrad.pyro", "pyro"),
        (("pyro",), "pplgrad.pyro", "pyro"),
    ],
)
def test_half_of_the_package_says_what_it_needs(missing, module, extra):
    _, last, code = without(missing, f"import {module}")
    assert code == 1
    assert (
        last
        == f"ModuleNotFoundError: {module} needs {missing[0]}, which is not installed; pip install 'pplgrad[{extra}]'."
    )


@pytest.mark.slow
def test_another_missing_module_is_named_as_it_is():
    _, last, _ = without(("scipy", "multipledispatch"), "import pplgrad.numpyro")
    assert last.startswith("ModuleNotFoundError: No module named") and "pplgrad[" not in last


@pytest.mark.parametrize("name", ["load_study", "plot_training"])
def test_the_lab_says_what_it_needs(name):
    _, last, code = without(("pandas", "matplotlib"), f"from pplgrad.lab import {name}")
    assert code == 1 and f"pplgrad.lab.{name} needs" in last and "pip install 'pplgrad[research]'" in last


MISSING = ("click", "rich", "pandas", "torch", "pyro", "jax", "numpyro")


def test_the_version_is_known_without_any_extra():
    run = "sys.argv = ['pplgrad', '--version']; from pplgrad.lab.__main__ import main; main()"
    assert without(MISSING, run) == (f"pplgrad, version {pplgrad.__version__}", "", 0)
    other = run.replace("'--version'", "'check', '--version'")
    assert "pip install 'pplgrad[research]'" in without(MISSING, other)[1]


def test_the_command_says_the_same_version():
    said = subprocess.run(
        [sys.executable, "-m", "pplgrad.lab", "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"pplgrad, version {pplgrad.__version__}\n"


@here
def test_the_version_stands_in_one_place_and_is_told_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pplgrad.__version__"}
    assert f"\nversion: {pplgrad.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert "\n## [Unreleased]\n" in changes and f"\n## [{pplgrad.__version__}]" in changes


@pytest.mark.slow
@here
def test_the_metadata_is_complete():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    assert "Apache License" in (text := (ROOT / "LICENSE").read_text()) and "END OF TERMS AND CONDITIONS" in text
    assert {"readme", "authors", "keywords", "classifiers", "description", "requires-python"} <= set(project)
    assert "Typing :: Typed" in project["classifiers"]
    # No address that nobody has.
    assert "urls" not in project and "@" not in str(project["authors"])


@here
def test_the_workflow_does_what_ci_does():
    wanted = re.findall(r"^make \S+", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    found = re.findall(r"run: (make \S+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert wanted == [step for step in found if step != "make test-extras"]


@here
@pytest.mark.parametrize(
    "page", ["CHANGELOG.md", "SECURITY.md", "docs/stability.md", "docs/upstream.md", "CITATION.cff"]
)
def test_pages_name_files_that_exist(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    paths = [path for path in re.findall(r"`((?:pplgrad|tests|docs)/[\w./]+)`", text)]
    missing = [name for name in links if not ((ROOT / page).parent / name).exists()]
    assert missing + [name for name in paths if not (ROOT / name).exists()] == []


@here
def test_no_archive_or_pickle_of_a_file_is_trusted():
    """What reads files says that it takes no pickled objects."""
    # The fuzzer's programs do what users may do, and known_code names what those may call.
    files = [p for p in (ROOT / "pplgrad").rglob("*.py") if "testing" not in p.parts and p.name != "known_code.py"]
    assert len(files) > 200
    for path in files:
        text = path.read_text()
        for call in re.findall(r"np\.load\(.*", text):
            assert "allow_pickle=False" in call, (path, call)
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, (path, call)
        assert not re.search(r"\bpickle\.loads?\(|(?<![\w.])eval\(|yaml\.load\(|shell=True|os\.system\(", text), path
