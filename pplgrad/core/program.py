"""A program: what an ELBO is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Program(NamedTuple):
    """A model and a guide, and the arguments with which both are called."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple
    kwargs: Mapping[str, Any]
