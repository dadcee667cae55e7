"""Discrete distributions extended linearly to weights of their categories, and the draws that are replaced by weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import Distribution, ExpandedDistribution, Independent, MaskedDistribution, constraints

from pplgrad.core.array_ops import linear_density, pair_density
from pplgrad.core.noise import Noise, noise_for
from pplgrad.engine.checks import undefined_when_relaxed
from pplgrad.estimators.count_relaxations import SMOOTH, HardCount, TruncatedGumbelSoftmax
from pplgrad.estimators.relaxed import HardDraw, HardPair, Relaxation, softmax, tempered
from pplgrad.estimators.subset_relaxations import HardSubset, SubsetRelaxation
from pplgrad.numpyro._array_ops import OPS, JaxNoise
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._distributions import (
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
)
from pplgrad.numpyro._structures import PermutationMatrix, Subset


class Extended(Distribution):
    """A Bernoulli or one-hot distribution whose log density is linear in the weights of the categories.

    log q(w) = Σ_c w_c log q(c): the density itself at hard values. A Bernoulli's value is the weight of 1.
    `log_probs` has shape (*batch, *elements, categories); `odds`, those of 1 of a Bernoulli, and `mask`, if elements of the event are
    masked, have (*batch, *elements).
    """

    pytree_data_fields = ("log_probs", "mask_of_elements", "odds")
    pytree_aux_fields = ("one_hot",)

    def __init__(
        self, log_probs: jax.Array, one_hot: bool, event_shape: tuple[int, ...], mask: Any = None, odds: Any = None
    ) -> None:
        self.log_probs = log_probs
        self.odds = odds
        self.mask_of_elements = mask
        self.one_hot = one_hot
        shape = log_probs.shape if one_hot else log_probs.shape[:-1]
        super().__init__(shape[: len(shape) - len(event_shape)], event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.unit_interval, self.event_dim)

    def log_prob(self, value: jax.Array) -> jax.Array:
        if self.odds is None:
            total = linear_density(jnp, value, self.log_probs, not self.one_hot)
        else:
            total = pair_density(OPS, value, self.odds)
        if self.mask_of_elements is not None:
            total = jnp.where(self.mask_of_elements, total, 0.0)
        elements = self.event_dim - self.one_hot
        return total.sum(range(total.ndim - elements, total.ndim)) if elements else total

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        drawn = jax.random.categorical(key, self.log_probs, shape=(*sample_shape, *self.log_probs.shape[:-1]))
        return jax.nn.one_hot(drawn, self.log_probs.shape[-1]) if self.one_hot else drawn.astype(self.log_probs.dtype)


class UncheckedSubset(Subset):
    """A `Subset` whose draw is close to a binary vector, and carries a gradient: its log density is linear in it."""

    def __init__(self, k: int, logits: jax.Array) -> None:
        super().__init__(k, logits, validate_args=False)


class UncheckedMatrix(PermutationMatrix):
    """A `PermutationMatrix` whose rows are weights, and carry a gradient."""

    def __init__(self, logits: jax.Array) -> None:
        super().__init__(logits, validate_args=False)


def unchecked(fn: Any) -> Any:
    """Return a distribution over subsets or matrices that takes relaxed ones, with the masks and shapes around it."""
    if isinstance(fn, MaskedDistribution):
        return unchecked(fn.base_dist).mask(fn._mask)
    if isinstance(fn, Independent):
        return unchecked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return unchecked(fn.base_dist).expand(fn.batch_shape)
    return UncheckedMatrix(fn.logits) if isinstance(fn, PermutationMatrix) else UncheckedSubset(fn.k, fn.logits)


def is_unchecked(fn: Any) -> bool:
    """Return whether a distribution is a relaxed `Subset`."""
    return isinstance(innermost(unmasked(fn)), UncheckedSubset)


def is_relaxed_matrix(fn: Any) -> bool:
    """Return whether a distribution is a relaxed `PermutationMatrix`."""
    return isinstance(innermost(unmasked(fn)), UncheckedMatrix)


class RelaxedCount(Distribution):
    """A law of counts at numbers between them: the host's formula of its log density, which is not asked for its support.

    `fits` says of each element whether its draw can be relaxed; elsewhere the density is NaN.
    """

    pytree_data_fields = ("formula", "fits")

    def __init__(self, fn: Any, fits: jax.Array | None = None) -> None:
        self.fits = fits
        self.formula = _unvalidated(fn)
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    def log_prob(self, value: jax.Array) -> jax.Array:
        # JAX's xlogy compares its argument with 0: in a density that is no misuse of the value, and a product is no copy of it.
        value = 1.0 * value
        return self.formula.log_prob(value if self.fits is None else jnp.where(self.fits, value, jnp.nan))

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        return self.formula.sample(key, sample_shape).astype(float)


def _unvalidated(fn: Any) -> Any:
    """Return a copy of a distribution that checks no value, nor do those that it wraps."""
    found = copy.copy(fn)
    found._validate_args = False
    if hasattr(fn, "base_dist"):
        found.base_dist = _unvalidated(fn.base_dist)
    return found


def is_extended(fn: Any) -> bool:
    """Return whether a distribution scores weights in the place of a draw."""
    return (
        isinstance(unmasked(fn), Extended) or isinstance(fn, RelaxedCount) or is_unchecked(fn) or is_relaxed_matrix(fn)
    )


def extended(fn: Any) -> Any:
    """Return the extension of a Bernoulli or one-hot distribution, masked as it was."""
    bare = unmasked(fn)
    parts = counted_parts(bare)
    assert parts is not None
    base, support = parts
    log_probs = jnp.broadcast_to(every_log_prob(base, support), (*base.batch_shape, len(support)))
    elements = None
    for mask, inside in _masks_of(fn):
        if fn.event_dim - bool(base.event_shape) > inside:
            mask = jnp.reshape(mask, (*jnp.shape(mask), *(1,) * inside))
            elements = mask if elements is None else elements & mask
    odds = log_odds(base) if is_bernoulli(base) else None
    found = Extended(log_probs, bool(base.event_shape), fn.event_shape, elements, odds)
    while isinstance(fn, MaskedDistribution):
        found, fn = found.mask(fn._mask), fn.base_dist
    return found


def stacked(fn: Any) -> Any:
    """Return the extension of all steps of a scan, which has stacked the arrays of that of one step, and left its shape."""
    if isinstance(fn, MaskedDistribution):
        return stacked(fn.base_dist).mask(fn._mask)
    return Extended(fn.log_probs, fn.one_hot, fn.event_shape, fn.mask_of_elements, fn.odds)


def _masks_of(fn: Any) -> Iterator[tuple[Any, int]]:
    """Yield the masks inside a distribution, each with the number of dimensions that are made an event's inside of it."""
    while isinstance(fn, (Independent, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution):
            elements, inner = 0, fn.base_dist
            while isinstance(inner, (Independent, MaskedDistribution)):
                elements += getattr(inner, "reinterpreted_batch_ndims", 0)
                inner = inner.base_dist
            yield jnp.asarray(fn._mask), elements
        fn = fn.base_dist


def relaxed(site: str, fn: Any, value: jax.Array, estimator: Relaxation, key: jax.Array) -> tuple[jax.Array, Any]:
    """Return the weights that an estimator puts in the place of a draw, and the distribution that scores them."""
    noise = noise_for(site, OPS, lambda _: JaxNoise(jax.random.fold_in(key, 1)))
    if isinstance(estimator, SubsetRelaxation):
        law = innermost(unmasked(fn))
        logits = jnp.broadcast_to(law.logits, value.shape)
        value = value.astype(logits.dtype)
        return estimator.weights(HardSubset(OPS, logits, law.k, value, noise)), unchecked(fn)
    if isinstance(estimator, TruncatedGumbelSoftmax):
        first, log_probs, _ = counts(unmasked(fn), value, estimator.window)
        hard = value.astype(log_probs.dtype)
        count = HardCount(OPS, hard, first.astype(hard.dtype), log_probs, noise)
        return estimator.weights(count), RelaxedCount(fn, count.fits)
    wide = extended(fn)
    bare = unmasked(wide)
    if bare.odds is not None:
        return estimator.weight_of_second(_pair(bare, value, noise)), wide
    index = jnp.argmax(value, -1) if bare.one_hot else value.astype(int)
    draw = HardDraw(OPS, bare.log_probs, index, noise)
    weights = draw.cut(estimator.weights(draw))
    return (weights if bare.one_hot else weights[..., 1]), wide


def _pair(bare: Extended, value: jax.Array, noise: Noise) -> HardPair:
    return HardPair(OPS, bare.odds, value.astype(bare.odds.dtype), noise)


def softened(site: str, wide: Any, value: jax.Array, temperature: Any, key: jax.Array) -> jax.Array:
    """Return a draw's relaxation at a temperature, or the probabilities if it is None; `wide` is its extended law."""
    bare, noise = unmasked(wide), noise_for(site, OPS, lambda _: JaxNoise(jax.random.fold_in(key, 1)))
    if bare.odds is not None:
        pair = _pair(bare, value, noise)
        return OPS.sigmoid(pair.odds) if temperature is None else pair.concrete(temperature)
    if temperature is None:
        weights = jnp.where(bare.log_probs > -jnp.inf, jnp.exp(bare.log_probs), 0.0)
    else:
        index = jnp.argmax(value, -1) if bare.one_hot else value.astype(int)
        draw = HardDraw(OPS, bare.log_probs, index, noise)
        weights = draw.cut(softmax(jnp, tempered(jnp, draw.perturbed(), temperature)))
    return weights if bare.one_hot else weights[..., 1]


def extended_in_model(name: str, fn: Any, inside: bool = False) -> Any:
    """Return the extension of the model's distribution of a relaxed site, or refuse it; `inside` says that a scan draws it."""
    if is_subset(fn) and not inside:
        return unchecked(fn)  # `refuse_others` sees to it that the guide's is one too.
    if family(fn) in SMOOTH and not inside:
        return RelaxedCount(fn)
    if is_matrix(fn):
        return unchecked(fn)
    if not is_relaxable(fn):
        raise undefined_when_relaxed(name, family(fn))
    return extended(fn)


def refuse_others(guide: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse subsets or counts in the model of which the guide's draw is relaxed otherwise: they are not defined at its weights, and the reverse."""
    for name, site in model.items():
        if name in guide and _kind(site["fn"]) != _kind(guide[name]["fn"]) and "weights" != _kind(site["fn"]):
            raise undefined_when_relaxed(name, "Subset" if is_unchecked(site["fn"]) else family(site["fn"].formula))
        if name in guide and isinstance(guide[name]["fn"], RelaxedCount) and not isinstance(site["fn"], RelaxedCount):
            raise undefined_when_relaxed(name, family(site["fn"]))


def _kind(fn: Any) -> str:
    return "count" if isinstance(fn, RelaxedCount) else "subset" if is_unchecked(fn) else "weights"


def _log(probs: jax.Array) -> jax.Array:
    """Return the logarithm, whose derivative at exactly 0 is 0."""
    return jnp.where(probs > 0, jnp.log(jnp.where(probs > 0, probs, 1.0)), -jnp.inf)


class _OneHot(type(constraints.simplex)):  # type: ignore[misc]
    """One entry is 1 and the others are 0."""

    is_discrete = True

    def __call__(self, x: jax.Array) -> jax.Array:
        return ((x == 0) | (x == 1)).all(-1) & (x.sum(-1) == 1)

    def feasible_like(self, prototype: jax.Array) -> jax.Array:
        return jnp.zeros_like(prototype).at[..., 0].set(1)


class _LogWeights(type(constraints.simplex)):  # type: ignore[misc]
    """Logarithms of weights along the last axis: some may be −inf, as that of a probability of 0."""

    event_dim = 1

    def __call__(self, x: jax.Array) -> jax.Array:
        return ((x < jnp.inf) & ~jnp.isnan(x)).all(-1) & (x > -jnp.inf).any(-1)

    def feasible_like(self, prototype: jax.Array) -> jax.Array:
        return jnp.zeros_like(prototype)


class OneHotCategorical(Distribution):
    """A categorical distribution over one-hot vectors, which NumPyro lacks.

    Unlike NumPyro's Categorical it can be relaxed. The log density is log q(x) = Σ_c x_c log softmax(logits)_c, in nats. It estimates
    nothing itself.

    Args:
        probs: the probabilities of the categories.
        logits: the logits of the categories. A logit may be −inf: that category is never drawn.
        validate_args: as in NumPyro's distributions.

    Shapes:
        `logits` and `probs` have shape (*batch, categories). A draw has the same shape, with one entry 1 and the others 0.

    Raises:
        ValueError: not exactly one of `probs` and `logits` is given.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> float(OneHotCategorical(logits=jnp.zeros(3)).sample(jax.random.key(0)).sum())
        1.0

    References:
        The distribution of that name in `pyro.distributions`.
    """

    arg_constraints = {"probs": constraints.simplex, "logits": _LogWeights()}
    support = _OneHot()
    has_enumerate_support = True
    pytree_data_fields = ("logits",)

    def __init__(
        self, probs: jax.Array | None = None, logits: jax.Array | None = None, *, validate_args: bool | None = None
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("OneHotCategorical takes exactly one of probs and logits.")
        self.logits = _log(jnp.asarray(probs)) if logits is None else jnp.asarray(logits)
        super().__init__(self.logits.shape[:-1], self.logits.shape[-1:], validate_args=validate_args)

    @property
    def probs(self) -> jax.Array:
        """The probabilities, of shape (*batch, categories)."""
        return jax.nn.softmax(self.logits, -1)

    @property
    def mean(self) -> jax.Array:
        """The mean: the probabilities."""
        return self.probs

    @property
    def variance(self) -> jax.Array:
        """The variance of each entry."""
        return self.probs * (1 - self.probs)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        drawn = jax.random.categorical(key, self.logits, shape=(*sample_shape, *self.batch_shape))
        return jax.nn.one_hot(drawn, self.logits.shape[-1], dtype=self.logits.dtype)

    def log_prob(self, value: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(self.logits, -1)
        possible = log_probs > -jnp.inf
        total = (value * jnp.where(possible, log_probs, 0.0)).sum(-1)
        return total + jnp.where(((value != 0) & ~possible).any(-1), -jnp.inf, 0.0)

    def enumerate_support(self, expand: bool = True) -> jax.Array:
        """Return the one-hot vectors, of shape (categories, *batch, categories), with 1 for each batch dimension unless `expand`."""
        count = self.logits.shape[-1]
        values = jnp.eye(count, dtype=self.logits.dtype).reshape(count, *(1,) * len(self.batch_shape), count)
        return jnp.broadcast_to(values, (count, *self.batch_shape, count)) if expand else values
