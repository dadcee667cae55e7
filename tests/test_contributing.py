"""The contributing page, followed to the letter: its estimators are exact in both libraries, and broken they are not."""

import re
from pathlib import Path

import pytest

from pplgrad.testing import gradient_error

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def scope_of(blocks, change=lambda code: code):
    scope = {"__name__": "contributed"}
    for block in blocks:
        exec(change(block), scope)
    return scope


@pytest.mark.slow
def test_the_page_works():
    assert len(BLOCKS) == 3
    scope_of(BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["pyro", "numpyro"])
def test_broken_they_are_caught(library):
    two = BLOCKS[:2]
    half = scope_of(two, lambda code: code.replace("- cost) / (cost.shape[0] - 1)", ") / cost.shape[0]"))
    assert gradient_error(half["HalfLeaveOneOut"](), library, "single", particles=2) > 1e-6
    against = scope_of(two, lambda code: code.replace("terms.downstream - terms.costs[:, 0]", "terms.costs[:, 0]"))
    assert gradient_error(against["AgainstAnother"](), library, "hierarchy") > 1e-6


def test_the_page_names_real_folders():
    for folder in re.findall(r"`((?:pplgrad|models|examples|tests)[\w/]*/)`", PAGE):
        assert (Path(__file__).parents[1] / folder).is_dir(), folder
