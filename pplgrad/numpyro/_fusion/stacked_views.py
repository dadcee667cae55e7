"""Arrays that are rows of one array: stacking them again is free, and so is the derivative of the stack."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def picked(array: jax.Array, rows: list[int], axis: int = 0) -> jax.Array:
    """Return places along an axis: the array itself, one piece of it, or a gather."""
    if rows == list(range(array.shape[axis])):
        return array
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return jax.lax.slice_in_dim(array, rows[0], rows[0] + len(rows), axis=axis)
    before = (slice(None),) * axis
    return array.at[(*before, np.array(rows))].get(mode="promise_in_bounds")


def cut(array: jax.Array, axis: int = 0) -> list[jax.Array]:
    """Return all rows along an axis, whose derivative is one concatenation."""
    parts = jax.lax.split(array, (1,) * array.shape[axis], axis=axis)
    return [jax.lax.squeeze(part, (axis,)) for part in parts]


def gathered(places: Sequence[tuple[jax.Array, int | None]], axis: int = 0) -> jax.Array:
    """Return arrays, or rows of arrays (None: the array), along a new axis, with as few pieces as there are runs of one source."""
    parts: list[tuple[jax.Array, list[int] | None]] = []
    for array, row in places:
        if row is not None and parts and parts[-1][1] is not None and parts[-1][0] is array:
            parts[-1][1].append(row)
        else:
            parts.append((array, None if row is None else [row]))
    if all(rows is None for _, rows in parts):
        return jnp.stack([array for array, _ in parts], axis=axis)
    pieces = [jnp.expand_dims(x, axis) if rows is None else picked(x, rows, axis) for x, rows in parts]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


class StackedViews:
    """Which arrays (particles, ...) are rows of which array (particles, rows, ...)."""

    def __init__(self) -> None:
        # The arrays are kept, so that no other one gets their identity.
        self._known: dict[int, tuple[jax.Array, jax.Array, int]] = {}
        self._cut: dict[int, list[jax.Array]] = {}
        self._constant: dict[int, jax.Array] = {}

    def row(self, source: jax.Array, number: int) -> jax.Array:
        """Return a row of an array, and remember it."""
        if id(source) not in self._cut:
            self._cut[id(source)] = cut(source, axis=1)
            for place, x in enumerate(self._cut[id(source)]):
                self._known[id(x)] = x, source, place
        return self._cut[id(source)][number]

    def constant(self, x: jax.Array) -> jax.Array:
        """Return an array as a constant to differentiation: if it is a row, as a row of a constant."""
        if id(x) not in self._known:
            return jax.lax.stop_gradient(x)
        _, source, number = self._known[id(x)]
        if id(source) not in self._constant:
            self._constant[id(source)] = jax.lax.stop_gradient(source)
        return self.row(self._constant[id(source)], number)

    def stack(self, arrays: Sequence[jax.Array], axis: int) -> jax.Array:
        """Return arrays with a new axis, 0 or 1; rows of one array in one piece."""
        if not any(id(x) in self._known for x in arrays):
            return jnp.stack(arrays, axis=axis)
        found = gathered([self._known.get(id(x), (x, x, None))[1:] for x in arrays], axis=1)
        return found if axis == 1 else jnp.moveaxis(found, 1, 0)
