"""A mixture of location-scale laws: what its components' noise is at a draw, and how the draw moves with the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pplgrad.core.array_ops import Array, Ops, bounded
from pplgrad.core.location_scale import LAWS
from pplgrad.core.noise import Noise


@dataclass(frozen=True)
class Components:
    """Components of one family: x = loc + scale · z, or the exponential of that; E is the shape of the value of one element.

    Attributes:
        law: the name of z's law in `LAWS`.
        loc: the locations, (..., components, *E), with their gradient.
        scale: the scales, (..., components, *E), with their gradient; if `correlated`, lower triangles (..., components, n, n).
        of_log: whether the law is that of log x.
        correlated: whether the entries of x are correlated: x = loc + scale @ z.
    """

    law: str
    loc: Array
    scale: Array
    of_log: bool = False
    correlated: bool = False

    def mapped(self, function: Callable[[Array, int], Array]) -> Components:
        """Return the components with a function of both arrays, which gets the number of dimensions of E beside each."""
        return replace(self, loc=function(self.loc, 0), scale=function(self.scale, int(self.correlated)))

    def noise_at(self, ops: Ops, x: Array) -> Array:
        """Return the noise z that would give each component the value x, (..., 1, *E): a constant, (..., components, *E)."""
        u = (ops.xp.log(x) if self.of_log else x) - ops.stop_gradient(self.loc)
        scale = ops.stop_gradient(self.scale)
        return ops.xp.linalg.solve(scale, u[..., None])[..., 0] if self.correlated else u / scale

    def at(self, ops: Ops, z: Array) -> Array:
        """Return the values of the components at some noise, with gradient to the parameters."""
        moved = ops.xp.matmul(self.scale, z[..., None])[..., 0] if self.correlated else self.scale * z
        return ops.xp.exp(self.loc + moved) if self.of_log else self.loc + moved

    def log_density(self, ops: Ops, z: Array) -> Array:
        """Return the log density of each entry at some noise, a constant (..., components, *E): of log x where the law is that of log x."""
        scale = ops.stop_gradient(self.scale)
        if self.correlated:
            scale = ops.xp.linalg.diagonal(scale)
        return LAWS[self.law].log_density(ops, z) - ops.xp.log(scale)


@dataclass(frozen=True)
class Mixture:
    """A mixture of K components, given where its value is.

    Attributes:
        value: the draw, a constant (..., *E).
        log_weights: the logarithms of the weights, (..., K), with their gradient; that of a weight of 0 is a constant far below.
        parts: the components, those of one family in each part, K in all.
        event_dim: the number of dimensions of E.
    """

    value: Array
    log_weights: Array
    parts: tuple[Components, ...]
    event_dim: int

    @classmethod
    def of(cls, ops: Ops, value: Array, log_weights: Array, parts: tuple[Components, ...], event_dim: int) -> Mixture:
        """Return a mixture whose arrays have all dimensions of the value (the hosts' may lack some)."""
        xp = ops.xp
        batch = tuple(value.shape[: len(value.shape) - event_dim])

        def whole(x: Array, more: int) -> Array:
            return xp.broadcast_to(x, (*batch, *x.shape[len(x.shape) - event_dim - more - 1 :]))

        weights = bounded(xp, xp.broadcast_to(log_weights, (*batch, log_weights.shape[-1])))
        return cls(ops.stop_gradient(value), weights, tuple(part.mapped(whole) for part in parts), event_dim)

    def mapped(self, function: Callable[[Array, int], Array]) -> Mixture:
        """Return the mixture with a function of all arrays, which gets the number of dimensions behind those of the value's batch."""
        e = self.event_dim
        parts = tuple(part.mapped(lambda x, more: function(x, 1 + e + more)) for part in self.parts)
        return replace(self, value=function(self.value, e), log_weights=function(self.log_weights, 1), parts=parts)

    @property
    def one_family(self) -> bool:
        """Return whether the noise of one component is noise of all others."""
        return len({(part.law, part.of_log) for part in self.parts}) == 1

    def noise(self, ops: Ops) -> Array:
        """Return the noise of each component at the value, (..., K, *E)."""
        x = ops.xp.expand_dims(self.value, axis=self._axis)
        return self._joined(ops, [part.noise_at(ops, x) for part in self.parts])

    def fresh_noise(self, noise: Noise) -> Array:
        """Return noise of each component that has nothing to do with the value, (..., K, *E)."""
        parts = [LAWS[part.law].draw(noise, tuple(part.loc.shape), part.loc) for part in self.parts]
        return self._joined(noise.ops, parts)

    def at(self, ops: Ops, z: Array) -> Array:
        """Return the value of each component at its noise, (..., K, *E), with gradient to the components' parameters."""
        return self._joined(ops, [part.at(ops, z) for part, z in zip(self.parts, self._split(z), strict=True)])

    def entry_log_densities(self, ops: Ops, z: Array) -> Array:
        """Return the log density of each entry of each component at its noise, (..., K, *E)."""
        parts = zip(self.parts, self._split(z), strict=True)
        return self._joined(ops, [part.log_density(ops, z) for part, z in parts])

    def log_responsibilities(self, ops: Ops, z: Array) -> Array:
        """Return the log probability that each component has drawn the value, (..., K), a constant."""
        behind = tuple(range(-self.event_dim, 0))
        found = self.entry_log_densities(ops, z)
        found = (ops.xp.sum(found, axis=behind) if behind else found) + ops.stop_gradient(self.log_weights)
        return found - log_sum(ops, found)

    def moved_by_components(self, ops: Ops, z: Array, log_r: Array) -> Array:
        """Return Σ_k r_k (x_k − x_k as a constant), (..., *E): 0, with the gradient of the value to the components' parameters.

        x_k moves with the parameters of component k at fixed noise, and r_k is the probability that this component drew the value.
        """
        paths = self.at(ops, z)
        r = ops.xp.reshape(ops.xp.exp(log_r), (*log_r.shape, *(1,) * self.event_dim))
        return ops.xp.sum(r * (paths - ops.stop_gradient(paths)), axis=self._axis)

    def moved_by_weights(self, ops: Ops, z: Array) -> Array:
        """Return 0 with the gradient of the value to the weights, (..., *E), entry by entry at a fixed conditional distribution function.

        Entry d moves by −Σ_k ∇w_k F_k(x_d) / q(x_d | x_<d). F_k is the distribution function of component k, and w_k its weight given the
        entries before d, which move too. Above the median F_k is replaced by F_k − 1, which is exact in the upper tail.
        """
        xp = ops.xp
        logs = self.entry_log_densities(ops, z)
        tables = [self._functions(ops, part, x) for part, x in zip(self.parts, self._split(z), strict=True)]
        below, above, slopes = (self._joined(ops, list(column)) for column in zip(*tables, strict=True))
        flat = (*self.log_weights.shape, -1)
        logs, below, above, slopes = (xp.reshape(x, flat) for x in (logs, below, above, slopes))
        tiny = math.log(float(xp.finfo(logs.dtype).tiny))
        weights, moved = self.log_weights, []
        for d in range(logs.shape[-1]):
            weights = weights - log_sum(ops, weights)
            fixed = ops.stop_gradient(weights)
            probs = xp.exp(fixed)
            density = log_sum(ops, fixed + logs[..., d])
            is_upper = xp.sum(probs * below[..., d], axis=-1, keepdims=True) > 0.5
            mass = xp.where(is_upper, -above[..., d], below[..., d])
            step = xp.sum((probs * (weights - fixed)) * mass, axis=-1, keepdims=True)
            step = -step * xp.exp(-xp.clip(density, min=tiny))
            moved.append(step)
            weights = weights + logs[..., d] + slopes[..., d] * step
        found = xp.reshape(xp.concat(moved, axis=-1), self.value.shape)
        return found * self.value if self.parts[0].of_log else found

    def _functions(self, ops: Ops, part: Components, z: Array) -> tuple[Array, Array, Array]:
        law, scale = LAWS[part.law], ops.stop_gradient(part.scale)
        return law.below(ops, z), law.above(ops, z), law.slope(ops, z) / scale

    @property
    def _axis(self) -> int:
        return -1 - self.event_dim

    def _joined(self, ops: Ops, parts: list[Array]) -> Array:
        return parts[0] if len(parts) == 1 else ops.xp.concat(parts, axis=self._axis)

    def _split(self, x: Array) -> list[Array]:
        found, start = [], 0
        behind = (slice(None),) * self.event_dim
        for part in self.parts:
            stop = start + part.loc.shape[self._axis]
            found.append(x[(..., slice(start, stop), *behind)])
            start = stop
        return found


def log_sum(ops: Ops, x: Array) -> Array:
    """Return log Σ exp over the last axis, which stays, of length 1."""
    xp = ops.xp
    top = ops.stop_gradient(xp.max(x, axis=-1, keepdims=True))
    return top + xp.log(xp.sum(xp.exp(x - top), axis=-1, keepdims=True))
