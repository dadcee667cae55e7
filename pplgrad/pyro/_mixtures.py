"""Pyro's mixtures as the estimators see them: weights, locations and scales."""

from __future__ import annotations

from typing import Any

import torch
from pyro import distributions as dist
from torch import distributions as plain

from pplgrad.core.mixtures import Components, Mixture
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._distributions import innermost, unmasked

_LAWS: dict[type, tuple[str, bool]] = {
    **{getattr(dist, law): (law, False) for law in ("Normal", "Laplace", "Logistic", "Gumbel", "Cauchy")},
    **{getattr(plain, law): (law, False) for law in ("Normal", "Laplace", "Gumbel", "Cauchy")},
    dist.LogNormal: ("Normal", True),
    plain.LogNormal: ("Normal", True),
}
_CORRELATED = (dist.MultivariateNormal, plain.MultivariateNormal)


def mixture(fn: Any, value: torch.Tensor) -> Mixture:
    """Return the mixture that a value was drawn from; `components` has said that it is one."""
    base = _mixture(fn)
    log_weights = torch.log_softmax(base.mixture_distribution.logits, -1)
    return Mixture.of(OPS, value, log_weights, (_located(base.component_distribution),), len(base.event_shape))


def components(fn: Any) -> tuple[int, bool] | None:
    """Return the number of components of a mixture, and whether the entries of each are independent; None for other laws."""
    base = _mixture(fn)
    if type(base) not in (dist.MixtureSameFamily, plain.MixtureSameFamily):
        return None
    whole = base.component_distribution
    inner = innermost(whole)
    if type(inner) in _CORRELATED:
        return (whole.batch_shape[-1], False) if len(whole.event_shape) == 1 else None
    return (whole.batch_shape[-1], True) if type(inner) in _LAWS else None


def _mixture(fn: Any) -> Any:
    return innermost(unmasked(fn))


def _located(whole: Any) -> Components:
    inner, shape = innermost(whole), whole.batch_shape + whole.event_shape
    if type(inner) in _CORRELATED:
        scale = inner.scale_tril.expand(*shape, shape[-1])
        return Components("Normal", inner.loc.expand(shape), scale, correlated=True)
    law, of_log = _LAWS[type(inner)]
    return Components(law, inner.loc.expand(shape), inner.scale.expand(shape), of_log)
