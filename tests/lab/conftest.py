"""What tests of the command line share: pages, which take longer than what most of them are about."""

import pytest

from pplgrad.lab import report, script_run
from pplgrad.lab.report import write_report
from pplgrad.lab.results import write
from pplgrad.lab.study import Gradients, Study


@pytest.fixture(scope="session")
def page_of_results(tmp_path_factory):
    """The page, with its pictures, of results that were made up. Tests that share it leave it as it is."""
    from tests.lab.test_report import ABOUT, NAMES, results

    folder = tmp_path_factory.mktemp("page")
    write(results(), Study("models/sbn.py", NAMES[:1], gradients=Gradients((0, 100))), ABOUT, folder)
    return write_report(folder)


@pytest.fixture(autouse=True)
def few_looks(monkeypatch):
    """Look at a failed program twice and not ten times: what is wrong in these tests is wrong at every look."""
    monkeypatch.setattr(script_run, "LOOKS", 2)


@pytest.fixture
def no_pictures():
    """Pages without their files of pictures."""
    from tests.lab.test_report import without_pictures

    with without_pictures():
        yield


@pytest.fixture
def no_page(monkeypatch):
    """Studies without their page, for tests of all else."""
    monkeypatch.setattr(report, "write_report", lambda out: out / "report.html")
