"""Clusters without labels that agree with the labels, and a style that the class does not say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

STORY = Path(__file__).parents[2] / "examples" / "class_and_style.py"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_clusters_agree_with_the_labels(backend, tmp_path):
    command = [sys.executable, STORY, "--backend", backend, "--steps", "500", "--out", tmp_path / "a.png"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bound, alone = (
        float(x) for x in re.search(r"image: (-[\d.]+) nats \(independent pixels: (-[\d.]+)\)", shown).groups()
    )
    rand = float(re.search(r"Rand index\): ([\d.]+)", shown)[1])
    style = float(re.search(r"within a class: ([\d.]+)", shown)[1])
    # Independent pixels have a closed form. Chance is a Rand index of 0.
    assert alone == pytest.approx(-25.12, abs=0.01) and bound > alone + 5 and rand > 0.25 and style > 0.02
    assert (tmp_path / "a.png").exists()
