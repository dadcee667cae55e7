"""Laws of subsets and permutations in array operations: log densities, exact marginals and draws.

Subsets of k of n items with weights exp θ are counted in a binary tree over the items. A node holds, for j = 0, …, k, the log of the sum
of the weights of all sets of j of its items; the root holds log e_k. That is O(n k) operations in O(log n) steps. Items that are never
chosen have the log weight of `array_ops.bounded`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from pplgrad.core.array_ops import Array, Ops, bounded, is_possible
from pplgrad.core.noise import Noise

LAWS = ("Subset", "PlackettLuce", "PermutationMatrix")
"""The names of both plug-ins' distributions whose value is one vector or matrix, and no independent elements."""

MOST_SUBSETS = 4096
MOST_RANKED = 6


def subset_size(k: Any, n: int) -> int:
    """Return k, the number of items that `Subset` chooses among n, or raise `ValueError`."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"Subset(k={k!r}) over {n} items: k is the number of chosen items, an integer from 1 to {n}.")
    return k


def few(values: np.ndarray | None, law: str, n: int) -> np.ndarray:
    """Return all values of a law over n items, or raise `NotImplementedError` if they are too many."""
    if values is None:
        raise NotImplementedError(f"{law} over {n} items has too many values to list.")
    return values


def subsets(n: int, k: int) -> np.ndarray | None:
    """Return all binary vectors of length n with k ones, 1 ≤ k ≤ n, (C(n, k), n), or None if there are more than `MOST_SUBSETS`.

    >>> subsets(3, 2).tolist()
    [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    """
    if math.comb(n, k) > MOST_SUBSETS:
        return None
    chosen = np.array(list(itertools.combinations(range(n), k)), dtype=int)
    return np.eye(n, dtype=int)[chosen].sum(1)


def permutations(n: int) -> np.ndarray | None:
    """Return all rankings of n items, (n!, n), or None if there are more than `MOST_RANKED` items.

    >>> permutations(2).tolist()
    [[0, 1], [1, 0]]
    """
    if n > MOST_RANKED:
        return None
    return np.array(list(itertools.permutations(range(n))), dtype=int).reshape(-1, n)


def subset_log_prob(ops: Ops, logits: Array, k: int, value: Array) -> Array:
    """Return Σ_i z_i θ_i − log e_k(exp θ), of the batch shape of logits (..., n) and z (..., n); linear in z."""
    xp = ops.xp
    possible = is_possible(xp, logits)
    value = xp.astype(value, logits.dtype)
    linear = xp.sum(value * xp.where(possible, logits, xp.zeros_like(logits)), axis=-1)
    # An item that is never chosen has no part in the density unless it was chosen: with all of its weight, that is −inf.
    never = xp.sum(xp.where(possible, xp.zeros_like(value), value), axis=-1)
    return linear - _levels(ops, logits, k)[-1][..., 0, k] + xp.log(xp.clip(1 - never, min=0.0))


def subset_marginals(ops: Ops, logits: Array, k: int) -> Array:
    """Return the probability that each item is chosen, (..., n), with its gradient to the logits.

    From the root down, a node's law of how many of its items are chosen is split between its two halves.
    """
    xp = ops.xp
    levels = _levels(ops, logits, k)
    law = xp.broadcast_to(_one_at(ops, k, logits), levels[-1].shape)
    for node, halves in zip(levels[:0:-1], levels[-2::-1], strict=True):
        left, right = halves[..., 0::2, :], halves[..., 1::2, :]
        parts = []
        for mine, other in ((left, right), (right, left)):
            joint = xp.exp(_joint(ops, mine, other, node.shape[-1]) - node[..., None])
            parts.append(xp.sum(law[..., None] * joint, axis=-2))
        law = _interleaved(xp, *parts)
    return law[..., : logits.shape[-1], 1]


def subset_draw(ops: Ops, noise: Noise, logits: Array, k: int) -> Array:
    """Return a binary vector with k ones for each row of the logits, drawn exactly: the number of each half given that of the whole."""
    xp = ops.xp
    levels = _levels(ops, ops.stop_gradient(logits), k)
    chosen = xp.broadcast_to(ops.arange(1, logits) + k, levels[-1].shape[:-1])
    for node, halves in zip(levels[:0:-1], levels[-2::-1], strict=True):
        left, right = halves[..., 0::2, :], halves[..., 1::2, :]
        every = _joint(ops, left, right, node.shape[-1])
        wanted = xp.broadcast_to(chosen[..., None, None], (*chosen.shape, 1, every.shape[-1]))
        first = noise.categorical(xp.take_along_axis(every, wanted, axis=-2)[..., 0, :])
        chosen = _interleaved(xp, first[..., None], (chosen - first)[..., None])[..., 0]
    return xp.astype(chosen[..., : logits.shape[-1]], logits.dtype)


def ranking_log_prob(ops: Ops, logits: Array, value: Array) -> Array:
    """Return Σ_i [θ_π_i − log Σ_{j ≥ i} exp θ_π_j], of the batch shape of logits (..., n) and rankings π (..., n)."""
    xp = ops.xp
    shape = np.broadcast_shapes(tuple(logits.shape), tuple(value.shape))
    ranked = xp.take_along_axis(xp.broadcast_to(logits, shape), xp.broadcast_to(value, shape), axis=-1)
    return xp.sum(ranked - _log_sum_of_rest(ops, ranked), axis=-1)


def matrix_log_prob(ops: Ops, logits: Array, value: Array) -> Array:
    """Return the log density of rankings as permutation matrices (..., n, n), and its extension to weights in each row.

    A row's place is taken by the mean of the logits under its weights: Σ_i [Σ_j P_ij θ_j − log Σ_{m ≥ i} exp Σ_j P_mj θ_j].
    """
    ranked = ops.xp.sum(value * logits[..., None, :], axis=-1)
    return ops.xp.sum(ranked - _log_sum_of_rest(ops, ranked), axis=-1)


def as_matrix(ops: Ops, order: Array, like: Array) -> Array:
    """Return rankings (..., n) as permutation matrices (..., n, n) of the type of `like`: row i has its one at the item in place i."""
    return ops.xp.astype(order[..., None] == ops.arange(order.shape[-1], like), like.dtype)


def given_ranking(ops: Ops, noise: Noise, logits: Array, order: Array) -> tuple[Array, Array, Array]:
    """Return logits plus Gumbel noise given a ranking π, in its order, (..., n), and what their derivatives are made of.

    With exponential numbers e_m and S_m = Σ_{j ≥ m} exp θ_π_j, exp(−z_k) = Σ_{m ≤ k} e_m / S_m. The second array has the parts
    (e_m / S_m) exp z_k of these sums, (..., n, n) by k and m; the third the shares exp(θ_π_r) / S_m of those, by m and r.
    """
    xp = ops.xp
    ranked = xp.take_along_axis(logits, order, axis=-1)
    rest = _log_sum_of_rest(ops, ranked)
    step = xp.log(-xp.log(noise.uniform(tuple(ranked.shape), ranked))) - rest
    keys = -xp.flip(_log_sum_of_rest(ops, xp.flip(step, axis=-1)), axis=-1)
    until = ops.constant(np.tri(ranked.shape[-1]), ranked)
    never = xp.zeros_like(until)
    parts = xp.exp(xp.where(until > 0, step[..., None, :] + keys[..., :, None], never)) * until
    onwards = xp.permute_dims(until, (1, 0))
    shares = xp.exp(xp.where(onwards > 0, ranked[..., None, :] - rest[..., :, None], never)) * onwards
    return keys, parts, shares


def _log_sum_of_rest(ops: Ops, x: Array) -> Array:
    """Return log Σ_{j ≥ i} exp x_j along the last axis, by doubling: after each step a sum is over twice as many."""
    xp, distance = ops.xp, 1
    while distance < x.shape[-1]:
        x = xp.concat([xp.logaddexp(x[..., :-distance], x[..., distance:]), x[..., -distance:]], axis=-1)
        distance *= 2
    return x


def ranking_draw(ops: Ops, noise: Noise, logits: Array) -> Array:
    """Return a ranking for each row of the logits: the order of the logits plus Gumbel noise, the largest first."""
    xp = ops.xp
    uniform = noise.uniform(tuple(logits.shape), logits)
    return xp.argsort(ops.stop_gradient(logits) - xp.log(-xp.log(uniform)), axis=-1, descending=True)


def largest(ops: Ops, scores: Array, k: int) -> Array:
    """Return the binary vectors of the k largest scores, (..., n): the subset of the highest density."""
    xp = ops.xp
    ranks = xp.argsort(xp.argsort(scores, axis=-1, descending=True), axis=-1)
    return xp.astype(ranks < k, scores.dtype)


def perturbed_to(ops: Ops, noise: Noise, logits: Array, value: Array) -> Array:
    """Return logits plus noise of which the k largest are those of a drawn subset, (..., n), a constant.

    The noise of the items that were not chosen is Gumbel; that of the chosen ones is Gumbel, cut off below the largest of the others.
    """
    xp = ops.xp
    fixed = ops.stop_gradient(logits)
    uniform = noise.uniform(tuple(fixed.shape), fixed)
    free = fixed - xp.log(-xp.log(uniform))
    chosen = value > 0.5
    never = bounded(xp, xp.full_like(free, -math.inf))
    top = xp.max(xp.where(chosen, never, free), axis=-1, keepdims=True)
    # exp(θ - γ) of a Gumbel γ above the largest of the others is an exponential number below exp(θ - largest).
    below = xp.exp(xp.clip(fixed - top, max=80.0))
    cut = -xp.log1p(uniform * xp.expm1(-below))
    cut = xp.clip(cut, min=float(xp.finfo(fixed.dtype).tiny))
    return xp.where(chosen, fixed - xp.log(cut), free)


def _levels(ops: Ops, logits: Array, k: int) -> list[Array]:
    """Return the tree, leaves first: level l has shape (..., nodes, min(2^l, k) + 1)."""
    xp = ops.xp
    logits = bounded(xp, logits)
    missing = (1 << max(logits.shape[-1] - 1, 0).bit_length()) - logits.shape[-1]
    if missing:
        shape = (*logits.shape[:-1], missing)
        never = bounded(xp, xp.broadcast_to(xp.full_like(logits[..., :1], -math.inf), shape))
        logits = xp.concat([logits, never], axis=-1)
    levels = [xp.stack([xp.zeros_like(logits), logits], axis=-1)]
    while levels[-1].shape[-2] > 1:
        left, right = levels[-1][..., 0::2, :], levels[-1][..., 1::2, :]
        wide = min(2 * (left.shape[-1] - 1), k) + 1
        levels.append(_logsumexp(ops, _joint(ops, left, right, wide)))
    return levels


def _joint(ops: Ops, left: Array, right: Array, wide: int) -> Array:
    """Return log weights (..., nodes, wide, width): of j items in all, a of them from the left half and j - a from the right."""
    xp, width = ops.xp, left.shape[-1]
    rest = np.arange(wide)[:, None] - np.arange(width)
    inside = (rest >= 0) & (rest < width)
    places = ops.constant(np.clip(rest, 0, width - 1).reshape(-1), ops.arange(1, left))
    others = xp.reshape(xp.take(right, places, axis=-1), (*right.shape[:-1], wide, width))
    never = bounded(xp, xp.full_like(others, -math.inf))
    both = left[..., None, :] + xp.where(ops.constant(inside, ops.arange(1, left)) > 0, others, never)
    return xp.maximum(both, never)


def _logsumexp(ops: Ops, x: Array) -> Array:
    xp = ops.xp
    top = ops.stop_gradient(xp.max(x, axis=-1, keepdims=True))
    return xp.log(xp.sum(xp.exp(x - top), axis=-1)) + top[..., 0]


def _one_at(ops: Ops, k: int, like: Array) -> Array:
    return ops.constant(np.eye(k + 1)[k], like)


def _interleaved(xp: object, first: Array, second: Array) -> Array:
    """Return nodes (..., 2 m, width) of which those with even numbers are `first`, (..., m, width)."""
    both = xp.stack([first, second], axis=-2)  # type: ignore[attr-defined]
    return xp.reshape(both, (*first.shape[:-2], -1, first.shape[-1]))  # type: ignore[attr-defined]
