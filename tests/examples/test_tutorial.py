"""The tutorial runs block by block, and prints what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
PAIRS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
NUMBER = r"-?\d+\.?\d*"


def test_every_block_says_what_it_prints():
    assert len(PAIRS) == PAGE.count("```python") == PAGE.count("```text") >= 8


@pytest.mark.slow
def test_blocks(capsys):
    """Words are the same, and numbers within a twentieth, or four hundredths."""
    import pyro

    scope, printed = {}, []
    for block, text in PAIRS:
        exec(block, scope)
        found = capsys.readouterr().out
        printed.append((found, text))
    pyro.clear_param_store()
    for found, text in printed:
        # Blanks stand where NumPy aligns a sign.
        words = [re.sub(r"\s+", " ", re.sub(NUMBER, "#", x)).replace("[ ", "[") for x in (found, text)]
        assert words[0] == words[1]
        numbers = [[float(n) for n in re.findall(NUMBER, x)] for x in (found, text)]
        np.testing.assert_allclose(*numbers, rtol=0.05, atol=0.04)
    # What the page claims, besides: DisARM is the better one, and both libraries agree.
    reached = [float(n) for found, _ in printed[-3:] for n in re.findall(r"(-[\d.]+)(?: after)", found)]
    pyro_after, numpyro_after, plain = reached
    assert abs(pyro_after - numpyro_after) < 1 and plain < numpyro_after - 2
    np.testing.assert_allclose(
        scope["exact"], scope["chances"] * (scope["rewards"] - scope["chances"] @ scope["rewards"])
    )
