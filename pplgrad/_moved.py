"""Names that were importable from another module before: they still are, with a warning that says where they live now."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(old: str, *homes: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose names moved to the first of `homes` that has them."""

    def find(name: str) -> Any:
        for home in homes:
            if not name.startswith("__") and hasattr(module := import_module(home), name):
                warnings.warn(
                    f"{old}.{name} is deprecated and will be removed; import {name} from {home}.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find
