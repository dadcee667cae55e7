"""Optuna's choice of a relaxation runs small, prunes, and leaves its picture."""

import re

import pytest

from tests.examples.stories import shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_it_runs_and_prunes(backend, tmp_path):
    pytest.importorskip("optuna")
    text = shown("optuna_relaxations", tmp_path / "a.png", "--backend", backend, "--steps", 40, "--trials", 5, DRAWS=4)
    pruned, whole = re.search(r"(\d+) of (\d+) trials were pruned", text).groups()
    rows = re.findall(r"^(?:REBAR|GumbelSoftmax) +([\d.]+) +([\d.e-]+) +([\d.]+) +([\d.e+-]+)$", text, re.MULTILINE)
    assert whole == "5" and int(pruned) >= 1 and len(rows) == 5 - int(pruned)
    losses = [float(row[2]) for row in rows]
    assert losses == sorted(losses) and losses[0] < 45 < 64 and all(float(row[3]) > 0 for row in rows)
