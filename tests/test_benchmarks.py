"""The benchmarks run: a command that makes the README's numbers must not have rotted. Nothing here is a time."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "steps": ["--lengths", "3", "--latents", "5", "--seconds", "0.1", "--libraries", "pyro", "numpyro"],
    "watching": ["--seconds", "0.1", "--libraries", "numpyro"],
    "variance": ["--latents", "4", "--stops", "0", "--draws", "4"],
    "training": ["--latents", "4", "--seconds", "0.1", "--libraries", "pyro", "--estimators", "DisARM"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_runs(name, tmp_path):
    out = tmp_path / "out.csv"
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name], "--out", out]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(pd.read_csv(out)) > 0


def test_every_benchmark_is_tested():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == {*SMALL, "__init__"}
