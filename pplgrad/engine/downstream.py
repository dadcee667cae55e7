"""Downstream costs: for each site the sum of the costs that depend on it, reduced to the site's own plates.

This is the Rao-Blackwellisation of Schulman et al. (2015), equation 4, and of Ranganath et al. (2014), section 3,
with what the sums of several sites share added up once.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.plates import AFTER, BEFORE, SAME
from pplgrad.core.shapes import aligned, to_shape
from pplgrad.engine.layout import CostGroup, Layout, Link, SiteGroup


def stacked_costs(ops: Ops, costs: list[Array], group: CostGroup) -> Array:
    """Return the costs of a group as one array of shape (n, particles, *shape)."""
    return ops.stack([to_shape(ops, costs[i], group.shape) for i in group.members], 0)


def joined_costs(ops: Ops, costs: list[Array], group: CostGroup) -> Array:
    """Return the signed costs of a group, those of each part added up, as one array of shape (parts, particles, *shape)."""
    arrays = [to_shape(ops, costs[i], group.shape) for i in group.members]
    gains, losses = (
        _added(ops, [[arrays[i] for i in part if group.signs[i] == sign] for part in group.parts]) for sign in (1, -1)
    )
    if losses is None:
        return gains
    return -losses if gains is None else gains - losses


def _added(ops: Ops, parts: list[list[Array]]) -> Array | None:
    """Return the sum of each part's arrays, one below the other; None if there is no array."""
    longest, count = max(map(len, parts)), sum(map(len, parts))
    if count == 0:
        return None
    zero = None
    if count < len(parts) * longest:
        zero = ops.xp.zeros_like(next(part[0] for part in parts if part))
    if len(parts) == 1 or len(parts) * longest > 2 * count:
        return ops.stack([_total(ops, part) if part else zero for part in parts], 0)
    # Whole stacks are added, so that there are as many operations as arrays in a part, and not as arrays.
    stacks = [ops.stack([part[k] if k < len(part) else zero for part in parts], 0) for k in range(longest)]
    return reduce(add, stacks)


def _total(ops: Ops, arrays: list[Array]) -> Array:
    return reduce(add, arrays) if len(arrays) < 4 else ops.xp.sum(ops.stack(arrays, 0), axis=0)


def stacked_scores(ops: Ops, scores: list[Array], group: SiteGroup) -> Array:
    """Return log q of a group's sites as one array of shape (particles, n, *shape)."""
    xp = ops.xp
    arrays = [to_shape(ops, scores[i], group.shape) for i in group.members]
    wanted = (arrays[0].shape[0], *group.shape)
    arrays = [x if tuple(x.shape) == wanted else xp.broadcast_to(x, wanted) for x in arrays]
    return ops.stack(arrays, 1)


def downstream(ops: Ops, layout: Layout, group: int, stacks: list[Array], constant: bool = True) -> Array:
    """Return the downstream cost of a group's sites, of shape (particles, n, *shape), as a constant or not."""
    sites = layout.site_groups[group]
    total = None
    for link in layout.links[group]:
        values = ops.stop_gradient(stacks[link.costs]) if constant else stacks[link.costs]
        part = _linked(ops, values, link, len(sites.shape))
        total = part if total is None else total + part
    particles = stacks[0].shape[1]
    wanted = (len(sites.members), particles, *sites.shape)
    if total is None:
        total = ops.constant(np.zeros(()), stacks[0])
    total = total if tuple(total.shape) == wanted else ops.xp.broadcast_to(total, wanted)
    return ops.xp.moveaxis(total, 0, 1)


def _linked(ops: Ops, values: Array, link: Link, ndim: int) -> Array:
    """Return one cost group's part of the downstream cost, of shape (sites, particles, *broadcastable)."""
    xp = ops.xp
    if link.summed:
        values = xp.sum(values, axis=link.summed, keepdims=True)
    values = aligned(ops, values, 2, ndim)
    total = None
    for flag, sums in link.sums.items():
        part = sums(ops, _shifted(ops, values, flag, link.time_dim))
        total = part if total is None else total + part
    return total


def _shifted(ops: Ops, values: Array, flag: int, time_dim: int | None) -> Array:
    """Return, for each step, the costs of the same step, of all later steps, or of all earlier ones."""
    if time_dim is None or flag == SAME:
        return values
    xp = ops.xp
    if flag == AFTER:
        later = xp.flip(xp.cumulative_sum(xp.flip(values, axis=time_dim), axis=time_dim), axis=time_dim)
        return later - values
    assert flag == BEFORE
    return xp.cumulative_sum(values, axis=time_dim) - values
