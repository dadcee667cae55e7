"""Log densities and draws of common distributions whose dependencies are known without watching each of their operations.

Element i of the result reads element i of the parameters and of the value, where shapes broadcast. All of these densities are differentiable
in what they read. Any other distribution, and any subclass, is watched operation by operation.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch.distributions import Distribution

from pplgrad.pyro._compat import NoMode, only_ours
from pplgrad.pyro._tracing.argument_checks import is_plain_tensor, only_one
from pplgrad.pyro._tracing.callers import may_be_caught
from pplgrad.pyro._tracing.provenance import RANDOM, watching
from pplgrad.pyro._tracing.storage_axes import lined_up

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
    if not only_ours(1):
        return fn.log_prob(value)
    read.append(value)
    with NoMode():
        found = fn.log_prob(value)
        if type(fn) is dist.Categorical:
            logits = read[0]
            follows = [(logits, lined_up(logits.shape[:-1], found.shape)), (value, lined_up(value.shape, found.shape))]
            watcher.combined(found, follows)
        else:
            watcher.result(found, read, watcher.of_these(read))
    return found


def _is_plain(value: torch.Tensor) -> bool:
    """Return whether a categorical value is not converted: a conversion cuts the derivative of what it was computed from."""
    return value.dtype == torch.int64 and not hasattr(value, "_pyro_categorical_support")


_OF_DRAWS = tuple(
    (vars(where), name, vars(where)[name])
    for where, names in (
        (TorchDistributionMixin, "__call__"),
        (Distribution, "_extended_shape"),
        (torch.distributions.Bernoulli, "sample probs"),
        (torch.distributions.Independent, "sample has_rsample"),
        (torch.distributions.bernoulli, "logits_to_probs"),
        (torch, "bernoulli sigmoid no_grad"),
    )
    for name in names.split()
)
"""What draws a Bernoulli value: another function in the place of one of these is not known."""


def draw(fn: Any) -> torch.Tensor | None:
    """Return a draw of a site, and let whoever watches know what it reads; None where it is to be watched.

    Element i of a Bernoulli draw reads element i of the parameter; so do the probabilities that are computed when they are first read.
    """
    watcher, law = only_one(watching()), fn
    while type(law) is dist.Independent:
        law = law.base_dist
    if watcher is None or type(law) is not dist.Bernoulli or fn.has_rsample or not _is_as_known(fn, law):
        return None
    held = vars(law)
    name = "probs" if "probs" in held else "logits"
    given = held.get(name)
    if not is_plain_tensor(given) or not only_ours(1):
        return None
    with torch._C.DisableTorchFunction():
        bits = watcher.read([given], False)
    if bits is None or (bits and may_be_caught(2)):
        return None
    try:
        with NoMode():
            value = fn()
    except Exception:
        watcher.escape(bits)  # Whoever catches it knows something of the probabilities.
        raise
    with torch._C.DisableTorchFunction():
        if name == "logits":
            watcher.result(law.probs, [given], bits)
        watcher.result(value, [law.probs], bits | RANDOM)
    return value


def _is_as_known(fn: Any, law: Any) -> bool:
    """Return whether a distribution draws by torch's own code, as do those around it."""
    for kind in {type(fn), type(law)}:
        if any(name in vars(kind) for name in ("__call__", "sample", "probs", "_extended_shape")):
            return False
    if "sample" in vars(law) or "sample" in vars(fn):
        return False
    return all(names.get(name) is known for names, name, known in _OF_DRAWS)
