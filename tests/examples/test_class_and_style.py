"""Clusters without labels that agree with the labels, and a style that the class does not say."""

import re

import pytest

from tests.examples.stories import shown


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_clusters_agree_with_the_labels(backend, tmp_path):
    text = shown("class_and_style", tmp_path / "a.png", "--backend", backend, "--steps", 500)
    bound, alone = (
        float(x) for x in re.search(r"image: (-[\d.]+) nats \(independent pixels: (-[\d.]+)\)", text).groups()
    )
    rand = float(re.search(r"Rand index\): ([\d.]+)", text)[1])
    style = float(re.search(r"within a class: ([\d.]+)", text)[1])
    # Independent pixels have a closed form. Chance is a Rand index of 0.
    assert alone == pytest.approx(-25.12, abs=0.01) and bound > alone + 5 and rand > 0.25 and style > 0.02
