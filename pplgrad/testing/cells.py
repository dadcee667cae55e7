"""Uniform numbers cut into the cells on which a program's finite draws, and its estimators' finite noise, are constant.

A draw is the inverse of its distribution function at a uniform number, so that the primary run and every branch draw
from the same number, as NumPyro's do with the same key; the expectation is a sum over cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.noise import Noise

Arrays = dict[str, np.ndarray]


def cells(probabilities: Arrays) -> Iterator[tuple[Arrays, float]]:
    """Yield one uniform number for each element of each site, and the size of its cell.

    `probabilities` holds, for each site, those of the categories under every outcome of the program: (outcomes,
    *shape, categories).
    """
    shapes = {name: table.shape[1:-1] for name, table in probabilities.items()}
    choices: list[list[tuple[float, float]]] = []
    for table in probabilities.values():
        cuts = np.cumsum(table, -1)[..., :-1].reshape(len(table), math.prod(table.shape[1:-1]), table.shape[-1] - 1)
        for element in range(cuts.shape[1]):
            edges = np.unique(np.concatenate([[0.0, 1.0], cuts[:, element].ravel()]))
            choices.append([((a + b) / 2, b - a) for a, b in itertools.pairwise(edges) if b - a > 1e-13])
    for picked in itertools.product(*choices):
        uniforms, start = {}, 0
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            uniforms[name] = np.array([u for u, _ in picked[start : start + count]]).reshape(shape)
            start += count
        yield uniforms, float(np.prod([size for _, size in picked]))


@dataclass
class NoiseShapes:
    """The finite noise that estimators asked for in one run: site, shape and number of categories of each call."""

    calls: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)

    def recording(self, site: str, ops: Ops) -> Noise:
        """Return noise that notes what it is asked for, and is what is most probable."""
        return _Recording(ops, site, self.calls)

    def outcomes(self) -> Iterator[list[np.ndarray]]:
        """Yield every joint outcome, an array for each call."""
        supports = [range(n) for _, shape, n in self.calls for _ in range(int(np.prod(shape)))]
        for flat in itertools.product(*supports):
            result, start = [], 0
            for _, shape, _ in self.calls:
                count = int(np.prod(shape))
                result.append(np.array(flat[start : start + count], dtype=int).reshape(shape))
                start += count
            yield result


class _Finite(Noise):
    """Noise that only knows finitely many outcomes."""

    def uniform(self, shape: tuple[int, ...], like: Array) -> Array:
        raise TypeError("This estimator draws uniform numbers, whose outcomes cannot be gone through one by one.")


class _Recording(_Finite):
    def __init__(self, ops: Ops, site: str, calls: list) -> None:
        super().__init__(ops)
        self._site = site
        self._calls = calls

    def bernoulli(self, probs: Array) -> Array:
        self._calls.append((self._site, tuple(probs.shape), 2))
        return self.ops.xp.where(probs > 0.5, self.ops.xp.ones_like(probs), self.ops.xp.zeros_like(probs))

    def categorical(self, log_probs: Array) -> Array:
        self._calls.append((self._site, tuple(log_probs.shape[:-1]), log_probs.shape[-1]))
        return self.ops.xp.argmax(log_probs, axis=-1)


class NoiseRanOut(LookupError):
    """A step drew more of its estimators' noise than was listed for it."""


class ListedNoise:
    """Noise whose outcomes are given, call by call, and the log probability of having drawn them."""

    def __init__(self, outcomes: list[Any]) -> None:
        self._left = list(outcomes)
        self.log_weight: Any = 0.0

    def make(self, site: str, ops: Ops) -> Noise:
        """Return the noise of a site."""
        return _Listed(ops, self)

    def _next(self, ops: Ops, log_probs: Array) -> Any:
        if not self._left:
            raise NoiseRanOut
        return self._left.pop(0)

    def take(self, ops: Ops, log_probs: Array, like: Callable) -> Array:
        """Return the next outcome, and count its probability in; `log_probs` has the categories last."""
        xp = ops.xp
        index = like(self._next(ops, log_probs))
        chosen = xp.take_along_axis(ops.stop_gradient(log_probs), index[..., None], axis=-1)
        self.log_weight = self.log_weight + xp.sum(chosen)
        return index


class NumberedNoise(ListedNoise):
    """Noise of one joint outcome, whose number is read in digits, a digit for each element that is drawn.

    `count`, the number of joint outcomes, is known once everything has been drawn.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.start(0)

    def start(self, number: Any) -> None:
        """Begin a run whose noise is the outcome of this number."""
        self.number, self.count, self.log_weight = number, 1, 0.0

    def _next(self, ops: Ops, log_probs: Array) -> Array:
        shape, categories = log_probs.shape[:-1], log_probs.shape[-1]
        elements = int(np.prod(shape))
        place = self.count * categories ** np.arange(elements).reshape(shape)
        self.count *= categories**elements
        return self.number // place % categories


class _Listed(_Finite):
    def __init__(self, ops: Ops, listed: ListedNoise) -> None:
        super().__init__(ops)
        self._listed = listed

    def bernoulli(self, probs: Array) -> Array:
        xp = self.ops.xp
        log_probs = xp.log(xp.stack([1 - probs, probs], axis=-1))
        index = self.categorical(log_probs)
        return xp.astype(index, probs.dtype)

    def categorical(self, log_probs: Array) -> Array:
        numbers = self.ops.arange(log_probs.shape[-1], log_probs)
        integers = numbers.dtype
        return self._listed.take(
            self.ops, log_probs, lambda x: self.ops.xp.astype(self.ops.constant(x, log_probs), integers)
        )


def z_of(rows: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest |z| of the mean of rows, over coordinates; one that does not vary counts by its error × 1e9."""
    error = np.abs(rows.mean(0) - wanted)
    spread = rows.std(0) / np.sqrt(len(rows))
    return float(np.where(spread > 1e-12, error / np.maximum(spread, 1e-12), error * 1e9).max())


def disturb(name: str, value: np.ndarray) -> np.ndarray:
    """Return a learned number or array moved by noise that its name fixes: an estimator is unbiased wherever they are."""
    rng = np.random.default_rng(sum(map(ord, name)))
    return value + 0.5 * rng.normal(size=value.shape)
