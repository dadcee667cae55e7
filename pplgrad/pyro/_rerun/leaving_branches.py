"""The ways out of torch in branches that are followed from the draw: what is read there is that of the draw in all branches.

An operation is followed by the tensors that it takes. A tensor that has gone through NumPy, a list, or a storage is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pplgrad.pyro._tracing.escapes import Leaving
from pplgrad.pyro._tracing.operations import tensors_in


class Departures:
    """What `Leaving` asks and says where branches are followed (`escapes.Followed`): there is one draw, and nothing may leave."""

    def __init__(self, is_followed: Callable[[torch.Tensor], bool], stop: Callable[[], None]) -> None:
        self._is_followed, self._stop = is_followed, stop

    def of(self, *trees: Any) -> int:
        """Return whether a tensor in nested containers is followed."""
        return int(any(self._is_followed(x) for x in tensors_in(trees)))

    def forget(self, tensor: torch.Tensor) -> None:
        """Give up a tensor whose elements are replaced; one that is given followed elements is known by its storage."""
        if self._is_followed(tensor):
            self._stop()

    def expose(self, tensor: torch.Tensor) -> None:
        """Nothing more than `escape` says."""

    def is_innocent(self, bits: int, tree: Any) -> bool:
        """Return whether a number may be read: an operation did it, and was compared in all branches."""
        return True

    def escape(self, bits: int) -> None:
        """Give up branches of which something left torch."""
        if bits:
            self._stop()

    def mix(self, tensors: list[torch.Tensor], bits: int) -> None:
        """Nothing more than `escape` says."""

    def sized(self, tensor: Any) -> None:
        """A size is that of the draw in all branches."""


def leaving(is_followed: Callable[[torch.Tensor], bool], stop: Callable[[], None]) -> Leaving:
    """Return what calls `stop` where a followed tensor leaves torch."""
    return Leaving(Departures(is_followed, stop), {})  # type: ignore[arg-type]
