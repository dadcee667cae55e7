"""The page of a study: its numbers are the dataset's, it needs nothing beside it, and a browser shows it."""

import re
from contextlib import contextmanager
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from pplgrad.lab import report
from pplgrad.lab.cli import main
from pplgrad.lab.page_tables import GRADIENTS, TRAINING, cell
from pplgrad.lab.report import write_report
from pplgrad.lab.results import read, write
from pplgrad.lab.study import Gradients, Study
from pplgrad.lab.summaries import gradient_table, training_table

NAMES = ("score+loo", "DisARM()", "z1=ARMS(4),z2=DisARM()", "<b>odd</b>")
ABOUT = {
    "command": "pplgrad compare models/sbn.py --estimator 'DisARM()'",
    "versions": {"pplgrad": "0.1.0", "torch": "2.13.0"},
    "machine": {"system": "Linux", "cores": "2", "python": "3.11"},
    "finished": "2026-11-21 12:00 UTC",
    "wall_time": "3 min 2 s of work",
}


def results(backends=("pyro", "numpyro"), snapshots=(0, 100)):
    """Return results as runs leave them, with numbers made up; one estimator failed."""
    rng = np.random.default_rng(0)
    made = []
    for backend in backends:
        for name in NAMES:
            for seed in range(2):
                task = {"backend": backend, "estimator": name, "seed": seed}
                if name == NAMES[-1]:
                    made.append(
                        {"task": {**task, "kind": "training", "settings": {}}, "error": "it cannot & will not <fit>"}
                    )
                    continue
                curve = [
                    {"step": s, "seconds": s / 10, "train": -30 + s + rng.normal(), "test": -31 + s + rng.normal()}
                    for s in (0, 5, 10)
                ]
                settings = {"steps": 10, "learning_rate": 0.003}
                end = {
                    "curve": curve,
                    "milliseconds": 1.5,
                    "gradient_variance": 20 + rng.random(),
                    "weighted_bound": -19.0,
                }
                made.append({"task": {**task, "kind": "training", "settings": settings}, **end})
                parts = [("program", "all parameters"), ("parameter", "w"), ("site", "z1")]
                rows = [
                    {
                        "kind": k,
                        "name": n,
                        "gradient2": 4.0,
                        "bias2": rng.normal() / 10,
                        "bias2_se": 0.1,
                        "variance": v,
                        "mse": v + 0.1,
                    }
                    for (k, n), v in zip(parts, rng.random(3) + 1, strict=True)
                ]
                one = {"rows": rows, "broken": 0, "milliseconds": rng.random() + 0.1, "peak_bytes": 5000, "draws": 20}
                measured = {str(step): one for step in snapshots}
                made.append(
                    {"task": {**task, "kind": "gradients", "settings": {}}, "snapshots": measured, "evaluations": 4}
                )
    return made


def few():
    """Return results of one library at one snapshot, for a page of less than half the time."""
    return results(("pyro",), (100,))


@contextmanager
def without_pictures():
    """Let pages be without their files of pictures, which take most of a page's time and are in none of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "save", lambda frame, table, out: [])
        yield


@pytest.fixture
def folder(tmp_path):
    write(few(), Study("models/sbn.py", NAMES[:1], gradients=Gradients((100,))), ABOUT, tmp_path)
    return tmp_path


class Tables(HTMLParser):
    """The cells of all tables, row by row, and what a page takes from elsewhere."""

    def __init__(self):
        super().__init__()
        self.rows, self.outside, self.inside = [], [], False

    def handle_starttag(self, tag, attributes):
        self.inside = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        if self.inside:
            self.rows[-1].append("")
        self.outside += [
            v for k, v in attributes if k in ("src", "href", "xlink:href") and v and not v.startswith(("#", "data:"))
        ]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


@pytest.mark.slow
def test_the_pages_numbers_are_the_datasets(page_of_results):
    page = page_of_results.read_text()
    tables = Tables()
    tables.feed(page)
    frame, _ = read(page_of_results.parent)
    trained = training_table(frame)
    for (backend, name), row in trained.iterrows():
        wanted = [name, backend, *(cell(q, row).text for q in TRAINING if (q, "mean") in row.index), "0.003"]
        assert wanted in tables.rows
    plain = frame[(frame["kind"] == "training") & (frame["step"] == 10) & (frame["quantity"] == "test")]
    by_hand = plain[(plain["backend"] == "pyro") & (plain["estimator"] == "score+loo")]["value"]
    assert trained.loc[("pyro", "score+loo")]["test", "mean"] == pytest.approx(by_hand.mean())
    # Student's t for two seeds, one degree of freedom.
    half = 12.7062047 * by_hand.std(ddof=1) / 2**0.5
    assert trained.loc[("pyro", "score+loo")]["test", "half"] == pytest.approx(half, rel=1e-6)
    for (_, backend, name), row in gradient_table(frame).iterrows():
        assert [name, backend, *(cell(q, row).text for q in GRADIENTS)] in tables.rows
    assert ["training", "pyro", "<b>odd</b>", "it cannot & will not <fit>", "2"] in tables.rows
    assert ABOUT["command"] in re.sub("&#39;", "'", page)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_program_whose_sites_read_no_parameter_has_a_page(tmp_path):
    made = few()
    for result in made:
        for measured in result.get("snapshots", {}).values():
            measured["rows"] = [row for row in measured["rows"] if row["kind"] != "site"]
    write(made, Study("models/sbn.py", NAMES[:1], gradients=Gradients((100,))), ABOUT, tmp_path)
    assert gradient_table(read(tmp_path)[0], "site").empty
    page = write_report(tmp_path).read_text()
    assert "parameter" in page and "z1</td>" not in page


@pytest.mark.slow
def test_the_page_needs_nothing_beside_it(page_of_results):
    page, folder = page_of_results.read_text(), page_of_results.parent
    tables = Tables()
    tables.feed(page)
    assert tables.outside == [] and len(page) < 5e6
    assert "<b>odd</b>" not in page
    for name in ("training-step", "training-time", "gradients-time", "gradients-bias"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (
            folder / f"{name}.svg"
        ).read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_report_again_is_the_same_page(folder):
    first = write_report(folder).read_text()
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0 and "report.html" in result.output
    ids = re.compile(r'(id|href|url\(#)="?#?[\w-]*')
    assert ids.sub("", (folder / "report.html").read_text()) == ids.sub("", first)


def test_what_is_no_dataset_is_refused(folder):
    (folder / "study.parquet").write_bytes(b"nothing of the kind")
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 2 and "is not the dataset of a study" in result.stderr
    pd.DataFrame({"a": [1]}).to_parquet(folder / "study.parquet")
    assert "is not the dataset of a study" in CliRunner().invoke(main, ["report", str(folder)]).stderr
