"""The README's examples run as they stand."""

import re
from pathlib import Path

import pyro
import pytest

from pplgrad.estimators import registry

README = (Path(__file__).parents[1] / "README.md").read_text()
# Those that stand by themselves; the others are parts of a program.
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import SVI" in block]


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


def test_no_placeholder_is_left():
    assert "RESULTS\n" not in README and "BENCH\n" not in README
    for link in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link


def test_the_table_of_estimators_is_current():
    (found,) = re.findall(r"<!-- pplgrad estimators -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert found == registry.markdown(), "put the output of `pplgrad estimators --format markdown` there"
