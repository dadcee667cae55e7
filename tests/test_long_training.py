"""The blocks of docs/long_training.md run as they stand, in their order."""

import re
import warnings
from pathlib import Path

import pyro
import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "long_training.md").read_text()
BLOCKS = re.findall(r"```python ?(\w*)\n(.*?)```", PAGE, re.DOTALL)
NEEDS = {"wandb": "wandb", "mlflow": "mlflow", "lightning": "pytorch_lightning"}


def scope_of(tmp_path, monkeypatch, upto):
    """Run the blocks that need nothing, but for those after the number given."""
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    scope = {"checkpoints": tmp_path / "orbax", "__name__": "page"}
    for need, block in BLOCKS[:upto]:
        if not need:
            exec(block, scope)
    return scope


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(tmp_path, monkeypatch):
    scope = scope_of(tmp_path, monkeypatch, len(BLOCKS))
    assert scope["stopping"].stopped
    # Run again, the last block goes on from its checkpoint, at which nothing is left to do.
    assert scope["last"] is None
    exec(BLOCKS[-1][1], scope)
    assert scope["last"] == 3
    pyro.clear_param_store()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("need", NEEDS)
def test_blocks_that_need_more(need, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(NEEDS[need])
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    if need == "mlflow":
        module.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    scope = scope_of(tmp_path, monkeypatch, 1)
    (block,) = [block for found, block in BLOCKS if found == need]
    exec(block, scope)
    if need == "wandb":
        scope["run"].finish()
    elif need == "mlflow":
        module.end_run()
    else:
        assert scope["trainer"].global_step == 4
    pyro.clear_param_store()
