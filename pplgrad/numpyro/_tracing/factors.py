"""Log densities as functions of named variables: their products, and sums over variables and products over plates (variable elimination).

What a sum is depends on a ring. Log Σ exp is the sum of the objective. The two others have a derivative that is one at a single value of
what is summed over, so that the derivative of a whole contraction is a joint value: each sum passes it back to what it was made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dims(NamedTuple):
    """The variables along the batch dimensions of a density by dimension (-1, -2, ...), and which of them are what.

    `summed` are those to sum over, `time` is that of the steps of a scan; the others are plates.
    """

    names: Mapping[int, str]
    summed: frozenset[str]
    time: str | None = None

    @property
    def plates(self) -> frozenset[str]:
        """Return the plates."""
        return frozenset(self.names.values()) - self.summed - {self.time}


@dataclass(frozen=True, eq=False)
class Factor:
    """Numbers along variables, one for each axis."""

    data: jax.Array
    names: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Return how many values each variable has."""
        return dict(zip(self.names, self.data.shape, strict=True))

    def laid_out(self, order: Sequence[str]) -> jax.Array:
        """Return the numbers along variables in an order, of size 1 along those that are none of this factor's."""
        sizes = self.sizes
        axes = [self.names.index(name) for name in order if name in sizes]
        return self.data.transpose(axes).reshape([sizes.get(name, 1) for name in order])

    def multiplied_over(self, names: Iterable[str]) -> Factor:
        """Return the product over all values of some variables, plates or steps."""
        gone = frozenset(names)
        axes = tuple(i for i, name in enumerate(self.names) if name in gone)
        return Factor(self.data.sum(axes), tuple(name for name in self.names if name not in gone))


class Ring:
    """Sums in logarithms: log Σ exp, also where everything is impossible or underflows."""

    def reduce(self, x: jax.Array, axes: tuple[int, ...], key: jax.Array | None) -> jax.Array:
        """Return the sum over some axes; `key` is one of `keys`."""
        top = jax.lax.stop_gradient(x.max(axes, keepdims=True))
        possible = top > -jnp.inf
        top = jnp.where(possible, top, 0.0)
        total = jnp.exp(x - top).sum(axes, keepdims=True)
        # The logarithm of an impossible sum has no derivative, and its place in the total none to anything.
        found = jnp.where(possible, jnp.log(jnp.where(possible, total, 1.0)) + top, -jnp.inf)
        return found.squeeze(axes)

    def keys(self, steps: int | None = None) -> jax.Array | None:
        """Return a key for a sum, or one for each of several steps; None where a sum needs none."""
        return None


class MostProbable(Ring):
    """The largest, whose derivative is one at the first value that has it."""

    def reduce(self, x: jax.Array, axes: tuple[int, ...], key: jax.Array | None) -> jax.Array:
        """Return the largest value along some axes."""
        x = _flat(x, axes)
        return jnp.take_along_axis(x, jnp.argmax(x, -1)[..., None], -1)[..., 0]


class Sampled(Ring):
    """Log Σ exp, whose derivative is one at a value drawn with the probability that the value has in the sum."""

    def __init__(self, key: jax.Array) -> None:
        self._key = key

    def reduce(self, x: jax.Array, axes: tuple[int, ...], key: jax.Array | None) -> jax.Array:
        """Return the sum over some axes."""
        assert key is not None
        total = super().reduce(jax.lax.stop_gradient(x), axes, None)
        x = _flat(x, axes)
        index = jnp.argmax(jax.lax.stop_gradient(x) + jax.random.gumbel(key, x.shape, x.dtype), -1)
        chosen = jnp.take_along_axis(x, index[..., None], -1)[..., 0]
        return total + (chosen - jax.lax.stop_gradient(chosen))

    def keys(self, steps: int | None = None) -> jax.Array | None:
        """Return a key that no other sum has."""
        self._key, key = jax.random.split(self._key)
        return key if steps is None else jax.random.split(key, steps)


def _flat(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    kept = [i for i in range(x.ndim) if i not in axes]
    x = x.transpose([*kept, *axes])
    return x.reshape(*x.shape[: len(kept)], -1)


def product(factors: Iterable[Factor]) -> Factor:
    """Return the product of some factors, a function of all of their variables."""
    factors = list(factors)
    names = tuple(dict.fromkeys(name for f in factors for name in f.names))
    total = jnp.zeros((1,) * len(names))
    for i, f in enumerate(factors):
        total = f.laid_out(names) if i == 0 else total + f.laid_out(names)
    sizes = {name: n for f in factors for name, n in f.sizes.items()}
    return Factor(jnp.broadcast_to(total, [sizes[name] for name in names]), names)


def sum_product(factors: Iterable[Factor], eliminate: frozenset[str], plates: frozenset[str], ring: Ring) -> Factor:
    """Return the product of some factors, summed over some variables, and multiplied over those which are plates.

    The variables of the innermost plates go first, the cheapest one at a time; what is left is multiplied over the plates that
    nothing left stands in (Obermeyer et al., 2019).

    Raises:
        ValueError: what is left has variables of several plates that none of them shares.
    """
    gone, summed = plates & eliminate, eliminate - plates
    pending: dict[frozenset[str], list[Factor]] = {}
    around: dict[str, frozenset[str]] = {}
    for f in factors:
        mine = gone.intersection(f.names)
        pending.setdefault(mine, []).append(f)
        for name in summed.intersection(f.names):
            around[name] = around.get(name, mine) & mine
    done: list[Factor] = []
    while pending:
        leaf = max(pending, key=len)
        variables = [name for name, mine in around.items() if mine == leaf]
        for f in _without(pending.pop(leaf), variables, ring):
            left = [name for name in f.names if name in around and name not in variables]
            outer = frozenset().union(*(around[name] for name in left))
            if left and outer == leaf:
                raise ValueError(f"no order of sums ends, for {', '.join(left)} in {', '.join(sorted(leaf))}")
            f = f.multiplied_over(leaf - outer)
            (pending.setdefault(outer, []) if left else done).append(f)
    return product(done)


def _without(factors: list[Factor], variables: Iterable[str], ring: Ring) -> list[Factor]:
    """Return factors whose product is that of some others, summed over variables, the one with the smallest joint first."""
    left = dict(enumerate(factors))
    holders = {name: {i for i, f in left.items() if name in f.names} for name in variables}

    def cost(name: str) -> int:
        sizes = {other: n for i in holders[name] for other, n in left[i].sizes.items()}
        return math.prod(sizes.values())

    costs = {name: cost(name) for name in holders}
    for number in range(len(factors), len(factors) + len(holders)):
        name = min(costs, key=costs.__getitem__)
        joint = product(left[i] for i in sorted(holders[name]))
        for i in holders.pop(name):
            del left[i]
            for others in holders.values():
                others.discard(i)
        del costs[name]
        # Variables that stand nowhere else go along with it.
        alone = [other for other in holders if not holders[other] and other in joint.names]
        axes = tuple(sorted(joint.names.index(other) for other in (name, *alone)))
        for other in alone:
            del holders[other], costs[other]
        found = Factor(
            ring.reduce(joint.data, axes, ring.keys()), tuple(n for i, n in enumerate(joint.names) if i not in axes)
        )
        left[number] = found
        for other in holders.keys() & set(found.names):
            holders[other].add(number)
            costs[other] = cost(other)
        if not holders:
            break
    return list(left.values())
