"""Log densities of common distributions whose dependencies are known without watching each of their operations.

Element i of the result reads element i of the parameters and of the value, where shapes broadcast. All of these densities are differentiable
in what they read. Any other distribution, and any subclass, is watched operation by operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch

from pplgrad.pyro._compat import NoMode
from pplgrad.pyro._tracing.argument_checks import is_plain_tensor, only_one
from pplgrad.pyro._tracing.axis_rules import NONE, Follows
from pplgrad.pyro._tracing.provenance import watching

_PARAMETERS = {dist.Bernoulli: ("logits",), dist.Normal: ("loc", "scale"), dist.Categorical: ("logits",)}
"""By the exact class: the attributes that its log density reads."""
_METHODS = {law: law.log_prob for law in _PARAMETERS}
"""The densities that are known: another function in their place is not."""


def log_density(fn: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return `fn.log_prob(value)`, and let whoever watches know what it reads."""
    watcher, names = only_one(watching()), _PARAMETERS.get(type(fn))
    if args or kwargs or names is None or watcher is None:
        return fn.log_prob(value, *args, **kwargs)
    held = vars(fn)
    if "log_prob" in held or type(fn).log_prob is not _METHODS[type(fn)]:
        return fn.log_prob(value)
    read = [held.get(name) for name in names]
    # What is computed when it is first read would be kept without a record of what it was computed from.
    if not all(map(is_plain_tensor, (*read, value))) or (type(fn) is dist.Categorical and not _is_plain(value)):
        return fn.log_prob(value)
    with NoMode():
        found = fn.log_prob(value)
        events = 1 if type(fn) is dist.Categorical else 0
        follows = [(x, _lined_up(x.shape[: x.dim() - events], found.shape)) for x in read]
        watcher.combined(found, [*follows, (value, _lined_up(value.shape, found.shape))])
    return found


def _is_plain(value: torch.Tensor) -> bool:
    """Return whether a categorical value is not converted: a conversion cuts the derivative of what it was computed from."""
    return value.dtype == torch.int64 and not hasattr(value, "_pyro_categorical_support")


def _lined_up(shape: Sequence[int], out: Sequence[int]) -> Follows:
    """Line up a shape with a result's at the right; an axis of size one is read by all elements."""
    lead = len(out) - len(shape)
    return [axis - lead if axis >= lead and shape[axis - lead] == size else NONE for axis, size in enumerate(out)]
