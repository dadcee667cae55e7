"""Names, reasons and options that would be markup: the page shows them as they are, and nothing of them is run or lost."""

import json
import re
from html.parser import HTMLParser

import pytest

from pplgrad.lab import plots, report
from pplgrad.lab.report import write_report
from pplgrad.lab.results import read, write
from pplgrad.lab.study import Gradients, Study
from tests.lab.test_report import ABOUT, NAMES, few, without_pictures

pytestmark = pytest.mark.slow
ODD = [
    "</script><script>boom()</script>=DisARM()",
    "<!-- ]]> $\\frac{$ _a$b$ `code` [bold] =DisARM()",
    "z\u2028\u2029&amp;&lt;{{ 7 * 7 }}{% if %}=DisARM()",
    "\"'><img src=x onerror=boom()>=DisARM()",
]
REASON = "'</td></tr></table><script>boom()</script>' \u2028 \"<!--\" &#60; $\\undefined$ ${7} \\u003c"


class Elements(HTMLParser):
    """The elements of a page by name, the text of its cells, and all attributes that run code."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.events, self.comments = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.events += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.comments.append(data)


def renamed(made, names):
    """Return results whose estimators, sites and reasons have other names."""
    new = dict(zip(NAMES, names, strict=True))
    for result in made:
        result["task"]["estimator"] = new[result["task"]["estimator"]]
        if "error" in result:
            result["error"] = REASON
        for measured in result.get("snapshots", {}).values():
            for row in measured["rows"]:
                row["name"] = names[0] if row["kind"] == "site" else row["name"]
    return made


def page_of(folder, names, script="models/sbn.py", options=None):
    folder.mkdir()
    study = Study(script, ("score",), options=options or {}, gradients=Gradients((100,)))
    write(renamed(few(), names), study, {**ABOUT, "command": f"pplgrad compare {script}"}, folder)
    return write_report(folder).read_text()


def elements(page):
    found = Elements()
    found.feed(page)
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    # The odd names are in its files of pictures as well, in which they might be formulas.
    odd = page_of(folder / "odd", ODD, f"models/{ODD[0].replace('/', '')}.py", {"data": REASON})
    with without_pictures():
        return page_of(folder / "plain", NAMES, options={"data": "x"}), odd, folder / "odd"


def tags(page):
    """Return the elements of a page; accents around a name set it in another type in the answer's sentences, and nothing more."""
    return [tag for tag in elements(page).tags if tag != "code"]


def test_no_text_becomes_an_element(pages):
    plain, odd = map(elements, pages[:2])
    assert tags(pages[1]) == tags(pages[0]) and odd.events == plain.events == [] and odd.comments == plain.comments


def test_every_text_is_shown_as_it_is(pages):
    odd = elements(pages[1])
    for text in [*ODD, REASON]:
        assert text in odd.texts, text
    # Nothing of a text is a template's.
    assert "49" not in odd.texts and "boom()" not in odd.texts


def test_the_charts_have_the_names_and_stay_inside_their_script(pages):
    (data,) = re.findall(r'<script type="application/json" id="specifications">(.*?)</script>', pages[1], re.DOTALL)
    assert not set("<>&\u2028\u2029") & set(data)
    text = json.dumps(json.loads(data), ensure_ascii=False)
    for name in ODD[:3]:
        assert json.dumps(name, ensure_ascii=False)[1:-1] in text


def test_pictures_have_names_that_would_be_formulas_or_hidden(pages):
    frame, _ = read(pages[2])
    frame["estimator"] = frame["estimator"].replace(ODD[0], "_z=DisARM()")
    _, shown = plots.plot_training(frame, "pyro").get_legend_handles_labels()
    assert " _z=DisARM()" in shown
    assert (pages[2] / "training-time.svg").stat().st_size > 10_000


@pytest.mark.usefixtures("no_pictures")
def test_a_page_without_escapes_is_noticed(pages, tmp_path, monkeypatch):
    class Trusting(report.Environment):
        def __init__(self, **options):
            super().__init__(**{**options, "autoescape": False})

    monkeypatch.setattr(report, "Environment", Trusting)
    odd = page_of(tmp_path / "odd", ODD, options={"data": REASON})
    assert tags(odd) != tags(pages[0]) and elements(odd).events
