"""The package as type checkers see it from outside: users' programs are accepted, wrong ones refused, by mypy and by pyright."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import pplgrad

HERE = Path(__file__).parent / "typed"
PACKAGE = Path(pplgrad.__file__).parent
USERS = ["pyro_user", "numpyro_user", "lab_user"]
WRONG = {
    number for number, line in enumerate((HERE / "wrong_user.py").read_text().splitlines(), 1) if "# wrong: " in line
}


def by_mypy(path, folder):
    """Return the lines at which mypy finds an error in a user's file, with its words; what it finds elsewhere is not the user's."""
    (folder / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = true\npython_version = 3.12\nfollow_imports = silent\n"
        f"mypy_path = {PACKAGE.parent}\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        str(folder.parent / "cache"),
        path.name,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {int(n): words for n, words in re.findall(rf"^{path.name}:(\d+): error: (.*)$", done.stdout, re.MULTILINE)}


def by_pyright(path, folder):
    """Return the lines at which pyright finds an error, with its words."""
    if find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(PACKAGE.parent)]}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", path.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {one["range"]["start"]["line"] + 1: one["message"] for one in found if one["severity"] == "error"}


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("checker", [by_mypy, by_pyright])
@pytest.mark.parametrize("user", USERS)
def test_a_users_program_is_accepted(user, checker, tmp_path):
    path = tmp_path / f"{user}.py"
    path.write_text((HERE / path.name).read_text())
    assert checker(path, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("checker", [by_mypy, by_pyright])
def test_a_wrong_program_is_refused_where_it_is_wrong(checker, tmp_path):
    path = tmp_path / "wrong_user.py"
    path.write_text((HERE / path.name).read_text())
    found = checker(path, tmp_path)
    assert set(found) == WRONG, found
