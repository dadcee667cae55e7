"""Standard laws of one number, of which x = loc + scale · z is drawn: densities, distribution functions and noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.noise import Noise


class StandardLaw(ABC):
    """A law of z, elementwise; `symmetric` says that −z has the same law."""

    symmetric = True

    @abstractmethod
    def log_density(self, ops: Ops, z: Array) -> Array:
        """Return the log density."""

    @abstractmethod
    def slope(self, ops: Ops, z: Array) -> Array:
        """Return the derivative of the log density."""

    @abstractmethod
    def below(self, ops: Ops, z: Array) -> Array:
        """Return the probability of a smaller number, exact where it is small."""

    def above(self, ops: Ops, z: Array) -> Array:
        """Return the probability of a larger number, exact where it is small."""
        assert self.symmetric
        return self.below(ops, -z)

    @abstractmethod
    def draw(self, noise: Noise, shape: tuple[int, ...], like: Array) -> Array:
        """Return draws of a shape."""


class _Normal(StandardLaw):
    def log_density(self, ops: Ops, z: Array) -> Array:
        return -0.5 * z**2 - 0.5 * math.log(2 * math.pi)

    def slope(self, ops: Ops, z: Array) -> Array:
        return -z

    def below(self, ops: Ops, z: Array) -> Array:
        return ops.normal_cdf(z)

    def draw(self, noise: Noise, shape: tuple[int, ...], like: Array) -> Array:
        xp = noise.ops.xp
        radius = xp.sqrt(-2 * xp.log(noise.uniform(shape, like)))
        return radius * xp.cos(2 * math.pi * noise.uniform(shape, like))


class _Laplace(StandardLaw):
    def log_density(self, ops: Ops, z: Array) -> Array:
        return -ops.xp.abs(z) - math.log(2)

    def slope(self, ops: Ops, z: Array) -> Array:
        return -ops.xp.sign(z)

    def below(self, ops: Ops, z: Array) -> Array:
        half = 0.5 * ops.xp.exp(-ops.xp.abs(z))
        return ops.xp.where(z < 0, half, 1 - half)

    def draw(self, noise: Noise, shape: tuple[int, ...], like: Array) -> Array:
        xp = noise.ops.xp
        return xp.log(noise.uniform(shape, like)) - xp.log(noise.uniform(shape, like))


class _Logistic(StandardLaw):
    def log_density(self, ops: Ops, z: Array) -> Array:
        return -z - 2 * ops.xp.logaddexp(ops.xp.zeros_like(z), -z)

    def slope(self, ops: Ops, z: Array) -> Array:
        return -ops.xp.tanh(z / 2)

    def below(self, ops: Ops, z: Array) -> Array:
        return ops.xp.exp(-ops.xp.logaddexp(ops.xp.zeros_like(z), -z))

    def draw(self, noise: Noise, shape: tuple[int, ...], like: Array) -> Array:
        xp, uniform = noise.ops.xp, noise.uniform(shape, like)
        return xp.log(uniform) - xp.log1p(-uniform)


class _Gumbel(StandardLaw):
    symmetric = False

    def log_density(self, ops: Ops, z: Array) -> Array:
        return -z - ops.xp.exp(-z)

    def slope(self, ops: Ops, z: Array) -> Array:
        return ops.xp.expm1(-z)

    def below(self, ops: Ops, z: Array) -> Array:
        return ops.xp.exp(-ops.xp.exp(-z))

    def above(self, ops: Ops, z: Array) -> Array:
        return -ops.xp.expm1(-ops.xp.exp(-z))

    def draw(self, noise: Noise, shape: tuple[int, ...], like: Array) -> Array:
        xp = noise.ops.xp
        return -xp.log(-xp.log(noise.uniform(shape, like)))


class _Cauchy(StandardLaw):
    def log_density(self, ops: Ops, z: Array) -> Array:
        return -ops.xp.log1p(z**2) - math.log(math.pi)

    def slope(self, ops: Ops, z: Array) -> Array:
        return -2 * z / (1 + z**2)

    def below(self, ops: Ops, z: Array) -> Array:
        return ops.xp.atan2(ops.xp.ones_like(z), -z) / math.pi

    def draw(self, noise: Noise, shape: tuple[int, ...], like: Array) -> Array:
        return noise.ops.xp.tan(math.pi * (noise.uniform(shape, like) - 0.5))


LAWS: dict[str, StandardLaw] = {
    "Normal": _Normal(),
    "Laplace": _Laplace(),
    "Logistic": _Logistic(),
    "Gumbel": _Gumbel(),
    "Cauchy": _Cauchy(),
}
"""The standard laws, by the hosts' names of the families that have a location and a scale."""
