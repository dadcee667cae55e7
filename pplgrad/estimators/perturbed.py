"""Draws as functions of perturbed log weights: a choice is the largest of them, a ranking is their order.

The keys z = θ + γ, with Gumbel noise γ, say what was drawn. Given the draw they are z̃(θ), a function of θ and of other noise, with the
same values. REBAR and RELAX need how both move with θ: z moves as θ does, and z̃ as `given` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pplgrad.core.array_ops import Array, Ops, max_over_categories, sum_over_categories
from pplgrad.core.draw import Draw
from pplgrad.core.structures import given_ranking
from pplgrad.estimators.relaxed import HardDraw, HardPair, finite_odds, softmax, tempered


class Perturbed(Protocol):
    """A draw and its perturbed log weights, (particles, *plates, elements, n); of a pair there is one, and no last axis."""

    @property
    def keys(self) -> Array:
        """z, a constant."""

    @property
    def log_weights(self) -> Array:
        """θ, with its gradient."""

    def score(self) -> Array:
        """Return the derivative of log q with respect to the logits, a constant."""

    def given(self, along: Array) -> Array:
        """Return Σ_i along_i ∂z̃_i/∂θ."""

    def to_logits(self, slopes: Array) -> Array:
        """Return a derivative with respect to θ as one with respect to the logits."""

    def weights(self, temperature: Any) -> Array:
        """Return the relaxed draw at the keys, (particles, *plates, elements, weights)."""

    def along_keys(self, slopes: Array, weights: Array, temperature: Any) -> Array:
        """Return a derivative with respect to the relaxed draw as one with respect to the keys."""

    def at_elements(self, x: Array) -> Array:
        """Return numbers of the draws, (particles, *plates), beside which the keys broadcast."""

    def squared(self, x: Array) -> Array:
        """Return the squared length of a derivative with respect to the logits: (particles, *plates, elements)."""


def perturbed(draw: Draw) -> Perturbed:
    """Return the draw of a site with noise that is conditional on it."""
    if draw.is_matrix:
        return PerturbedMatrix.of(draw)
    if draw.is_ranking:
        return PerturbedRanking.of(draw)
    return PerturbedPair.of(draw) if draw.categories == 2 else PerturbedChoice.of(draw)


class _Softmax:
    """The relaxation softmax(z / τ), of several keys for each element."""

    ops: Ops
    keys: Array

    def at_elements(self, x: Array) -> Array:
        return x[..., None, None]

    def squared(self, x: Array) -> Array:
        return self.ops.xp.sum(x**2, axis=-1)

    def weights(self, temperature: Any) -> Array:
        return softmax(self.ops.xp, tempered(self.ops.xp, self.keys, temperature))

    def along_keys(self, slopes: Array, weights: Array, temperature: Any) -> Array:
        return weights * (slopes - sum_over_categories(self.ops.xp, slopes * weights)) / temperature


@dataclass(frozen=True)
class PerturbedChoice(_Softmax):
    """A choice among n categories; θ are their log probabilities."""

    ops: Ops
    draw: Draw
    keys: Array

    @classmethod
    def of(cls, draw: Draw) -> PerturbedChoice:
        keys = HardDraw(draw.ops, draw.log_probs, draw.index, draw.noise).perturbed()
        return cls(draw.ops, draw, draw.ops.stop_gradient(keys))

    @property
    def log_weights(self) -> Array:
        return self.draw.log_probs

    @cached_property
    def _probs(self) -> Array:
        return self.ops.xp.exp(self.ops.stop_gradient(self.draw.log_probs))

    def score(self) -> Array:
        return self.draw.one_hot(self.draw.index) - self._probs

    def given(self, along: Array) -> Array:
        return _given_choice(self.ops, self.keys) * along

    def to_logits(self, slopes: Array) -> Array:
        return slopes - self._probs * sum_over_categories(self.ops.xp, slopes)


def _given_choice(ops: Any, keys: Array) -> Array:
    """Return how fast each key moves with its log probability, with noise given the draw.

    The largest does not move; another one, −log(e/π + e_top), moves at 1 − exp(z − z_top).
    """
    return 1 - ops.xp.exp(keys - max_over_categories(ops.xp, keys))


@dataclass(frozen=True)
class PerturbedPair:
    """A choice between two; θ are the log odds of the second, and the key is how far the second lies above the first.

    The two logits of a choice move against each other, so that a derivative with respect to both is √2 times as long. No array has an
    axis of length 1 behind the elements: XLA computes and sums such arrays several times, and up to thirty times, as slowly on a CPU.
    """

    ops: Ops
    draw: Draw
    keys: Array

    @classmethod
    def of(cls, draw: Draw) -> PerturbedPair:
        ops, xp, odds = draw.ops, draw.ops.xp, finite_odds(draw.ops, draw.ops.stop_gradient(draw.odds))
        uniform = draw.uniform(ops.sigmoid(odds))
        if uniform is None:
            keys = HardPair(ops, odds, xp.astype(draw.index, odds.dtype), draw.noise).keys()
        else:
            keys = odds + xp.log1p(-uniform) - xp.log(uniform)
        return cls(ops, draw, keys)

    @property
    def log_weights(self) -> Array:
        return self.draw.logits

    def at_elements(self, x: Array) -> Array:
        return x[..., None]

    def squared(self, x: Array) -> Array:
        return x**2

    @cached_property
    def _side(self) -> Array:
        return 2 * self.ops.xp.astype(self.draw.index, self.keys.dtype) - 1

    @cached_property
    def _against(self) -> Array:
        """The probability of what was not drawn."""
        return self.ops.sigmoid(-self._side * self.ops.stop_gradient(self.log_weights))

    def score(self) -> Array:
        return 2**0.5 * self._side * self._against

    def given(self, along: Array) -> Array:
        # The key, ±log(1 + (1 − u) / (u (1 − p))), moves at (1 − exp −|z|) p, where p is the probability of the drawn one.
        return (1 - self.ops.xp.exp(-self.ops.xp.abs(self.keys))) * (1 - self._against) * along

    def to_logits(self, slopes: Array) -> Array:
        return 2**0.5 * slopes

    def weights(self, temperature: Any) -> Array:
        second = self.ops.sigmoid(self.keys / temperature)
        return self.ops.xp.stack([1 - second, second], axis=-1)

    def along_keys(self, slopes: Array, weights: Array, temperature: Any) -> Array:
        xp = self.ops.xp
        (first, second), (of_first, of_second) = (xp.unstack(x, axis=-1) for x in (weights, slopes))
        both = first * second
        # A weight that is exactly 0 or 1 stays so, whatever the slope of the cost there.
        return xp.where(both > 0, both * (of_second - of_first), xp.zeros_like(both)) / temperature


@dataclass(frozen=True)
class PerturbedRanking(_Softmax):
    """A ranking of n items; θ are their logits.

    Given the ranking π, exp(−z̃_π_k) = Σ_{m ≤ k} e_m / S_m with exponential numbers e_m and S_m = Σ_{j ≥ m} exp θ_π_j (Gadetsky et al.
    2020, lemma 1).
    """

    ops: Ops
    draw: Draw
    keys: Array
    places: Array
    """The place of each item in the ranking, (..., n)."""
    shares: Array
    """exp(θ_π_r) / S_m for r ≥ m, else 0: (..., n, n) by m and r."""
    parts: Array
    """(e_m / S_m) exp(z̃_π_k) for m ≤ k, else 0: (..., n, n) by k and m."""

    @classmethod
    def of(cls, draw: Draw) -> PerturbedRanking:
        fixed = draw.ops.stop_gradient(draw.ranking_logits)
        ranked, parts, shares = given_ranking(draw.ops, draw.noise, fixed, draw.ranking)
        places = draw.ops.xp.argsort(draw.ranking, axis=-1)
        keys = draw.ops.xp.take_along_axis(ranked, places, axis=-1)
        return cls(draw.ops, draw, keys, places, shares, parts)

    @property
    def log_weights(self) -> Array:
        return self.draw.ranking_logits

    def score(self) -> Array:
        return self._by_item(1 - self.ops.xp.sum(self.shares, axis=-2))

    def given(self, along: Array) -> Array:
        xp = self.ops.xp
        ranked = xp.take_along_axis(along, self.draw.ranking, axis=-1)
        moved = xp.matmul(ranked[..., None, :], self.parts)
        return self._by_item(xp.matmul(moved, self.shares)[..., 0, :])

    def to_logits(self, slopes: Array) -> Array:
        return slopes

    def _by_item(self, ranked: Array) -> Array:
        return self.ops.xp.take_along_axis(ranked, self.places, axis=-1)


@dataclass(frozen=True)
class PerturbedMatrix(PerturbedRanking):
    """A ranking that is drawn as a permutation matrix, of which each row is relaxed (NeuralSort: Grover et al. 2019, equation 5).

    Row i is the softmax over j of [(n + 1 − 2 i) z_j − Σ_k |z_j − z_k|] / τ; the weights are the rows one after the other.
    """

    def weights(self, temperature: Any) -> Array:
        xp, z = self.ops.xp, self.keys
        spread = xp.sum(xp.abs(z[..., :, None] - z[..., None, :]), axis=-1)
        scores = self._places * z[..., None, :] - spread[..., None, :]
        rows = softmax(xp, scores / temperature)
        return xp.reshape(rows, (*z.shape[:-1], z.shape[-1] ** 2))

    def along_keys(self, slopes: Array, weights: Array, temperature: Any) -> Array:
        xp, z = self.ops.xp, self.keys
        square = (*z.shape, z.shape[-1])
        rows, slopes = xp.reshape(weights, square), xp.reshape(slopes, square)
        along = rows * (slopes - xp.sum(slopes * rows, axis=-1, keepdims=True)) / temperature
        own = xp.sum(along, axis=-2)
        signs = xp.sign(z[..., :, None] - z[..., None, :])
        return xp.sum(self._places * along, axis=-2) - xp.sum(signs * (own[..., :, None] + own[..., None, :]), axis=-1)

    @property
    def _places(self) -> Array:
        n = self.keys.shape[-1]
        return self.ops.constant(n + 1.0 - 2.0 * np.arange(1, n + 1)[:, None], self.keys)
