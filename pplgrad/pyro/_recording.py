"""Whether a step is being recorded to be compiled: what the rest of the plug-in needs to know of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pplgrad.errors import CompileError


class Records(Protocol):
    """What records a step."""

    def forget_generators(self) -> None:
        """Accept the generators' states as they are."""


recorders: list[Records] = []
"""The active recorders."""


@contextmanager
def moved_generators() -> Iterator[None]:
    """Tell the active recorders that generators are put into another state here, and that other random numbers would be as good."""
    yield
    for recorder in recorders:
        recorder.forget_generators()


def is_recording() -> bool:
    """Return whether a step is being recorded."""
    return bool(recorders)


def reading_refused(line: str) -> CompileError:
    """Return the error for a program whose Python code reads a tensor's value."""
    return CompileError(
        f"The step cannot be compiled, because Python reads the value of a tensor at {line} (item(), bool(), an if); write "
        'it with torch operations such as torch.where, or use compile=False (compile="fallback" does so by itself).'
    )
