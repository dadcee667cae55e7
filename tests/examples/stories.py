"""Running the stories of examples/ and the programs of models/ inside a test."""

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))


def part(name):
    """Return a module that stories share, such as `_draws`."""
    return importlib.import_module(name)


def model(name):
    """Return a model script."""
    return part("_story").model_script(name)


def story_module(name):
    """Return a story of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(f"story_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(name, out, *words, **constants):
    """Run a story of examples/ as from the command line, and return what it prints; it must leave its picture.

    `constants` of the script are replaced, to make it smaller.
    """
    story = story_module(name)
    for constant, value in constants.items():
        assert hasattr(story, constant)
        setattr(story, constant, value)
    arguments = [*map(str, words), "--out", str(out)]
    result = CliRunner().invoke(story.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and out.stat().st_size > 5000
    return result.stdout


@contextmanager
def double_precision():
    """Compute in float64 in both libraries, and put the switches back."""
    import jax
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        torch.set_default_dtype(before)


def from_ratio(ratio, residual):
    """Return the standard normal e of each draw and the size of its residual.

    `ratio` is that of the scores for log σ and for μ times 1/σ, (e² − 1) / e, which has two roots: the better one counts.
    """
    roots = np.stack([(ratio + sign * np.sqrt(ratio**2 + 4)) / 2 for sign in (1, -1)])
    errors = np.abs(np.stack([residual(root) for root in roots]))
    best = errors.argmin(0)[None]
    return np.take_along_axis(roots, best, 0)[0], np.take_along_axis(errors, best, 0)[0]
