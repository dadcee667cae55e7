"""log Σ Π of densities along a chain of summed sites, by products of stacked matrices: few operations, however many steps.

Pyro's contraction goes from step to step. Where the summed sites form a path of equally many values each (a hidden Markov model), the sum is
1ᵀ F_1 F_2 ... F_T 1, with a matrix for each step. Products of neighbours are found pairwise, all of a level at once, in log2(T) levels
(Särkkä and García-Fernández, 2021). Each sum is shifted by its own largest term, so that nothing underflows. A level costs K³ instead of
K², which is little beside the overhead of operations for few values.

What is not known to be such a chain is None, and takes Pyro's contraction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_PER_PRODUCT = 2**15
"""Numbers in the product of two steps up to which the work is little beside the overhead of the operations that it saves."""
_AT_MOST = 2**21
"""Numbers in the first and largest level: more are too much memory."""
_SHORTEST = 3
"""Summed sites of the shortest chain."""


@dataclass(frozen=True)
class Factor:
    """A log density along named dimensions, and the plates that its site stands in."""

    data: torch.Tensor
    dims: str
    plates: frozenset[str]


@dataclass(frozen=True)
class Chain:
    """Summed dimensions in the order of a path, and the factors of each, and of each with the next one, along `batch` and these."""

    batch: str
    states: str
    singles: tuple[tuple[torch.Tensor, ...], ...]
    pairs: tuple[tuple[torch.Tensor, ...], ...]

    def sum(self) -> torch.Tensor:
        """Return log Σ Π along `batch`."""
        product = _stack([_total(factors) for factors in self.pairs])
        empty = product.new_zeros((1,) * (len(self.batch) + 1))
        singles = [_total(factors) if factors else empty for factors in self.singles]
        product = product + _stack(singles[1:])[..., None, :]
        while len(product) > 1:
            even = len(product) // 2 * 2
            two = product[:even].unflatten(0, (-1, 2))
            found = log_sum_exp(two[:, 0, ..., :, :, None] + two[:, 1, ..., None, :, :], (-2,))
            product = found if even == len(product) else torch.cat([found, product[even:]])
        return log_sum_exp(product[0] + singles[0][..., :, None], (-2, -1))


def chain_of(factors: Sequence[Factor], summed: frozenset[str]) -> Chain | None:
    """Return a chain whose sum over `summed` is that of some factors, in the plates that all of these share, or None."""
    sizes = {d: n for f in factors for d, n in zip(f.dims, f.data.shape, strict=True)}
    shared = frozenset.intersection(*(f.plates for f in factors))
    states = _path(factors, summed)
    if states is None or len({sizes[d] for d in states}) > 1 or any(_home(factors, d) != shared for d in states):
        return None
    if any(not set(f.dims) <= f.plates | summed for f in factors):
        return None
    batch = "".join(sorted(shared & sizes.keys()))
    values = sizes[states[0]]
    numbers = math.prod(sizes[d] for d in batch) * values**3
    if numbers > _PER_PRODUCT or numbers * (len(states) // 2) > _AT_MOST:
        return None
    singles: list[list[torch.Tensor]] = [[] for _ in states]
    pairs: list[list[torch.Tensor]] = [[] for _ in states[1:]]
    for f in factors:
        at = sorted(states.index(d) for d in f.dims if d in summed)
        laid_out = _laid_out(f, batch, "".join(states[i] for i in at))
        (singles if len(at) == 1 else pairs)[at[0]].append(laid_out)
    return Chain(batch, states, tuple(map(tuple, singles)), tuple(map(tuple, pairs)))


def _path(factors: Sequence[Factor], summed: frozenset[str]) -> str | None:
    """Return the summed dimensions in the order in which factors of two of them join all into one path, or None."""
    beside: dict[str, list[str]] = {}
    for f in factors:
        mine = [d for d in f.dims if d in summed]
        if not 1 <= len(mine) <= 2:
            return None
        for d in mine:
            beside.setdefault(d, [])
        if len(mine) == 2:
            for d, other in (mine, reversed(mine)):
                if other not in beside[d]:
                    beside[d].append(other)
    ends = [d for d, others in beside.items() if len(others) == 1]
    if beside.keys() != summed or len(summed) < _SHORTEST or len(ends) != 2 or any(len(x) > 2 for x in beside.values()):
        return None
    path = [ends[0]]
    while following := [d for d in beside[path[-1]] if d not in path[-2:]]:
        path += following
    # A circle apart from the path would be left over.
    return "".join(path) if len(path) == len(summed) else None


def _home(factors: Sequence[Factor], dim: str) -> frozenset[str]:
    """Return the plates that a summed dimension stands in: those of all that read it."""
    return frozenset.intersection(*(f.plates for f in factors if dim in f.dims))


def _laid_out(f: Factor, batch: str, states: str) -> torch.Tensor:
    """Return a factor along `batch` and `states`, of size 1 along what it has not, multiplied over its other plates."""
    inner = [i for i, d in enumerate(f.dims) if d not in batch and d not in states]
    data = f.data.sum(inner) if inner else f.data
    dims = [d for i, d in enumerate(f.dims) if i not in inner]
    order = [d for d in batch + states if d in dims]
    data = data.permute([dims.index(d) for d in order])
    sizes = dict(zip(order, data.shape, strict=True))
    return data.reshape([sizes.get(d, 1) for d in batch + states])


def _total(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    first, *others = factors
    for x in others:
        first = first + x
    return first


def _stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(torch.broadcast_tensors(*parts))


def log_sum_exp(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Return log Σ exp along some axes, also where everything is impossible, which then has no derivative."""
    top = x.detach().amax(axes, keepdim=True)
    possible = top != -math.inf
    top = torch.where(possible, top, torch.zeros_like(top))
    total = (x - top).exp().sum(axes, keepdim=True)
    found = torch.where(possible, total, torch.ones_like(total)).log() + top
    return torch.where(possible, found, torch.full_like(found, -math.inf)).squeeze(axes)
