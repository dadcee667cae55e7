"""Pyro optimizers that update many parameters in one call, or that use a second optimizer for learned baselines."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.dct_adam import DCTAdam
from pyro.optim.optim import is_scheduler

from pplgrad.pyro._baselines import is_baseline_param
from pplgrad.pyro._compat import loaded_state

_TORCHS = "Adadelta Adagrad Adam Adamax AdamW ASGD NAdam RAdam RMSprop Rprop SGD"
_SEPARABLE = {*(getattr(torch.optim, name) for name in _TORCHS.split()), AdagradRMSProp, ClippedAdam, DCTAdam}
"""Optimizers that treat each parameter as if it were alone."""


class JointOptimizer(PyroOptim):
    """A Pyro optimizer that makes a torch optimizer for each parameter, as another one would, and lets one do the work of all its like."""

    def __init__(self, main: PyroOptim) -> None:
        super().__init__(main.pt_optim_constructor, main.pt_optim_args, main.pt_clip_args)
        self.main = main
        self._groups: list[_Group] = []
        self._grouped: frozenset = frozenset()

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        known = frozenset(p for p in params if p in self.optim_objs)
        super().__call__([p for p in params if p not in known], *args, **kwargs)
        if args or kwargs:
            super().__call__(list(known), *args, **kwargs)
            return
        for p in known:
            if self.grad_clip[p] is not None:
                self.grad_clip[p](p)
        if known != self._grouped or not all(group.holds() for group in self._groups):
            self._groups, self._grouped = _groups([_torch_optimizer(self.optim_objs[p]) for p in known]), known
        for group in self._groups:
            group.step()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the learning-rate schedulers, where the optimizers are schedulers."""
        for made in self.optim_objs.values():
            if isinstance(made, torch.optim.lr_scheduler.LRScheduler):
                made.step(*args, **kwargs)

    def _owner(self, param: Any) -> PyroOptim:
        return self.main

    def _get_optim(self, param: Any) -> Any:
        return self._owner(param)._get_optim(param)

    def _get_grad_clip(self, param: Any) -> Any:
        return self._owner(param)._get_grad_clip(param)


class _Group:
    """Optimizers of one parameter each that have the same options, and one of all their parameters that shares their states."""

    def __init__(self, single: list[torch.optim.Optimizer]) -> None:
        self._single = single
        self._groups = [optimizer.param_groups[0] for optimizer in single]
        self._joint = single[0]
        if len(single) > 1:
            params = [p for group in self._groups for p in group["params"]]
            states = (optimizer.state for optimizer in single)
            self._joint = copy.copy(single[0])
            self._joint.param_groups = [{**self._groups[0], "params": params}]
            self._joint.state = defaultdict(dict, {p: state[p] for p, state in zip(params, states, strict=True)})
        self._note()

    def _note(self) -> None:
        """Note the options as they are."""
        self._before = [dict(group) for group in self._groups]
        self._joint_before = dict(self._joint.param_groups[0])

    def holds(self) -> bool:
        """Return whether each optimizer still has the options that it had: a scheduler or a loaded state changes them."""
        return all(
            optimizer.param_groups[0] is group and group == before
            for optimizer, group, before in zip(self._single, self._groups, self._before, strict=True)
        )

    def step(self) -> None:
        """Update all parameters."""
        self._joint.step()
        if self._joint.param_groups[0] != self._joint_before:
            # Some optimizers change their own rate as they go.
            options = _options(self._joint)
            for group in self._groups:
                group.update(options)
            self._note()


def _groups(optimizers: list[torch.optim.Optimizer]) -> list[_Group]:
    """Return the optimizers in groups of equal ones; each alone whose parameters must not be updated together."""
    found: list[list[torch.optim.Optimizer]] = []
    for optimizer in optimizers:
        like = (
            several
            for several in found
            if type(optimizer) in _SEPARABLE
            and type(several[0]) is type(optimizer)
            and _options(several[0]) == _options(optimizer)
        )
        several = next(like, None)
        if several is None:
            found.append([optimizer])
        else:
            several.append(optimizer)
    return [_Group(several) for several in found]


def _torch_optimizer(made: Any) -> torch.optim.Optimizer:
    return made.optimizer if is_scheduler(made) else made


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's options: what it has beside its parameters."""
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


class SplitOptimizer(JointOptimizer):
    """A joint optimizer that makes the torch optimizers of some parameters, of learned baselines by default, as another one would."""

    def __init__(
        self, main: PyroOptim, baseline: PyroOptim, belongs: Callable[[str], bool] = is_baseline_param
    ) -> None:
        super().__init__(main)
        self.baseline = baseline
        self._belongs = belongs

    def _owner(self, param: Any) -> PyroOptim:
        name = pyro.get_param_store().param_name(param) or ""
        return self.baseline if self._belongs(name) else self.main


def joint_optimizer(optimizer: PyroOptim) -> PyroOptim:
    """Return a Pyro optimizer that does what `optimizer` does, with one torch call for all parameters that have the same options.

    Pyro makes one torch optimizer for each parameter and calls them one after the other. That takes longer than a small compiled step,
    and starts separate kernels for each parameter on a GPU. The returned optimizer holds the same torch optimizers, with their own
    states, schedulers and clipping, and updates those with equal options at once. A torch optimizer that is not known to treat parameters
    one by one (`LBFGS`) is called singly. It estimates nothing.

    Args:
        optimizer: an optimizer of `pyro.optim`.

    Returns:
        A Pyro optimizer.

    Shapes:
        Those of the parameters.

    Raises:
        TypeError: `optimizer` is not a Pyro optimizer.

    Example:
        >>> from pyro.optim import Adam
        >>> joint_optimizer(Adam({"lr": 1e-3})).pt_optim_args
        {'lr': 0.001}

    References:
        None. The arithmetic is torch's own, over several tensors at once.
    """
    if not isinstance(optimizer, PyroOptim):
        raise TypeError(f"joint_optimizer takes an optimizer of pyro.optim; got {type(optimizer).__name__}.")
    joint = JointOptimizer(optimizer)
    joint.optim_objs, joint.grad_clip = optimizer.optim_objs, optimizer.grad_clip
    joint.set_state(loaded_state(optimizer))
    return joint


def split_optimizer(
    main: PyroOptim, baseline: PyroOptim, *, belongs: Callable[[str], bool] = is_baseline_param
) -> PyroOptim:
    """Return an optimizer that trains learned baselines with `baseline` and everything else with `main`.

    Clipping is that of each optimizer, parameter by parameter, as in Pyro. Parameters with the same options are updated at once
    (`joint_optimizer`). It estimates nothing.

    Args:
        main: a Pyro optimizer or a Pyro learning-rate scheduler, for the program's parameters.
        baseline: the same, for the parameters of learned baselines.
        belongs: function from a parameter's name to whether `baseline` trains it. Default: `is_baseline_param`.

    Returns:
        A Pyro optimizer.

    Shapes:
        Those of the parameters.

    Raises:
        AttributeError: one of them is not a Pyro optimizer.

    Example:
        >>> from pyro.optim import Adam
        >>> optimizer = split_optimizer(Adam({"lr": 1e-3}), Adam({"lr": 1e-2}))
        >>> optimizer.baseline.pt_optim_args
        {'lr': 0.01}

    References:
        Mnih and Gregor (2014), section 2.6, where the baseline has a learning rate of its own.
    """
    return SplitOptimizer(main, baseline, belongs)
