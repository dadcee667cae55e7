"""All that a recorded step was computed from: its guard, and how to find the tensors again that it read."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Any

import numpy as np
import torch

from pplgrad.pyro._guards import Guard, is_library

Read = Callable[[], Any]

_NUMBERS = (bool, int, float, str)
# What these hold decides what a step computes, and may be changed between steps.
_SPECIFYING = ("torch.nn", "torch.distributions", "pyro.distributions", "pyro.nn", "pyro.poutine", "pplgrad")
# These change at every step, and decide nothing.
_CHANGING = ("Watcher", "TraceMessenger", "Trace")


class Reach(Guard):
    """A guard that also sees numbers in libraries' objects and whole arrays, and remembers where tensors are held.

    A graph has numbers of Python in it that the dependency structure does not: the rate of a dropout, the elements of a
    large array.
    """

    def __init__(self, *roots: Any) -> None:
        self.held: list[tuple[torch.Tensor, Read]] = []
        super().__init__(*roots)

    def _watch(self, read: Read) -> None:
        value = read()
        if isinstance(value, torch.Tensor):
            self.held.append((value, read))
        super()._watch(read)

    def _visit(self, value: Any) -> None:
        if type(value).__name__ in _CHANGING and is_library(type(value).__module__):
            return
        if isinstance(value, np.ndarray) and value.nbytes >= 4096 and id(value) not in self._seen:
            self._probes.append((lambda: _digest(value), _digest(value), False))
        super()._visit(value)

    def _visit_object(self, value: Any) -> None:
        super()._visit_object(value)
        if isinstance(value, torch.nn.Module):
            for tensors in (value._parameters, value._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        self.held.append((tensor, partial(tensors.get, name)))
        if type(value).__module__.startswith(_SPECIFYING):
            self._visit_specification(value)

    def _visit_specification(self, value: Any) -> None:
        """Watch numbers and tensors that a library's object holds, and go on into others like it."""
        state = getattr(value, "__dict__", {})
        for name, item in list(state.items()):
            read = partial(state.get, name)
            if isinstance(item, torch.Tensor):
                self.held.append((item, read))
            elif isinstance(item, _NUMBERS):
                self._probes.append((read, item, False))
            elif isinstance(item, torch.distributions.Distribution):
                self._watch(read)
            elif isinstance(item, dict) and not isinstance(value, torch.nn.Module):
                self._visit_members(item, list(item))
            elif isinstance(item, (list, tuple)):
                self._visit_members(item, range(len(item)))
            elif is_library(type(item).__module__):
                self._visit(item)

    def _visit_members(self, container: Any, keys: Any) -> None:
        for key in keys:
            item = container[key]
            read = partial(getitem, container, key)
            if isinstance(item, torch.Tensor):
                self.held.append((item, read))
            elif isinstance(item, _NUMBERS):
                self._probes.append((read, item, False))
            else:
                self._visit(item)


def _digest(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)
