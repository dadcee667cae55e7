"""A program: what an ELBO is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Program(NamedTuple):
    """A model and a guide, and the arguments with which both are called."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Proposed:
    """A guide whose sites take the draws of another program, both called with the same arguments."""

    guide: Callable[..., Any]
    proposal: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide with its own draws."""
        return self.guide(*args, **kwargs)
