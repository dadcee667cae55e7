"""Parameters made again, after `pyro.clear_param_store()`, from the very tensor that was the parameter before.

Pyro makes the tensor that `pyro.param("a", start)` is given the leaf itself where nothing constrains it. A script that clears the store and
trains anew then finds in `start` the last gradient of the time before, and the first step adds to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pyro
import torch

from pplgrad.errors import PplgradError
from pplgrad.pyro._compat import unconstrained

# By identity, since tensors compare by value. Nothing is kept alive.
_leaves: dict[int, weakref.ref[torch.Tensor]] = {}


@contextmanager
def keeping_params() -> Iterator[None]:
    """Run a program inside; if that is refused, the param store is as it was."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    except PplgradError:
        for name in [name for name in store.keys() if name not in before]:
            del store[name]
        raise
    start_without_gradient(before)


def start_without_gradient(before: Collection[str]) -> None:
    """Drop the gradient of parameters that a run has created (that were not there `before`) from tensors that were parameters before.

    A parameter that is created for the first time keeps what its tensor has of the user's own losses; so does a parameter of a module
    (`torch.nn.Parameter`), which the module's owner clears.
    """
    params = unconstrained()
    for name, leaf in params.items():
        if not _is_known(leaf):
            _note(leaf)
        elif name not in before and not isinstance(leaf, torch.nn.Parameter):
            if not any(leaf is params[other] for other in before if other in params):  # Not one tensor under two names.
                leaf.grad = None


def _is_known(leaf: torch.Tensor) -> bool:
    known = _leaves.get(id(leaf))
    return known is not None and known() is leaf


def _note(leaf: torch.Tensor) -> None:
    key = id(leaf)

    def forget(dead: weakref.ref[torch.Tensor]) -> None:
        # Another tensor may have been noted at the same address since.
        if _leaves.get(key) is dead:
            del _leaves[key]

    _leaves[key] = weakref.ref(leaf, forget)
