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

from pplgrad.pyro._compat import WithoutDispatch, WithoutFunctions, only_ours
from pplgrad.pyro._tracing.argument_checks import is_plain_tensor, only_one
from pplgrad.pyro._tracing.axis_rules import Follows
from pplgrad.pyro._tracing.callers import may_be_caught
from pplgrad.pyro._tracing.provenance import RANDOM
from pplgrad.pyro._tracing.storage_axes import lined_up
from pplgrad.pyro._tracing.watchers import watching

_PARAMETERS = {dist.Bernoulli: ("logits",), dist.Normal: ("loc", "scale"), dist.Categorical: ("logits",)}
"""By the exact class: the attributes that its log density reads."""
_METHODS = {law: law.log_prob for law in _PARAMETERS}
"""The densities that are known: another function in their place is not."""
_SUM = torch.distributions.Independent.log_prob
_utils = vars(torch.distributions.independent)
_SUMMED = _utils["_sum_rightmost"]


def log_density(fn: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return `fn.log_prob(value)`, and let whoever watches know what it reads."""
    watcher, law, summed = only_one(watching()), fn, 0
    if watcher is None:
        return fn.log_prob(value, *args, **kwargs)
    while type(law) is dist.Independent and _is_plain_sum(law):
        summed += law.reinterpreted_batch_ndims
        law = law.base_dist
    held, names = vars(law), _PARAMETERS.get(type(law))
    if args or kwargs or names is None or "log_prob" in held or type(law).log_prob is not _METHODS[type(law)]:
        return fn.log_prob(value, *args, **kwargs)
    # What is computed when it is first read is to be kept with a record of what it was computed from.
    lazy = type(law) is dist.Bernoulli and "logits" not in held and is_plain_tensor(held.get("probs"))
    read = [held["probs"]] if lazy else [held.get(name) for name in names]
    if not all(map(is_plain_tensor, (*read, value))) or (type(law) is dist.Categorical and not _is_plain(value)):
        return fn.log_prob(value)
    if not only_ours(1):
        return fn.log_prob(value)
    read.append(value)
    with WithoutFunctions(), WithoutDispatch():
        found = fn.log_prob(value)
        bits = watcher.of_these(read)
        if lazy:
            watcher.result(law.logits, read[:1], watcher.of_these(read[:1]))
        if summed or type(law) is dist.Categorical:
            cuts = [*[summed + (type(law) is dist.Categorical)] * len(names), summed]
            watcher.combined(found, [(x, _lined_up(x, cut, found)) for x, cut in zip(read, cuts, strict=True)])
        else:
            watcher.result(found, read, bits)
    return found


def _is_plain_sum(law: Any) -> bool:
    """Return whether a density is the sum of another one's elements, by torch's own code."""
    return "log_prob" not in vars(law) and type(law).log_prob is _SUM and _utils["_sum_rightmost"] is _SUMMED


def _lined_up(x: torch.Tensor, cut: int, out: torch.Tensor) -> Follows:
    """Line up a tensor with a result at the right, without its last axes, which the result mixes."""
    return lined_up(x.shape[: max(x.dim() - cut, 0)], out.shape)


def _is_plain(value: torch.Tensor) -> bool:
    """Return whether a categorical value is not converted: a conversion cuts the derivative of what it was computed from."""
    return value.dtype == torch.int64 and not hasattr(value, "_pyro_categorical_support")


_OF_DRAWS = [
    (vars(where).get, name, vars(where).get(name))
    for where, names in (
        (dist.Bernoulli, "probs"),
        (torch.distributions.Bernoulli, "probs"),
        (torch.distributions.Independent, "has_rsample"),
        (torch.distributions.bernoulli, "logits_to_probs"),
        (torch, "bernoulli sigmoid no_grad"),
    )
    for name in names.split()
]
_CALL, _SHAPE = TorchDistributionMixin.__call__, Distribution._extended_shape
_SAMPLE, _SAMPLES = dist.Bernoulli.sample, dist.Independent.sample
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
    with WithoutFunctions():
        bits = watcher.read([given], False)
    if bits is None or (bits and may_be_caught(2)):
        return None
    try:
        with WithoutFunctions(), WithoutDispatch():
            value = fn()
    except Exception:
        watcher.escape(bits)  # Whoever catches it knows something of the probabilities.
        raise
    with WithoutFunctions():
        if name == "logits":
            watcher.result(law.probs, [given], bits)
        watcher.result(value, [law.probs], bits | RANDOM)
    return value


def _is_as_known(fn: Any, law: Any) -> bool:
    """Return whether a distribution draws by torch's own code, as do those around it."""
    kind = type(law)
    if kind.__call__ is not _CALL or kind.sample is not _SAMPLE or kind._extended_shape is not _SHAPE:
        return False
    if fn is not law and (type(fn).__call__ is not _CALL or type(fn).sample is not _SAMPLES):
        return False
    for find, name, known in _OF_DRAWS:
        if find(name) is not known:
            return False
    return "sample" not in vars(law) and "sample" not in vars(fn)
