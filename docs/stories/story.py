"""Play a story of examples/ inside a notebook, smaller than on the command line."""

import contextlib
import importlib.util
import inspect
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from IPython.display import Code, Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))


def script(name: str) -> ModuleType:
    """Return a story as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def play(name: str, backend: str, steps: int, seed: int = 0, **constants: object) -> Image:
    """Run a story, print what it finds and return its picture; `constants` of the script are replaced, to make it smaller."""
    import matplotlib.pyplot as plt

    story = script(name)
    for constant, value in constants.items():
        assert hasattr(story, constant), constant
        setattr(story, constant, value)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "picture.png"
        with contextlib.redirect_stdout(_WithoutPath(sys.stdout)):
            story.main.callback(backend=backend, steps=steps, seed=seed, out=out)
        plt.close("all")
        return Image(out.read_bytes())


class _WithoutPath:
    """Standard output, but for the line that says where the picture was written."""

    def __init__(self, to: object) -> None:
        self.to = to

    def write(self, text: str) -> int:
        return len(text) if text.startswith("written: ") else self.to.write(text)

    def flush(self) -> None:
        self.to.flush()


def program(model: str) -> Code:
    """Return the source of a model script's program, which is the same for both libraries but for their names."""
    from _story import model_script

    return Code(inspect.getsource(model_script(model).program), language="python")
