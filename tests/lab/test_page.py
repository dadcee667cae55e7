"""The page of a study in a real browser: it draws, sorts, filters, answers to the pointer, and fits a phone, the dark and paper."""

import os
import shutil

import pytest

from pplgrad.lab.report import write_report
from pplgrad.lab.results import write
from pplgrad.lab.study import Gradients, Study
from tests.lab.test_report import ABOUT, NAMES, results, without_pictures

pytestmark = pytest.mark.slow
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    found = shutil.which(os.environ.get("PPLGRAD_BROWSER", "chromium"))
    if not found:
        pytest.skip("no Chromium here; CI installs one (PPLGRAD_BROWSER names another)")
    with api.sync_playwright() as host:
        made = host.chromium.launch(executable_path=found, args=QUIET)
        yield made
        made.close()


@pytest.fixture(scope="module")
def windows():
    """The windows that are open, by how they were opened, and what their pages have complained of."""
    return {}, []


@pytest.fixture
def opened(browser, windows, page_of_results):
    """Return what opens the page in a window; a window of the same kind is opened once, since a page takes long to be drawn."""
    known, said = windows

    def look(width=1300, path=page_of_results, **options):
        key = (width, path, *options.items())
        if key not in known:
            page = browser.new_page(viewport={"width": width, "height": 900}, offline=True, **options)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(f"file://{path}")
            page.wait_for_selector("table.dataTable")
            page.wait_for_function(
                "document.querySelectorAll('.chart svg.marks').length == document.querySelectorAll('.chart').length"
            )
            known[key] = page
        return known[key]

    yield look
    assert said == []


def column(page, table, place):
    """Return the texts of a column of one of the tables."""
    return page.locator("table.data").nth(table).locator(f"tbody tr td:nth-child({place})").all_inner_texts()


def test_the_answer_is_first_and_everything_is_drawn(opened):
    page = opened()
    lines = page.locator("body > :nth-child(2)").inner_text()
    assert lines.startswith("Which: ") and "How sure: " in lines and "The price of a wrong choice: " in lines
    # Against time and steps, and two snapshots in two pictures, each in two libraries.
    heights = page.eval_on_selector_all(".chart svg.marks", "all => all.map(x => x.getBoundingClientRect().height)")
    assert len(heights) == 2 * 2 + 2 * 2 * 2 and min(heights) > 80


def test_a_table_is_sorted_by_number_and_filtered(opened):
    page = opened()
    head = page.locator("table.data").nth(1).locator("thead th").nth(4)
    shown = {}
    for direction in ("ascending", "descending"):
        head.click()
        page.locator(f"table.data >> nth=1 >> th[aria-sort={direction}]").wait_for()
        cells = page.locator("table.data").nth(1).locator("tbody tr td:nth-child(5)")
        shown[direction] = [float(x) for x in cells.evaluate_all("all => all.map(x => x.dataset.order)")]
    assert shown["ascending"] == sorted(shown["descending"]) and shown["descending"] == shown["ascending"][::-1]
    page.get_by_label("Filter").nth(1).fill("numpyro")
    assert set(column(page, 1, 2)) == {"numpyro"}


def test_a_point_tells_its_value_where_the_pointer_is(opened):
    page = opened()
    page.locator("#training-time .chart svg.marks .mark-symbol path").nth(1).hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.locator("#vg-tooltip-element").inner_text()
    assert "estimator" in told and "mean" in told and "high" in told


def test_a_phone_has_everything_within_its_width(opened):
    page = opened(390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    table = page.locator(".wide").nth(1)
    table.evaluate("x => x.scrollLeft = 400")
    # The first column stays where it is.
    names = page.locator("table.data").nth(1).locator("tbody td:first-child").first
    assert abs(names.bounding_box()["x"] - table.bounding_box()["x"]) < 2


LONG = "ScoreFunction(samples=4, differentiate='all')"


@pytest.fixture(scope="module")
def precise(tmp_path_factory):
    """A study of an estimator with a long name, whose squared bias is known to a millionth of the variance."""
    made = results()
    for result in made:
        if result["task"]["estimator"] == "DisARM()":
            result["task"]["estimator"] = LONG
        for one in result.get("snapshots", {}).values():
            one["rows"] = [{**row, "bias2": abs(row["bias2"]) * 1e-5, "bias2_se": 1e-6} for row in one["rows"]]
    folder = tmp_path_factory.mktemp("precise")
    write(made, Study("models/sbn.py", NAMES[:1], gradients=Gradients((0, 100))), ABOUT, folder)
    with without_pictures():
        return write_report(folder)


@pytest.mark.parametrize("width", [390, 1300])
def test_pictures_stay_in_their_places_and_cut_no_name(opened, precise, width):
    page = opened(width, precise)
    for chart in page.locator(".chart svg.marks").all():
        place = chart.bounding_box()
        assert place["width"] <= width
        texts = chart.evaluate(
            "x => [...x.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect().toJSON()])"
        )
        for text, box in texts:
            assert "…" not in text
            assert place["x"] - 3 <= box["left"] and box["right"] <= place["x"] + place["width"] + 3, text


def test_the_dark_page_is_dark_and_the_printed_one_is_not(opened, tmp_path):
    page = opened(color_scheme="dark")

    def colours():
        return page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")

    paper, ink = colours()
    assert max(map(int, paper[4:-1].split(","))) < 64 < 192 < min(map(int, ink[4:-1].split(",")))
    words = page.locator(".chart svg.marks text").first
    assert words.evaluate("x => getComputedStyle(x).fill") == ink
    page.emulate_media(media="print")
    assert colours()[0] == "rgb(255, 255, 255)"
    assert page.pdf(path=tmp_path / "page.pdf")[:4] == b"%PDF"
