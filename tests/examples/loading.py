"""The parts of the stories, which live outside of any package, for their tests."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """Return a module of examples/, whose neighbours it may import."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return import_module(name)


def program(name: str, backend: str, data: object, **options: object) -> tuple[ModuleType, dict, tuple]:
    """Return a script of models/, its options with some changed, and its program for a library."""
    script = example("_story").model_script(name)
    options = {**script.OPTIONS, **options}
    return script, options, getattr(script, f"{backend}_program")(options, data, 0)
