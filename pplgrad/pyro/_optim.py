"""Two optimizers in one: the user's for the program, another for learned baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim

from pplgrad.pyro._baselines import is_baseline_param


class SplitOptimizer(PyroOptim):
    """A Pyro optimizer that makes the torch optimizers of some parameters, of learned baselines by default, as another one would."""

    def __init__(
        self, main: PyroOptim, baseline: PyroOptim, belongs: Callable[[str], bool] = is_baseline_param
    ) -> None:
        super().__init__(main.pt_optim_constructor, main.pt_optim_args, main.pt_clip_args)
        self.main = main
        self.baseline = baseline
        self._belongs = belongs

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the learning-rate schedulers, where the optimizers are schedulers."""
        for made in self.optim_objs.values():
            if isinstance(made, torch.optim.lr_scheduler.LRScheduler):
                made.step(*args, **kwargs)

    def _owner(self, param: Any) -> PyroOptim:
        name = pyro.get_param_store().param_name(param) or ""
        return self.baseline if self._belongs(name) else self.main

    def _get_optim(self, param: Any) -> Any:
        return self._owner(param)._get_optim(param)

    def _get_grad_clip(self, param: Any) -> Any:
        return self._owner(param)._get_grad_clip(param)


def split_optimizer(main: PyroOptim, baseline: PyroOptim) -> PyroOptim:
    """Return an optimizer that trains learned baselines with `baseline` and everything else with `main`.

    Both are Pyro optimizers, or Pyro learning-rate schedulers. Clipping is each one's own, parameter by parameter, as in
    Pyro. Estimates nothing; shapes are those of the parameters.

    Raises `AttributeError` if one of them is not a Pyro optimizer.

    >>> from pyro.optim import Adam
    >>> optimizer = split_optimizer(Adam({"lr": 1e-3}), Adam({"lr": 1e-2}))
    >>> optimizer.baseline.pt_optim_args
    {'lr': 0.01}

    Source: Mnih and Gregor (2014), section 2.6, where the baseline has a learning rate of its own.
    """
    return SplitOptimizer(main, baseline)
