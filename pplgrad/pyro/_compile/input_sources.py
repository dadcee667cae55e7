"""All that a recorded step was computed from: its guard, and how to find the tensors again that it read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pplgrad.pyro._reuse.guards import Guard

Read = Callable[[], Any]


class InputSources(Guard):
    """A guard that also remembers where tensors are held."""

    # A recorded step looks at each parameter that it reads itself.
    reads_shapes = False

    def __init__(self, *roots: Any) -> None:
        self.held: list[tuple[torch.Tensor, Read]] = []
        super().__init__(*roots)

    def _tensor(self, value: torch.Tensor, read: Read) -> None:
        self.held.append((value, read))
        super()._tensor(value, read)
