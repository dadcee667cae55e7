"""Two optimizers in one: the user's for the program, another for learned baselines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro
import torch

from pplgrad.pyro._baselines import is_baseline_param


class SplitOptimizer:
    """A Pyro optimizer that gives the parameters of learned baselines to an optimizer of their own."""

    def __init__(self, main: Any, baseline: Any) -> None:
        self.main = main
        self.baseline = baseline

    def __call__(self, params: Iterable[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        """Make one step on the parameters, each with its own optimizer."""
        store = pyro.get_param_store()
        groups: tuple[list, list] = ([], [])
        for param in params:
            groups[is_baseline_param(store.param_name(param) or "")].append(param)
        self.main(groups[0], *args, **kwargs)
        self.baseline(groups[1], *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the learning-rate schedulers of both, where they are schedulers."""
        for optimizer in (self.main, self.baseline):
            if hasattr(optimizer, "step"):
                optimizer.step(*args, **kwargs)

    def get_state(self) -> dict:
        """Return the states of both, by parameter name."""
        return {**self.main.get_state(), **self.baseline.get_state()}

    def set_state(self, state_dict: dict) -> None:
        """Restore what `get_state` returned."""
        self.main.set_state({k: v for k, v in state_dict.items() if not is_baseline_param(k)})
        self.baseline.set_state({k: v for k, v in state_dict.items() if is_baseline_param(k)})

    def save(self, filename: str) -> None:
        """Save the states to a file."""
        with open(filename, "wb") as file:
            torch.save(self.get_state(), file)

    def load(self, filename: str, map_location: Any = None) -> None:
        """Load the states from a file."""
        with open(filename, "rb") as file:
            self.set_state(torch.load(file, map_location=map_location, weights_only=False))


def split_optimizer(main: Any, baseline: Any) -> SplitOptimizer:
    """Return an optimizer that trains learned baselines with `baseline` and everything else with `main`.

    Both are Pyro optimizers. Gradient clipping by a global norm stays within each of the two.

    >>> from pyro.optim import Adam
    >>> optimizer = split_optimizer(Adam({"lr": 1e-3}), Adam({"lr": 1e-2}))
    >>> sorted(vars(optimizer))
    ['baseline', 'main']

    Source: Mnih and Gregor (2014), section 2.6, train the baseline with a learning rate of its own.
    """
    return SplitOptimizer(main, baseline)
