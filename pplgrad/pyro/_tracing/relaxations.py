"""Discrete distributions extended linearly to weights of their categories, and the draws that are replaced by weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, Independent, MaskedDistribution, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch.distributions import Independent as TorchIndependent
from torch.distributions import constraints

from pplgrad.core.array_ops import linear_density, pair_density
from pplgrad.core.estimator import Estimator
from pplgrad.core.noise import noise_for
from pplgrad.engine.checks import undefined_when_relaxed
from pplgrad.estimators.count_relaxations import SMOOTH, HardCount, TruncatedGumbelSoftmax
from pplgrad.estimators.relaxed import HardDraw, HardPair, Relaxation, softmax, tempered
from pplgrad.estimators.subset_relaxations import HardSubset, SubsetRelaxation
from pplgrad.pyro._array_ops import OPS, TorchNoise
from pplgrad.pyro._distributions import (
    counted_parts,
    counts,
    every_log_prob,
    family,
    innermost,
    is_bernoulli,
    is_matrix,
    is_relaxable,
    is_subset,
    log_odds,
    unmasked,
)
from pplgrad.pyro._structures import PermutationMatrix, Subset


class Extended(TorchDistribution):
    """A Bernoulli or one-hot distribution whose log density is linear in the weights of the categories.

    log q(w) = Σ_c w_c log q(c): the density itself at hard values. A Bernoulli's value is the weight of 1.
    """

    arg_constraints: dict = {}
    has_rsample = True

    def __init__(self, fn: Any) -> None:
        self._bare = unmasked(fn)
        self._masks = list(_masks_of(fn))
        base = self._bare
        self._reinterpreted = 0
        while isinstance(base, TorchIndependent):
            self._reinterpreted += base.reinterpreted_batch_ndims
            base = base.base_dist
        self._base = base
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        return constraints.independent(constraints.unit_interval, self.event_dim)

    @property
    def element_shape(self) -> torch.Size:
        """The shape of the value of one element: nothing, or that of a one-hot vector."""
        return self._base.event_shape

    def categories(self) -> torch.Tensor:
        """Return the log probabilities of an element's categories, (*batch, *elements, categories)."""
        parts = counted_parts(self._base)
        assert parts is not None
        return every_log_prob(*parts).expand(*parts[0].batch_shape, -1)

    def odds(self) -> torch.Tensor | None:
        """Return the log odds of 1 of a Bernoulli, (*batch, *elements); None for others."""
        return log_odds(self._base) if is_bernoulli(self._base) else None

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        odds = self.odds()
        if odds is not None:
            total = pair_density(OPS, value, odds)
        else:
            total = linear_density(OPS.xp, value, self.categories(), not self._base.event_shape)
        for mask, elements in self._masks:
            total = torch.where(mask.reshape(*mask.shape, *(1,) * elements), total, torch.zeros_like(total))
        return total.sum(tuple(range(-self._reinterpreted, 0))) if self._reinterpreted else total

    def rsample(self, sample_shape: Any = ()) -> torch.Tensor:
        return self._bare.sample(sample_shape)


class UncheckedSubset(Subset):
    """A `Subset` whose draw is close to a binary vector, and carries a gradient: its log density is linear in it."""

    has_rsample = True

    def __init__(self, k: int, logits: torch.Tensor) -> None:
        super().__init__(k, logits, validate_args=False)


class UncheckedMatrix(PermutationMatrix):
    """A `PermutationMatrix` whose rows are weights, and carry a gradient."""

    has_rsample = True

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(logits, validate_args=False)


def unchecked(fn: Any) -> Any:
    """Return a distribution over subsets or matrices that takes relaxed ones, with the masks and shapes around it."""
    if isinstance(fn, MaskedDistribution):
        return unchecked(fn.base_dist).mask(fn._mask)
    if isinstance(fn, TorchIndependent):
        return Independent(unchecked(fn.base_dist), fn.reinterpreted_batch_ndims, validate_args=False)
    if isinstance(fn, ExpandedDistribution):
        return unchecked(fn.base_dist).expand(fn.batch_shape)
    return UncheckedMatrix(fn.logits) if isinstance(fn, PermutationMatrix) else UncheckedSubset(fn.k, fn.logits)


def is_unchecked(fn: Any) -> bool:
    """Return whether a distribution is a relaxed `Subset`."""
    return isinstance(innermost(unmasked(fn)), UncheckedSubset)


def is_relaxed_matrix(fn: Any) -> bool:
    """Return whether a distribution is a relaxed `PermutationMatrix`."""
    return isinstance(innermost(unmasked(fn)), UncheckedMatrix)


class RelaxedCount(TorchDistribution):
    """A law of counts at numbers between them: the host's formula of its log density, which is not asked for its support.

    `fits` says of each element whether its draw can be relaxed; elsewhere the density is NaN.
    """

    arg_constraints: dict = {}
    has_rsample = True

    def __init__(self, fn: Any, fits: torch.Tensor | None = None) -> None:
        self._bare = fn
        self._fits = fits
        self._formula = _unvalidated(fn)
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        return constraints.independent(constraints.real, self.event_dim)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        if self._fits is not None:
            value = torch.where(self._fits, value, torch.nan)
        return self._formula.log_prob(value)

    def rsample(self, sample_shape: Any = ()) -> torch.Tensor:
        return self._bare.sample(sample_shape)


def _unvalidated(fn: Any) -> Any:
    """Return a copy of a distribution that checks no value, nor do those that it wraps."""
    found = copy.copy(fn)
    found._validate_args = False
    if hasattr(fn, "base_dist"):
        found.base_dist = _unvalidated(fn.base_dist)
    return found


def is_extended(fn: Any) -> bool:
    """Return whether a distribution scores weights in the place of a draw."""
    return isinstance(fn, (Extended, RelaxedCount)) or is_unchecked(fn) or is_relaxed_matrix(fn)


def kind_of(fn: Any) -> str:
    """Return what a relaxed site draws: "subset", "count" or "weights"."""
    return "count" if isinstance(fn, RelaxedCount) else "subset" if is_unchecked(fn) else "weights"


def extension(fn: Any) -> Extended | None:
    """Return the extension of a distribution with finitely many values for each element, or None for others."""
    if isinstance(fn, Extended):
        return fn
    return None if counted_parts(unmasked(fn)) is None else Extended(fn)


def _masks_of(fn: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the masks inside a distribution, each with the number of dimensions that are made an event's inside of it."""
    while isinstance(fn, (TorchIndependent, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution):
            elements, inner = 0, fn.base_dist
            while isinstance(inner, (TorchIndependent, MaskedDistribution)):
                elements += getattr(inner, "reinterpreted_batch_ndims", 0)
                inner = inner.base_dist
            yield torch.as_tensor(fn._mask), elements
        fn = fn.base_dist


def relaxed(site: str, fn: Any, value: torch.Tensor, estimator: Relaxation) -> tuple[torch.Tensor, Any]:
    """Return the weights that an estimator puts in the place of a draw, and the distribution that scores them."""
    if isinstance(estimator, SubsetRelaxation):
        law = innermost(unmasked(fn))
        value = value.to(law.logits.dtype)
        noise = noise_for(site, OPS, lambda _: TorchNoise())
        return estimator.weights(HardSubset(OPS, law.logits.expand(value.shape), law.k, value, noise)), unchecked(fn)
    if isinstance(estimator, TruncatedGumbelSoftmax):
        first, log_probs, _ = counts(unmasked(fn), value, estimator.window)
        noise = noise_for(site, OPS, lambda _: TorchNoise())
        count = HardCount(OPS, value, first, log_probs, noise)
        return estimator.weights(count), RelaxedCount(fn, count.fits)
    extended = Extended(fn)
    noise = noise_for(site, OPS, lambda _: TorchNoise())
    odds = extended.odds()
    if odds is not None:
        return estimator.weight_of_second(HardPair(OPS, odds, value, noise)), extended
    log_probs = extended.categories()
    index = value.argmax(-1) if extended._base.event_shape else value.long()
    draw = HardDraw(OPS, log_probs, index, noise)
    weights = draw.cut(estimator.weights(draw))
    return (weights if extended._base.event_shape else weights[..., 1]), extended


def softened(site: str, fn: Any, value: torch.Tensor, temperature: Any) -> torch.Tensor:
    """Return a draw's relaxation at a temperature, or the probabilities if it is None."""
    extended = Extended(fn)
    noise = noise_for(site, OPS, lambda _: TorchNoise())
    odds = extended.odds()
    if odds is not None:
        pair = HardPair(OPS, odds, value, noise)
        return OPS.sigmoid(pair.odds) if temperature is None else pair.concrete(temperature)
    log_probs, one_hot = extended.categories(), bool(extended._base.event_shape)
    if temperature is None:
        weights = torch.where(log_probs > -torch.inf, log_probs.exp(), 0.0)
    else:
        index = value.argmax(-1) if one_hot else value.long()
        draw = HardDraw(OPS, log_probs, index, noise)
        weights = draw.cut(softmax(OPS.xp, tempered(OPS.xp, draw.perturbed(), temperature)))
    return weights if one_hot else weights[..., 1]


class ExtendedModelMessenger(Messenger):
    """Extends the model's densities of relaxed sites to what is drawn there, given which kind it is in the guide (`kind_of`)."""

    def __init__(self, sites: Mapping[str, str]) -> None:
        super().__init__()
        self._sites = sites

    @classmethod
    def of(cls, estimators: Mapping[str, Estimator]) -> ExtendedModelMessenger:
        """Return the messenger for the sites whose estimators relax them."""
        return cls({name: _drawn_by(x) for name, x in estimators.items() if x.relaxes})

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._sites:
            msg["fn"] = extended_in_model(msg["name"], msg["fn"], self._sites[msg["name"]])


def _drawn_by(estimator: Estimator) -> str:
    if isinstance(estimator, TruncatedGumbelSoftmax):
        return "count"
    return "subset" if isinstance(estimator, SubsetRelaxation) else "weights"


def extended_in_model(name: str, fn: Any, kind: str) -> Any:
    """Return the extension of the model's distribution of a relaxed site, or refuse it; a subset's draw alone fits a `Subset`."""
    if kind == "subset" and is_subset(fn):
        return unchecked(fn)
    if kind == "count" and family(fn) in SMOOTH:
        return RelaxedCount(fn)
    if is_matrix(fn):
        return unchecked(fn)
    if kind == "count" or not is_relaxable(fn):
        raise undefined_when_relaxed(name, family(fn))
    return Extended(fn)
