"""Antithetic estimators of categorical sites: coupled binary decisions, and coupled draws weighted by their law."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, Ops, is_possible, max_over_categories, sum_over_categories, sum_over_draws
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.antithetic import coupled, partner_of, probability
from pplgrad.estimators.every_draw import WithDrawsAlike
from pplgrad.estimators.site_requirements import require_finite


class _CoupledDecisions(WithDrawsAlike):
    """What the two estimators share: a category is the outcome of binary decisions, each with an antithetic partner."""

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="finitely many values",
        evaluations=1,
        differentiable_costs=False,
        derivatives=1,
        source="Dong, Mnih and Tucker 2021",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    @staticmethod
    @abstractmethod
    def decisions(categories: int) -> np.ndarray:
        """Return a row for each decision: 1 for the categories of its yes, −1 for those of its no, 0 for the others."""

    def check(self, site: SiteInfo) -> None:
        """Refuse a site without finitely many values."""
        require_finite(self, site)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the category that the partners of all decisions lead to."""
        ops, xp = draw.ops, draw.ops.xp
        table = ops.constant(self.decisions(draw.log_probs.shape[-1]), draw.log_probs)
        side = _sides(draw, table, draw.index)
        odds, yes, no = _log_odds(ops, draw.log_probs, table)
        # A decision with one possible outcome has it, so that the partners never lead to an impossible category.
        probs = xp.where(yes & no, probability(ops, odds), xp.astype(yes, odds.dtype))
        # What the draw says nothing about is decided now, as the program would have.
        taken = xp.where(side == 0, draw.noise.bernoulli(probs), (side > 0) * 1.0)
        partner = partner_of(draw.noise, xp, probs, taken == 1)
        missed = xp.sum(xp.where(partner[..., None] == 1, table < 0, table > 0), axis=-2)
        other = xp.astype(xp.argmin(xp.astype(missed, draw.log_probs.dtype), axis=-1), draw.index.dtype)
        concerned = (side != 0) | (_sides(draw, table, other) != 0)
        return Alternatives(draw.embed(other[:, None]), xp.where(concerned, taken - partner, xp.zeros_like(probs)))

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_n α_n ½ (f(z) − f(z̃)) (b_n − b̃_n) σ(|α_n|) over the decisions that z or z̃ passes."""
        draw, ops = terms.draw, terms.ops
        table = ops.constant(self.decisions(draw.log_probs.shape[-1]), draw.log_probs)
        difference = (terms.downstream - terms.costs[:, 0])[..., None, None]
        return coupled(ops, _log_odds(ops, draw.log_probs, table)[0], terms.alternatives.kept, difference)


def _sides(draw: Draw, table: Array, index: Array) -> Array:
    """Return 1, −1 or 0 for each decision, (..., decisions): what a category says of it."""
    return sum_over_categories(draw.ops.xp, draw.one_hot(index)[..., None, :] * table)[..., 0]


def _log_odds(ops: Any, log_probs: Array, table: Array) -> tuple[Array, Array, Array]:
    """Return the log odds of yes for each decision, (..., decisions), and whether yes, and no, are possible.

    Where one is not the log odds are the constant 0: there is nothing to estimate.
    """
    xp = ops.xp
    spread = xp.broadcast_to(log_probs[..., None, :], (*log_probs.shape[:-1], *table.shape))
    least = xp.full_like(spread, float(xp.finfo(log_probs.dtype).min) / 4)
    can = is_possible(xp, log_probs)[..., None, :]
    yes, no = xp.any(can & (table > 0), axis=-1), xp.any(can & (table < 0), axis=-1)

    def total(chosen: Array) -> Array:
        x = xp.where(chosen, spread, least)
        # Where a category is impossible, a gradient through the largest one would be NaN.
        top = ops.stop_gradient(max_over_categories(xp, x))
        return (xp.log(sum_over_categories(xp, xp.exp(x - top))) + top)[..., 0]

    odds = total(table > 0) - total(table < 0)
    return xp.where(yes & no, odds, xp.zeros_like(odds)), yes, no


@dataclass(frozen=True)
class StickBreakingDisARM(_CoupledDecisions):
    r"""DisARM on the binary variables of a stick-breaking construction of the categories.

    Estimates ∇ E_q[f(z)] = E[Σ_c ½ (f(z) − f(z̃)) (b_c − b̃_c) σ(|α_c|) ∇α_c]. z is the first c with b_c = 1, α_c are the log
    odds of category c against all later categories, b̃_c is antithetic to b_c, and z̃ is the category given by the b̃. Variables
    after both z and z̃ are left out, because their terms have mean zero.

    Args:
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any plates and any event shape. All elements change at once, in one evaluation of the program. Costs are in nats.

    Assumptions:
        The cost is finite at every value. A binary variable with one impossible outcome takes the other outcome and contributes
        zero to the estimate.

    Raises:
        EstimatorError: on a site without finitely many values, or that is drawn inside a `scan` in the body of another one.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.
        ConfigurationError: if `differentiate` is neither "own" nor "all".

    Example:
        >>> StickBreakingDisARM.decisions(3).tolist()
        [[1.0, -1.0, -1.0], [0.0, 1.0, -1.0]]

    References:
        Dong, Mnih and Tucker (2021), "Coupled gradient estimators for discrete latent variables", section 3.
    """

    @staticmethod
    @lru_cache
    def decisions(categories: int) -> np.ndarray:
        """Return, for each but the last category, itself against all later ones."""
        table = np.triu(-np.ones((categories, categories)), 1) + np.eye(categories)
        return table[: max(categories - 1, 1)]


@dataclass(frozen=True)
class TreeDisARM(_CoupledDecisions):
    r"""DisARM on the binary decisions of a balanced binary tree whose leaves are the categories.

    Estimates ∇ E_q[f(z)] = E[Σ_n ½ (f(z) − f(z̃)) (b_n − b̃_n) σ(|α_n|) ∇α_n]. α_n are the log odds of the right half at node n,
    b̃_n is antithetic to b_n, and z̃ is the leaf given by the b̃. Nodes on neither the path to z nor the path to z̃ are left out,
    because their terms have mean zero.

    Args:
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any plates and any event shape. All elements change at once, in one evaluation of the program. Costs are in nats.

    Assumptions:
        The cost is finite at every value. A decision with one impossible outcome takes the other outcome and contributes zero to
        the estimate.

    Raises:
        EstimatorError: on a site without finitely many values, or that is drawn inside a `scan` in the body of another one.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.
        ConfigurationError: if `differentiate` is neither "own" nor "all".

    Example:
        >>> TreeDisARM.decisions(3).tolist()
        [[-1.0, 1.0, 1.0], [0.0, -1.0, 1.0]]

    References:
        Dong, Mnih and Tucker (2021), "Coupled gradient estimators for discrete latent variables", section 3.
    """

    @staticmethod
    @lru_cache
    def decisions(categories: int) -> np.ndarray:
        """Return the left half against the right half, for every node."""
        rows = []
        nodes = [(0, categories)]
        while nodes:
            start, stop = nodes.pop(0)
            middle = (start + stop) // 2
            if stop - start > 1:
                row = np.zeros(categories)
                row[start:middle], row[middle:stop] = -1, 1
                rows.append(row)
                nodes += [(start, middle), (middle, stop)]
        return np.stack(rows) if rows else np.ones((1, categories))


@dataclass(frozen=True)
class CARMS(WithDrawsAlike):
    r"""The CARMS estimator: n mutually antithetic categorical draws, with each pair weighted by an importance ratio.

    Estimates ∇θ E_q[f(z)] = E[1/(n(n − 1)) Σ_{i<j} (f(z_i) − f(z_j)) r_ij (∇θ log q(z_i) − ∇θ log q(z_j))] for each element.
    r_ij = q(z_i) q(z_j) / p(z_i, z_j) is the ratio of the probability of a pair under independence to its probability under the
    coupling. The n draws come from a Dirichlet copula through the inverse of the distribution function. The categories are
    taken in a random cyclic order, so that every pair of different values has p > 0.

    Args:
        n: the number of draws, including the program's own; an integer of at least 3. Default: 4.
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any plates and any event shape. All elements change at once, in n − 1 evaluations of the program. Costs are in nats.

    Assumptions:
        The cost is finite at every value. The identity holds because any two values that can be drawn can be drawn together;
        two draws, instead of three or more, do not guarantee this. Values of probability 0 contribute zero.

    Raises:
        EstimatorError: on a site without finitely many values, or that is drawn inside a `scan` in the body of another one.
        ConfigurationError: if n is below 3. Two draws would leave out pairs of values; use `TreeDisARM()`.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.

    Example:
        >>> CARMS(3).declaration.unbiased
        True

    References:
        Dimitriev and Zhou (2021), "CARMS: categorical-antithetic-REINFORCE multi-sample gradient estimator", section 3.
        The random cyclic order is an addition of this package.
    """

    n: int = 4

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="finitely many values",
        evaluations="n − 1",
        differentiable_costs=False,
        derivatives=1,
        source="Dimitriev and Zhou 2021",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n, int) or self.n < 3:
            raise ConfigurationError(f"CARMS(n={self.n!r}): n is the number of draws, an integer of at least 3.")

    def check(self, site: SiteInfo) -> None:
        """Refuse a site without finitely many values."""
        require_finite(self, site)

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the other n − 1 draws of the copula, given the program's own draw as the first."""
        ops, xp, n = draw.ops, draw.ops.xp, self.n
        count, shape = draw.log_probs.shape[-1], tuple(draw.index.shape)
        even = xp.zeros_like(draw.log_probs) - math.log(count)
        order = draw.noise.categorical(ops.stop_gradient(even))
        upper = _upper_edges(draw, order)
        low, high = _edges(xp, upper, (draw.index - order) % count)
        uniform = low + draw.noise.uniform(shape, low) * (high - low)
        first = 1 - uniform ** (1 / (n - 1))
        shares = -xp.log(draw.noise.uniform((shape[0], n - 1, *shape[1:]), low))
        rest = (1 - first)[:, None] * shares / sum_over_draws(xp, shares)[:, None]
        passed = ((1 - rest) ** (n - 1))[..., None] > upper[:, None, ..., :-1]
        others = (xp.sum(xp.astype(passed, draw.index.dtype), axis=-1) + order[:, None]) % count
        return Alternatives(draw.embed(others), others)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return 1/(n(n − 1)) Σ_{i<j} (f_i − f_j) r_ij (log q(z_i) − log q(z_j)), summed over elements."""
        draw, ops, xp, n = terms.draw, terms.ops, terms.ops.xp, self.n
        index = xp.concat([draw.index[:, None], terms.alternatives.kept], axis=1)
        costs = xp.concat([terms.downstream[:, None], terms.costs], axis=1)
        log_q = draw.log_q(index)
        (first, second), (one, other) = _pairs(ops, index), _pairs(ops, log_q)
        joint = _pair_law(draw, first, second, n - 1)
        # Rounding may put a draw on a category of no width, which has no part.
        apart = (first != second) & is_possible(xp, one) & is_possible(xp, other) & (joint > 0)
        both = xp.exp(ops.stop_gradient(one + other))
        ratio = xp.where(apart, both, xp.zeros_like(both)) / xp.where(apart, joint, xp.ones_like(both))
        cost, less = _pairs(ops, costs)
        return xp.sum((cost - less)[..., None] * ratio * (one - other)) / (n * (n - 1))


def _pairs(ops: Ops, x: Array) -> tuple[Array, Array]:
    """Return the first and the second of every two draws, from (particles, n, ...): (particles, pairs, ...) each."""
    picked = np.array(list(itertools.combinations(range(x.shape[1]), 2)))
    first, second = (ops.xp.take(x, ops.constant(picked[:, i], ops.arange(1, x)), axis=1) for i in (0, 1))
    return first, second


def _upper_edges(draw: Draw, order: Array) -> Array:
    """Return the distribution function over the categories from number `order` on, cyclically: (..., categories)."""
    ops, xp = draw.ops, draw.ops.xp
    count = draw.log_probs.shape[-1]
    moved = (order[..., None] + ops.arange(count, order)) % count
    edges = xp.cumulative_sum(xp.take_along_axis(xp.exp(ops.stop_gradient(draw.log_probs)), moved, axis=-1), axis=-1)
    return edges / edges[..., -1:]


def _edges(xp: Any, upper: Array, place: Array) -> tuple[Array, Array]:
    """Return the lower and upper edge of what stands at a place."""
    lower = xp.concat([xp.zeros_like(upper[..., :1]), upper[..., :-1]], axis=-1)
    low, high = (xp.take_along_axis(x, place[..., None], axis=-1)[..., 0] for x in (lower, upper))
    return low, high


def _pair_law(draw: Draw, first: Array, second: Array, power: int) -> Array:
    """Return the probability of two draws that are `first` and `second`, (particles, pairs, ...), where these differ.

    Where there are fewer pairs of categories than of draws, it is computed for those.
    """
    ops, xp = draw.ops, draw.ops.xp
    count, pairs = draw.log_probs.shape[-1], first.shape[1]
    if not 0 < count * (count - 1) // 2 < pairs:
        return _cell_law(draw, first, second, power)
    cells = np.array(list(itertools.combinations(range(count), 2)))
    shape = (first.shape[0], len(cells), *first.shape[2:])
    along = (1, len(cells), *(1 for _ in first.shape[2:]))
    one, other = (xp.broadcast_to(ops.constant(cells[:, i].reshape(along), first), shape) for i in (0, 1))
    table = _cell_law(draw, one, other, power)
    if len(cells) == 1:
        return xp.broadcast_to(table, first.shape)
    number = np.zeros((count, count), dtype=int)
    number[cells[:, 0], cells[:, 1]] = number[cells[:, 1], cells[:, 0]] = np.arange(len(cells))
    found = xp.take(ops.constant(number.reshape(-1), first), xp.reshape(first * count + second, (-1,)), axis=0)
    return xp.take_along_axis(table, xp.reshape(found, first.shape), axis=1)


def _cell_law(draw: Draw, first: Array, second: Array, power: int) -> Array:
    """Return the probability that two draws are of these categories, averaged over the orders.

    The order that starts at a category moves all edges by that category's: all orders are one more axis, the last.
    """
    ops, xp = draw.ops, draw.ops.xp
    probs = xp.exp(ops.stop_gradient(draw.log_probs))
    upper = xp.cumulative_sum(probs, axis=-1)
    probs, upper = probs / upper[..., -1:], upper / upper[..., -1:]
    lower = xp.concat([xp.zeros_like(upper[..., :1]), upper[..., :-1]], axis=-1)
    orders = ops.arange(probs.shape[-1], first)

    def sides(index: Array) -> tuple[Array, Array]:
        """Return what a category's edges are to the power of 1 / m: the lower one, and how much higher the upper one is."""
        place = xp.moveaxis(index, 1, -1)
        low, width = (xp.moveaxis(xp.take_along_axis(x, place, axis=-1), -1, 1)[..., None] for x in (lower, probs))
        before = xp.astype(index[..., None] < orders, probs.dtype)
        low = xp.clip(low - lower[:, None] + before, min=0, max=1)
        high = xp.clip(low + width, max=1)
        low, high = low ** (1 / power), high ** (1 / power)
        return low, high - low

    (x, h), (y, k) = sides(first), sides(second)
    return xp.mean(_rectangle(ops, x + y - 1, h, k, power), axis=-1)


def _rectangle(ops: Ops, x: Array, h: Array, k: Array, m: int) -> Array:
    """Return g(x + h + k) − g(x + h) − g(x + k) + g(x) with g(t) = max(t, 0)^m, as a sum of positive terms."""
    xp = ops.xp
    a, b, origin = xp.clip(x + h, min=0), xp.clip(x + k, min=0), xp.clip(x, min=0)
    below, whole = xp.clip(-x, min=0), xp.clip(x + h + k, min=0)
    wide, high = _powers(xp, origin + h, m), _powers(xp, origin + k, m)
    mixed, narrow = _quotients(xp, origin + h + k, high), _quotients(xp, origin + h, _powers(xp, origin, m))
    inside = h * k * sum(mixed[p] * wide[m - 1 - p] + high[p] * narrow[m - 1 - p] for p in range(m))
    from_a, from_b = (_quotients(xp, whole, _powers(xp, x, m)) for x in (a, b))
    corner = below * from_a[m] + b * ((a + below) * from_b[m - 1] + a * from_a[m - 1])
    beyond = xp.where(b > 0, h * from_b[m], whole**m)
    return xp.where(x >= 0, inside, xp.where(a > 0, xp.where(b > 0, corner, k * from_a[m]), beyond))


def _powers(xp: Any, x: Array, m: int) -> list[Array]:
    """Return the powers 0 to m as products: far cheaper than the function of two arrays."""
    return list(itertools.accumulate([x] * m, xp.multiply, initial=xp.ones_like(x)))


def _quotients(xp: Any, x: Array, powers: Sequence[Array]) -> list[Array]:
    """Return (x^p − y^p) / (x − y) for p from 0 to m, given the powers 0 to m of y, as sums of positive terms x^i y^(p − 1 − i)."""
    found = [xp.zeros_like(x)]
    for power in powers[:-1]:
        found.append(found[-1] * x + power)
    return found
