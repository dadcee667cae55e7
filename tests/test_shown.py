"""What a notebook and a prompt show of descriptions, certificates, choices and ELBOs."""

import importlib
from html.parser import HTMLParser

import numpy as np
import pytest

from pplgrad import IWAE, DisARM, ScoreFunction
from pplgrad.diagnostics.certificate import Reference, certify
from pplgrad.diagnostics.choosing import Choice
from pplgrad.engine.description import COLUMNS, Description

ROW = {
    "site": "z<1>",
    "distribution": "Bernoulli",
    "plates": "data",
    "estimator": "ScoreFunction()",
    "baseline": "NeuralBaseline(inputs=<function inputs at 0x7f>)",
    "evaluations": 0,
    "reason": "config_estimators(guide, {'z*': ...}), the pattern that fits",
}


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.cells, self.lines, self._into = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._into = self.cells if tag in ("td", "th") else self.lines if tag == "p" else None
        if self._into is not None:
            self._into.append("")

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data


def test_a_description_as_html_has_every_cell():
    found = Cells(Description([ROW])._repr_html_())
    assert found.cells == [*COLUMNS, *(str(ROW[name]) for name in COLUMNS)]


@pytest.mark.parametrize("width", [40, 80, 110, 200])
def test_a_description_fits_the_terminal_and_cuts_nothing(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(Description([ROW, {**ROW, "site": "w"}]))
    words = text.split()
    for value in ROW.values():
        assert all(word in words or f"{word};" in words for word in str(value).split()), value
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width


def test_a_certificate_and_a_choice_as_html():
    def draws(count, seed):
        yield np.random.default_rng(seed).normal(1.0, 0.1, (count, 1))

    numbers = {"count": 1000, "level": 0.01, "tolerance": 0.05, "rounding": 1e-9, "seed": 0}
    check = certify(
        "a<b>", draws, Reference("the exact gradient", exact=np.ones(1)), {("site", "z"): np.arange(1)}, **numbers
    )
    found = Cells(check._repr_html_())
    assert found.cells == [cell for row in check.table() for cell in row] and found.lines[0].startswith("a<b>: ")
    row = {"estimators": "z=DisARM()", "draws": 40, "variance": 1.0, "ms": 0.5, "variance × ms": 0.5, "note": ""}
    choice = Choice({"z": DisARM()}, 0.99, 2.0, (row,))
    found = Cells(choice._repr_html_())
    assert found.cells == [cell for line in choice.lines() for cell in line] and choice.code in found.lines


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_an_elbo_shows_what_differs_from_the_defaults(backend):
    elbo = importlib.import_module(f"pplgrad.{backend}").TraceGrad_ELBO
    assert repr(elbo()) == "TraceGrad_ELBO()"
    one = elbo(
        num_particles=4, estimators={"z": ScoreFunction()}, objective=IWAE(), higher_order=False, closed_form=None
    )
    assert (
        repr(one) == f"TraceGrad_ELBO(num_particles=4, estimators={{'z': {ScoreFunction()!r}}}, objective={IWAE()!r})"
    )
    assert Cells(one._repr_html_()).cells[2:4] == ["num_particles", "4"]
    special = {"compile": True} if backend == "pyro" else {"fuse": False}
    assert repr(elbo(**special)) == f"TraceGrad_ELBO({next(iter(special))}={next(iter(special.values()))})"
