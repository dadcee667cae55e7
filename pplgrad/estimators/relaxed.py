"""Relaxations of discrete draws: biased, and differentiable in the parameters of the site."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

from pplgrad.core.array_ops import (
    Array,
    Ops,
    bounded,
    few_categories,
    is_possible,
    max_over_categories,
    only_possible,
    sum_over_categories,
)
from pplgrad.core.estimator import Declaration, Estimator
from pplgrad.core.noise import Noise
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.site_requirements import require_relaxable, require_steps


@dataclass(frozen=True)
class HardDraw:
    """A discrete draw that is to be relaxed: log probabilities (..., categories) with their gradient, and its number.

    `index` has shape (...). The dimensions in front are whatever the host has there. Log probabilities of impossible
    categories, −inf as the host gives them, are made constants far below the others.
    """

    ops: Ops
    log_probs: Array
    index: Array
    noise: Noise

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_probs", bounded(self.ops.xp, self.log_probs))

    def only_possible(self, x: Array) -> Array:
        """Return numbers of the categories with those of impossible ones far below the others."""
        return only_possible(self.ops.xp, self.log_probs, x)

    def cut(self, weights: Array) -> Array:
        """Return weights of the categories with those of impossible ones exactly 0, whatever the slope of the cost there."""
        return self.ops.xp.where(is_possible(self.ops.xp, self.log_probs), weights, self.ops.xp.zeros_like(weights))

    @property
    def one_hot(self) -> Array:
        """Return the draw as weights of the categories, (..., categories)."""
        xp = self.ops.xp
        numbers = self.ops.arange(self.log_probs.shape[-1], self.index)
        return xp.astype(self.index[..., None] == numbers, self.log_probs.dtype)

    def perturbed(self, count: int | None = None) -> Array:
        """Return log probabilities plus Gumbel noise whose largest is the draw's; the noise is a constant.

        With `count` that many, independent given the draw, along a first axis.
        Maddison and Tarlow (2017): the largest is standard Gumbel, and the others are truncated at it. Of two categories the difference
        alone is drawn, and the larger one is 0: nothing depends on more.
        """
        xp, ops = self.ops.xp, self.ops
        fixed = ops.stop_gradient(self.log_probs)
        shape = tuple(fixed.shape) if count is None else (count, *fixed.shape)
        if shape[-1] == 2:
            return self._perturbed_pair(fixed, shape)
        exponential = -xp.log(self.noise.uniform(shape, fixed))
        hard = self.one_hot
        top = sum_over_categories(xp, exponential * hard)
        # A probability that underflows is kept off zero.
        probs = xp.clip(xp.exp(fixed), min=xp.finfo(fixed.dtype).tiny)
        values = -xp.log(xp.where(hard > 0, top, exponential / probs + top))
        every = self.log_probs if count is None else xp.broadcast_to(self.log_probs, shape)
        return only_possible(xp, every, every + ops.stop_gradient(values - fixed))

    def _perturbed_pair(self, fixed: Array, shape: tuple[int, ...]) -> Array:
        """Return the same for two categories: the other one is below the drawn one by as much as the key of a pair is from 0."""
        xp, (first, second) = self.ops.xp, self.ops.xp.unstack(fixed, axis=-1)
        pair = HardPair(self.ops, second - first, xp.astype(self.index, fixed.dtype), self.noise)
        key = pair.keys(None if shape == tuple(fixed.shape) else shape[0])
        values = xp.stack([xp.clip(-key, max=0.0), xp.clip(key, max=0.0)], axis=-1)
        every = xp.broadcast_to(self.log_probs, shape)
        return only_possible(xp, every, every + self.ops.stop_gradient(values - fixed))


def finite_odds(ops: Ops, odds: Array) -> Array:
    """Return log odds with infinite ones made constants, whose logistic function is 0 or 1, and derivatives of it 0, at any temperature."""
    if ops.known_finite(odds):
        return odds
    most = float(ops.xp.finfo(odds.dtype).max) ** 0.5
    return ops.xp.clip(odds, min=-most, max=most)


@dataclass(frozen=True)
class HardPair:
    """A draw of one of two values that is to be relaxed: the log odds of the second (...), with their gradient, and the draw, 0 or 1.

    Infinite log odds, where one value is impossible, are made constants: weights there are exactly 0 or 1.
    """

    ops: Ops
    odds: Array
    value: Array
    noise: Noise

    def __post_init__(self) -> None:
        object.__setattr__(self, "odds", finite_odds(self.ops, self.odds))

    @property
    def listed(self) -> HardDraw:
        """Return the same draw by the log probabilities of both values."""
        ops, xp = self.ops, self.ops.xp
        log_probs = xp.stack([-ops.softplus(self.odds), -ops.softplus(-self.odds)], axis=-1)
        return HardDraw(ops, log_probs, xp.astype(self.value, ops.arange(1, self.odds).dtype), self.noise)

    def keys(self, count: int | None = None) -> Array:
        """Return the log odds plus logistic noise given the draw, a constant; `count` of them along a first axis.

        The other value lies below the drawn one by D = log(1 + (1 − u) / (u (1 − p))), where p is the probability of the drawn one.
        """
        xp, fixed = self.ops.xp, self.ops.stop_gradient(self.odds)
        u = self.noise.uniform(tuple(fixed.shape) if count is None else (count, *fixed.shape), fixed)
        u = xp.clip(u, min=xp.finfo(fixed.dtype).eps)
        side = 2 * self.value - 1
        odds = side * fixed  # Of the drawn one. Above 60 nothing but their exponential counts, which would overflow.
        small = xp.clip(odds, max=60.0)
        apart = xp.log1p((1 - u) / u * (1 + xp.exp(small))) + (odds - small)
        return self.ops.stop_gradient(side * apart)

    def concrete(self, temperature: Any) -> Array:
        """Return the weight of the second value, relaxed at a temperature given the draw."""
        moved = self.odds - self.ops.stop_gradient(self.odds)
        return self.ops.sigmoid((self.keys() + moved) / temperature)

    def concrete_anew(self, temperature: Any) -> Array:
        """Return the same of another draw, which the relaxation stands in the place of."""
        xp, fixed = self.ops.xp, self.ops.stop_gradient(self.odds)
        u = self.noise.uniform(tuple(fixed.shape), fixed)
        return self.ops.sigmoid((xp.log(u) - xp.log1p(-u) + self.odds) / temperature)

    def through(self, soft: Array) -> Array:
        """Return the hard draw with the gradient of `soft`."""
        return self.ops.stop_gradient(self.value - soft) + soft


class Relaxation(Estimator):
    """Base class of estimators that put weights of the categories in the place of a discrete draw.

    A Bernoulli's value is the weight of 1, a one-hot vector's the weights themselves. The log densities of the site in
    guide and model are extended linearly to weights.
    """

    uses_score: ClassVar[bool] = False
    relaxes: ClassVar[bool] = True

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is neither Bernoulli nor one-hot, or drawn inside a scan."""
        require_steps(self, site)
        require_relaxable(self, site)

    def at(self, args: tuple, kwargs: Mapping[str, Any]) -> Relaxation:
        """Return the estimator with its temperature at the program's arguments, where it is a function of them."""
        temperature = getattr(self, "temperature", None)
        if not callable(temperature):
            return self
        return replace(self, temperature=temperature(*args, **kwargs))  # type: ignore[type-var]

    @abstractmethod
    def weights(self, draw: Any) -> Array:
        """Return the weights of the categories, (..., categories), of a `HardDraw`, with their gradient."""

    def weight_of_second(self, pair: HardPair) -> Array:
        """Return the weight of the second of two values, (...), with its gradient: what `weights` gives for it."""
        draw = pair.listed
        return draw.cut(self.weights(draw))[..., 1]


def tempered(xp: Any, x: Array, temperature: Any) -> Array:
    """Return perturbed or plain log probabilities, bounded as `HardDraw` has them, divided by a temperature."""
    possible = is_possible(xp, x)
    return only_possible(xp, x, xp.where(possible, x, xp.zeros_like(x)) / temperature)


def softmax(xp: Any, x: Array) -> Array:
    """Return the softmax over the last axis."""
    if x.shape[-1] == 2:
        first, second = xp.unstack(x, axis=-1)
        return xp.stack(list(_logistic(xp, second - first)), axis=-1)
    shifted = xp.exp(x - max_over_categories(xp, x))
    few = few_categories(xp, shifted)
    if few is None:
        return shifted / sum_over_categories(xp, shifted)
    # One by one, so that the derivative of what they are divided by is no reduction over few either.
    whole = reduce(operator.add, few)
    return xp.stack([part / whole for part in few], axis=-1)


def _logistic(xp: Any, odds: Array) -> tuple[Array, Array]:
    """Return the probabilities of the first and the second of two at the log odds of the second, the smaller one exact."""
    is_up = odds > 0
    less = xp.exp(xp.where(is_up, -odds, odds))
    large = 1 / (1 + less)
    small = less * large
    return xp.where(is_up, small, large), xp.where(is_up, large, small)


def _through(draw: HardDraw, soft: Array) -> Array:
    """Return the hard draw with the gradient of `soft`."""
    return draw.ops.stop_gradient(draw.one_hot - soft) + soft


def check_temperature(owner: str, temperature: Any) -> None:
    """Refuse a temperature that is a number and not above 0."""
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ConfigurationError(f"{owner}(temperature={temperature}): the temperature must be above 0.")


def _declared(supports: str, source: str) -> Declaration:
    return Declaration(
        unbiased=False, supports=supports, evaluations=0, differentiable_costs=True, derivatives=1, source=source
    )


_SUPPORTS = "Bernoulli, one-hot"


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    r"""The Gumbel-softmax (concrete) relaxation: a softmax of the perturbed log probabilities.

    Uses y = softmax((log π + g)/τ) in place of the draw, and ∇θ E_g[f(y)] as the gradient. π are the probabilities, g is Gumbel noise
    and τ is the temperature. This is the gradient of a relaxed objective. The bias vanishes as τ goes to 0, while the variance grows.
    With `hard=True` the value is the one-hot draw, and only its gradient is that of y (straight-through Gumbel-softmax).

    Args:
        temperature: τ, above 0; no unit. A number, an array, or a function of the program's arguments that returns one, such as a
            schedule over a step that is among the arguments. Default: 0.5.
        hard: whether the value in the forward pass is the one-hot draw. Default: False.

    Shapes:
        Any batch and event shape. Particles and plates are ordinary batch dimensions.

    Assumptions:
        The cost is finite and differentiable at all weights between the hard values; then the only bias is that of the relaxed
        objective. A cost that is defined only at the hard values has no meaning at other weights. A category of probability 0 has
        weight 0.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot, or that is drawn inside a `scan` in the body of another one; if the program
            compares, rounds or indexes with the value of the site.
        ConfigurationError: if the temperature is not above 0.

    Example:
        >>> GumbelSoftmax(0.5).declaration.unbiased
        False

    References:
        Jang, Gu and Poole (2017), equation 2.
        Maddison, Mnih and Teh (2017), equation 10.
    """

    temperature: Any = 0.5
    hard: bool = False
    declaration: ClassVar[Declaration] = _declared(_SUPPORTS, "Jang et al. 2017; Maddison et al. 2017")

    def __post_init__(self) -> None:
        check_temperature("GumbelSoftmax", self.temperature)

    def weights(self, draw: HardDraw) -> Array:
        """Return the softmax of the perturbed log probabilities, hard in front of it or not."""
        soft = softmax(draw.ops.xp, tempered(draw.ops.xp, draw.perturbed(), self.temperature))
        return _through(draw, soft) if self.hard else soft

    def weight_of_second(self, pair: HardPair) -> Array:
        """Return the same of the second of two values."""
        return pair.through(pair.concrete(self.temperature)) if self.hard else pair.concrete_anew(self.temperature)


@dataclass(frozen=True)
class StraightThrough(Relaxation):
    r"""The straight-through estimator: the draw in the forward pass and its probabilities in the backward pass.

    Uses f(b) with ∂b/∂θ replaced by ∂π/∂θ. b is the draw and π are its probabilities. The gradient is exact where f is linear in the
    draw, and biased elsewhere.

    Shapes:
        Any batch and event shape. Particles and plates are ordinary batch dimensions.

    Assumptions:
        The cost has a derivative at the hard values, and this derivative describes how the cost changes from one value to another.
        The cost is not evaluated between the hard values. A category of probability 0 is never drawn and has no gradient.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot, or that is drawn inside a `scan` in the body of another one; if the program
            compares, rounds or indexes with the value of the site.

    Example:
        >>> StraightThrough().declaration.evaluations
        0

    References:
        Bengio, Léonard and Courville (2013), section 4.
    """

    declaration: ClassVar[Declaration] = _declared(_SUPPORTS, "Bengio et al. 2013")

    def weights(self, draw: HardDraw) -> Array:
        """Return the draw with the gradient of its probabilities."""
        return _through(draw, draw.ops.xp.exp(draw.log_probs))

    def weight_of_second(self, pair: HardPair) -> Array:
        """Return the same of the second of two values."""
        return pair.through(pair.ops.sigmoid(pair.odds))


@dataclass(frozen=True)
class GumbelRao(Relaxation):
    r"""The Gumbel-Rao estimator: straight-through Gumbel-softmax, averaged over k Gumbel noises conditional on the draw.

    Uses f(b) with ∂b/∂θ replaced by 1/k Σ_j ∂softmax((log π + g_j)/τ)/∂θ. The noises g_j are sampled conditionally on the draw b. The
    estimate has the same mean as `GumbelSoftmax(τ, hard=True)` and no more variance.

    Args:
        k: the number of Gumbel noises for each draw, an integer of at least 1. Default: 10.
        temperature: τ, above 0; no unit. A number, an array, or a function of the program's arguments that returns one. Default: 0.5.

    Shapes:
        Any batch and event shape. k times the noise, and no further evaluation of the program.

    Assumptions:
        Those of `GumbelSoftmax(τ, hard=True)`: the cost has a derivative at the hard values, and this derivative describes how the
        cost changes from one value to another. A category of probability 0 has weight 0.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot, or that is drawn inside a `scan` in the body of another one; if the program
            compares, rounds or indexes with the value of the site.
        ConfigurationError: if the temperature is not above 0, or k is below 1.

    Example:
        >>> GumbelRao(k=10, temperature=0.5).k
        10

    References:
        Paulus, Maddison and Krause (2021), equation 9.
    """

    k: int = 10
    temperature: Any = 0.5
    declaration: ClassVar[Declaration] = _declared(_SUPPORTS, "Paulus et al. 2021")

    def __post_init__(self) -> None:
        check_temperature("GumbelRao", self.temperature)
        if not isinstance(self.k, int) or self.k < 1:
            raise ConfigurationError(f"GumbelRao(k={self.k!r}): k is the number of noises, an integer of at least 1.")

    def weights(self, draw: HardDraw) -> Array:
        """Return the draw with the mean gradient of the relaxations that belong to it."""
        xp = draw.ops.xp
        soft = softmax(xp, tempered(xp, draw.perturbed(self.k), self.temperature))
        return _through(draw, xp.sum(soft, axis=0) / self.k)

    def weight_of_second(self, pair: HardPair) -> Array:
        """Return the same of the second of two values."""
        ops, moved = pair.ops, pair.odds - pair.ops.stop_gradient(pair.odds)
        # One by one: on a CPU XLA takes twice as long for one array of all of them and its sum.
        soft = [ops.sigmoid((keys + moved) / self.temperature) for keys in ops.xp.unstack(pair.keys(self.k), axis=0)]
        return pair.through(reduce(operator.add, soft) / self.k)


@dataclass(frozen=True)
class ReinMax(Relaxation):
    r"""The ReinMax estimator: a straight-through estimator that is exact to second order.

    Uses f(b) with ∂b/∂θ replaced by ∂(2 π₁ − ½ π)/∂θ. π are the probabilities. π₁ is the mean of the draw and of its probabilities at
    the temperature, written as a softmax of logits that have the gradient of the logits of π. The gradient is exact where f is
    quadratic in the draw, at temperature 1 (Heun's method in place of Euler's).

    Args:
        temperature: above 0; no unit. A number, an array, or a function of the program's arguments that returns one. Default: 1.0.

    Shapes:
        Any batch and event shape. Particles and plates are ordinary batch dimensions.

    Assumptions:
        The cost has a derivative at the hard values, and is close to a quadratic between them. A category of probability 0 is never
        drawn and has no gradient.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot, or that is drawn inside a `scan` in the body of another one; if the program
            compares, rounds or indexes with the value of the site.
        ConfigurationError: if the temperature is not above 0.

    Example:
        >>> ReinMax().temperature
        1.0

    References:
        Liu, Dong, Liu, Yu and Gao (2023), algorithm 2.
    """

    temperature: Any = 1.0
    declaration: ClassVar[Declaration] = _declared(_SUPPORTS, "Liu et al. 2023")

    def __post_init__(self) -> None:
        check_temperature("ReinMax", self.temperature)

    def weights(self, draw: HardDraw) -> Array:
        """Return the draw with the gradient of 2 π₁ − ½ π."""
        ops, xp, log_probs = draw.ops, draw.ops.xp, draw.log_probs
        middle = (draw.one_hot + softmax(xp, tempered(xp, log_probs, self.temperature))) / 2
        shift = ops.stop_gradient(xp.log(xp.clip(middle, min=xp.finfo(middle.dtype).tiny)) - log_probs)
        return _through(draw, 2 * softmax(xp, draw.only_possible(log_probs + shift)) - 0.5 * xp.exp(log_probs))

    def weight_of_second(self, pair: HardPair) -> Array:
        """Return the same of the second of two values."""
        ops, xp, odds, fixed = pair.ops, pair.ops.xp, pair.odds, pair.ops.stop_gradient(pair.odds)
        side, tiny = 2 * pair.value - 1, xp.finfo(fixed.dtype).tiny
        # The mean of the draw and of its probability, of the drawn one and of the other.
        other = ops.stop_gradient(xp.clip(ops.sigmoid(-side * fixed / self.temperature) / 2, min=tiny))
        middle = side * (xp.log1p(-other) - xp.log(other))
        return pair.through(2 * ops.sigmoid(middle + (odds - fixed)) - 0.5 * ops.sigmoid(odds))


@dataclass(frozen=True)
class GappedStraightThrough(Relaxation):
    r"""The gapped straight-through estimator: log probabilities shifted just enough to make the draw the largest by a gap.

    Uses f(b) with ∂b/∂θ replaced by ∂softmax((log π + m)/τ)/∂θ. The constants m raise the draw's log probability to the largest one and
    lower the others until they are `gap` below it. No Gumbel noise is needed.

    Args:
        temperature: τ, above 0; no unit. A number, an array, or a function of the program's arguments that returns one. Default: 1.0.
        gap: the least distance of the other log probabilities from that of the draw, in nats, at least 0. Default: 1.0.

    Shapes:
        Any batch and event shape. Particles and plates are ordinary batch dimensions.

    Assumptions:
        The cost has a derivative at the hard values, and this derivative describes how the cost changes from one value to another. A
        category of probability 0 keeps weight 0 for every gap.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot, or that is drawn inside a `scan` in the body of another one; if the program
            compares, rounds or indexes with the value of the site.
        ConfigurationError: if the temperature is not above 0, or the gap is below 0.

    Example:
        >>> GappedStraightThrough(gap=1.0).gap
        1.0

    References:
        Fan, Chi, Rudnicky and Ramadge (2022), section 4.
    """

    temperature: Any = 1.0
    gap: float = 1.0
    declaration: ClassVar[Declaration] = _declared(_SUPPORTS, "Fan et al. 2022")

    def __post_init__(self) -> None:
        check_temperature("GappedStraightThrough", self.temperature)
        if self.gap < 0:
            raise ConfigurationError(f"GappedStraightThrough(gap={self.gap}): the gap must be at least 0.")

    def weights(self, draw: HardDraw) -> Array:
        """Return the draw with the gradient of the softmax of the shifted log probabilities."""
        ops, xp, hard = draw.ops, draw.ops.xp, draw.one_hot
        fixed = ops.stop_gradient(draw.log_probs)
        top = max_over_categories(xp, fixed)
        up = hard * (top - fixed)
        down = (1 - hard) * xp.clip(fixed + self.gap - top, min=0)
        moved = draw.only_possible(draw.log_probs + up - down)
        return _through(draw, softmax(xp, tempered(xp, moved, self.temperature)))

    def weight_of_second(self, pair: HardPair) -> Array:
        """Return the same of the second of two values."""
        fixed, side = pair.ops.stop_gradient(pair.odds), 2 * pair.value - 1
        apart = side * pair.ops.xp.clip(side * fixed, min=self.gap)
        return pair.through(pair.ops.sigmoid((apart + (pair.odds - fixed)) / self.temperature))
