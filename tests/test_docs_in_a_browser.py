"""The built site in a real browser, at the widths of a telephone, a tablet and a screen."""

from pathlib import Path

import pytest

from tests.lab.test_page import browser  # noqa: F401

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
pytestmark = pytest.mark.slow
PAGES = [
    "index",
    "choosing",
    "estimators/index",
    "estimators/REBAR",
    "api/pplgrad.pyro",
    "results",
    "speed",
    "stories/lottery",
]


@pytest.mark.parametrize("width", [390, 800, 1300])
def test_a_page_fits_and_needs_no_network(width, browser):  # noqa: F811
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: `make docs`")
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    for name in PAGES:
        page.goto((SITE / f"{name}.html").as_uri())
        beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert (name, beyond, broken, faults) == (name, 0, [], [])
    page.close()
