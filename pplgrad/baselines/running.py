"""Decaying averages kept from step to step, for all elements together or for each element of the site's plates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.baseline import BaselineTerms
from pplgrad.core.plates import Plate


def average_shapes(names: Sequence[str], plates: Sequence[Plate], per_element: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the named averages and of their common weight: the full plates' sizes, or scalars."""
    shape: tuple[int, ...] = ()
    if per_element:
        sizes = [1] * max((-plate.dim for plate in plates), default=0)
        for plate in plates:
            sizes[plate.dim] = plate.full_size
        shape = tuple(sizes)
    return dict.fromkeys((*names, "weight"), shape)


def read_averages(terms: BaselineTerms, names: Sequence[str], per_element: bool) -> list[Array]:
    """Return the averages of past values at this draw's elements, bias-corrected; zero where there is no past."""
    xp, state = terms.ops.xp, terms.state
    weight = state["weight"]
    known = weight > 0
    safe = xp.where(known, weight, xp.ones_like(weight))
    values = [xp.where(known, state[name] / safe, xp.zeros_like(weight)) for name in names]
    if not per_element:
        return [xp.reshape(x, (-1, *(1,) * (len(terms.cost.shape) - 2))) for x in values] if terms.sites else values
    index = _flat_index(terms)
    return [terms.ops.take(xp.reshape(value, (-1,)), index) for value in values]


def update_averages(
    terms: BaselineTerms, values: Mapping[str, Array], decay: float, per_element: bool
) -> dict[str, Array]:
    """Return the state after this draw: decay · old + (1 − decay) · new, where an element was seen."""
    xp, state = terms.ops.xp, terms.state
    if not per_element:
        axes = tuple(axis for axis in range(len(terms.cost.shape)) if axis != 1) if terms.sites else None
        means = _over_peers(terms, [xp.mean(value, axis=axes) for value in values.values()], mean=True)
        new = {name: decay * state[name] + (1 - decay) * x for name, x in zip(values, means, strict=True)}
        return {**new, "weight": decay * state["weight"] + (1 - decay)}
    index = _flat_index(terms)
    shape = tuple(state["weight"].shape)
    zeros = xp.reshape(xp.zeros_like(state["weight"]), (-1,))
    full = (terms.cost.shape[0], *terms.cost.shape[1:])
    flat = xp.reshape(xp.broadcast_to(index, full), (-1,))
    ones = xp.reshape(xp.ones_like(terms.cost), (-1,))
    parts = [xp.reshape(xp.broadcast_to(value, full), (-1,)) for value in values.values()]
    seen, *sums = _over_peers(terms, [terms.ops.index_add(zeros, flat, x) for x in (ones, *parts)])
    counts = xp.where(seen > 0, seen, xp.ones_like(seen))

    def blended(old: Array, total: Array) -> Array:
        old = xp.reshape(old, (-1,))
        return xp.reshape(xp.where(seen > 0, decay * old + (1 - decay) * total / counts, old), shape)

    new = {name: blended(state[name], total) for name, total in zip(values, sums, strict=True)}
    return {**new, "weight": blended(state["weight"], seen)}


def _over_peers(terms: BaselineTerms, arrays: Sequence[Array], mean: bool = False) -> list[Array]:
    """Return the sum or the mean over all processes of arrays of one shape, in one exchange."""
    peers = terms.peers
    if peers is None:
        return list(arrays)
    total = peers.total(terms.ops.xp.stack(list(arrays), axis=0))
    total = total / peers.count if mean else total
    return [total[i] for i in range(len(arrays))]


def _flat_index(terms: BaselineTerms) -> Array:
    """Return each element's position in the flattened state, of shape (particles or 1, *elements)."""
    ops, cost = terms.ops, terms.cost
    ndim = len(cost.shape) - 1
    index = ops.xp.reshape(ops.arange(1, cost), (1,) * (ndim + 1))
    stride = 1
    for plate in sorted(terms.plates, key=lambda plate: -plate.dim):
        position = _positions(ops, terms, plate)
        shape = [position.shape[0] if len(position.shape) == 2 else 1] + [1] * ndim
        shape[plate.dim] = plate.size
        index = index + stride * ops.xp.reshape(position, tuple(shape))
        stride *= plate.full_size
    return ops.xp.broadcast_to(index, (index.shape[0], *cost.shape[1:]))


def _positions(ops: Ops, terms: BaselineTerms, plate: Plate) -> Array:
    found = terms.indices.get(plate.name)
    return ops.arange(plate.size, terms.cost) if found is None else found
