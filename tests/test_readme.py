"""The README's examples run as they stand, and it reads the same on PyPI as in a checkout."""

import re
from pathlib import Path

import pyro
import pytest

import pplgrad

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=["pyro", "numpyro"])
def test_example(block):
    pyro.clear_param_store()
    scope = {}
    exec(block, scope)
    if "result" in scope:
        assert scope["result"].losses[-20:].mean() < scope["result"].losses[:20].mean()
    else:
        assert sum(scope["losses"][-20:]) < sum(scope["losses"][:20])
    pyro.clear_param_store()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_nothing_in_it_needs_a_checkout_to_be_shown():
    """PyPI resolves no relative link and shows no picture of the checkout: the README has none of either."""
    targets = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"(?:src|href)=[\"']([^\"']+)", README)
    assert all(target.startswith(("https://", "#")) for target in targets), targets
    assert 'readme = "README.md"' in (ROOT / "pyproject.toml").read_text()


def test_the_files_that_it_names_exist():
    found = re.findall(r"`((?:docs|examples|models)/[\w/]+\.\w+|[A-Z]+\.md)`", README)
    found += re.findall(r"python (examples/\w+\.py)", README)
    assert len(found) >= 6
    assert all((ROOT / path).exists() for path in found)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{goal}: " in makefile for goal in re.findall(r"make ([a-z]\w*)", README))


def test_the_chooser_has_ten_rows_of_estimators_that_exist():
    (table,) = re.findall(r"\| the site \| use \|\n\|---\|---\|\n(.*?)\n\n", README, re.DOTALL)
    assert len(table.splitlines()) == 10
    names = set(re.findall(r"`([A-Z]\w+)\(", table))
    assert len(names) >= 10 and all(hasattr(pplgrad, name) for name in names)


def test_the_picture_is_that_of_the_results():
    """Each number of the README's picture stands in the table that `make variance` made."""
    (picture,) = re.findall(r"```\n(LocalExpectation.*?)\n```", README, re.DOTALL)
    results = (ROOT / "docs" / "results.md").read_text()
    for line in picture.splitlines():
        number = re.findall(r"([\d.,]+)\s+█", line)[0]
        assert f"| {number} |" in results, line
