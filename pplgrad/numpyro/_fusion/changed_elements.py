"""Branches that change one element of a site's value each, evaluated together: what they share with the draw is computed once.

In the branch of element e an array that follows the value element by element is the array at the draw, but for its entries of element e. All
branches then need the array at the draw, and the array where every element takes another value, of which each reads its own entries (`Changed`).
A sum over the elements is the sum of all others and the changed entry. A product that contracts the elements is that at the draw and the
difference of one entry times one row. Only from there on do branches differ everywhere (`Rows`), as they do behind whatever is not
known to keep the elements apart (`axis_rules`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplgrad.numpyro._compat import (
    alone,
    as_function,
    call_body,
    has_own_derivative,
    host_primitives,
    is_literal,
    touches_state,
)
from pplgrad.numpyro._tracing.axis_rules import Axis, moved

# Operations that give finite numbers where they get finite ones. A difference of infinite numbers would be none.
_FINITE = set(
    """
    abs add and broadcast_in_dim ceil clamp concatenate convert_element_type copy cos cumsum dot_general eq erf floor gather ge gt
    integer_pow le logistic lt max min mul name ne neg not or reduce_max reduce_min reduce_sum reshape round select_n sign sin slice
    sort square squeeze stop_gradient sub tanh transpose xor
    """.split()
)


@dataclass(frozen=True)
class Changed:
    """An array that in each branch is the one at the draw, but for the entries of one element.

    Attributes:
        drawn: the array at the draw.
        others: (alternatives of an element, *shape); a branch reads there the entries of its element.
        axes: the axes along which the elements lie.
        is_finite: whether it is finite wherever the draw and the program's constants are.
    """

    drawn: jax.Array
    others: jax.Array
    axes: tuple[Axis, ...]
    is_finite: bool


@dataclass(frozen=True)
class Rows:
    """An array that differs from branch to branch: (branches, *shape)."""

    array: jax.Array


Found = Any
"""An array that is the same in all branches, a `Changed`, or `Rows`."""


def evaluated(
    closed: Any, drawn: jax.Array, others: jax.Array, axes: Sequence[int], numbers: Any
) -> list[jax.Array] | None:
    """Return the outputs of a program of one value in the branches of those numbers, (branches, *shape); None if it must run row by row.

    Branch e · m + j gives element e, the entries at index e of `axes` together, its alternative j: the entries of `others[j]`, (m, *shape).
    """
    if any(touches_state(equation) for equation in closed.jaxpr.eqns):
        return None
    sizes = [drawn.shape[axis] for axis in axes]
    value = Changed(drawn, others, tuple(Axis(at, 1, size) for at, size in zip(axes, sizes, strict=True)), True)
    branches = Branches(sizes, others.shape[0], numbers)
    return [branches.rows(x) for x in branches.evaluate(closed.jaxpr, closed.consts, [value])]


class Branches:
    """The branches of some numbers, and the program's operations in them."""

    def __init__(self, sizes: Sequence[int], alternatives: int, numbers: Any) -> None:
        self._sizes, self._each = tuple(sizes), alternatives
        every = prod(sizes) * alternatives
        # Of all branches in order nothing need be looked up.
        self._is_all = isinstance(numbers, np.ndarray) and np.array_equal(numbers, np.arange(every))
        self._numbers = jnp.asarray(numbers)

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Found]) -> list[Found]:
        """Return the outputs of a program."""
        known: dict[Any, Found] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(atom: Any) -> Found:
            return atom.val if is_literal(atom) else known[atom]

        for equation in jaxpr.eqns:
            found = self._operation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _operation(self, equation: Any, operands: list[Found]) -> list[Found]:
        if not any(isinstance(x, (Changed, Rows)) for x in operands):
            return alone(equation)(*operands)
        body = _body(equation)
        if body is not None:
            return self.evaluate(body.jaxpr, body.consts, operands)
        if not any(isinstance(x, Rows) for x in operands) and equation.primitive in host_primitives():
            for rule in (self._beside, self._summed, self._contracted):
                found = rule(equation, operands)
                if found is not None:
                    return found
        rows = [self.rows(x) if isinstance(x, (Changed, Rows)) else x for x in operands]
        over = tuple(0 if isinstance(x, (Changed, Rows)) else None for x in operands)
        return [Rows(x) for x in jax.vmap(alone(equation), over)(*rows)]

    def _beside(self, equation: Any, operands: list[Found]) -> list[Found] | None:
        """Return the outputs of an operation that keeps the elements apart: at the draw, and where all are changed."""
        changed = [(i, x) for i, x in enumerate(operands) if isinstance(x, Changed)]
        places = {tuple(moved(equation, i, axis) for axis in x.axes) for i, x in changed}
        if len(places) != 1 or None in (axes := next(iter(places))):
            return None
        function = alone(equation)
        drawn = function(*(x.drawn if isinstance(x, Changed) else x for x in operands))
        over = tuple(0 if isinstance(x, Changed) else None for x in operands)
        others = jax.vmap(function, over)(*(x.others if isinstance(x, Changed) else x for x in operands))
        is_finite = equation.primitive.name in _FINITE and all(x.is_finite for _, x in changed)
        return [Changed(one, other, axes, is_finite) for one, other in zip(drawn, others, strict=True)]  # type: ignore[arg-type]

    def _summed(self, equation: Any, operands: list[Found]) -> list[Found] | None:
        """Return a sum over the elements: that of the unchanged ones, from both sides, and the changed entry."""
        if equation.primitive.name != "reduce_sum":
            return None
        (x,), gone = operands, {int(axis) for axis in equation.params["axes"]}
        if not {axis.at for axis in x.axes} <= gone:
            return None
        order = _elements_last(x.axes, x.drawn.shape)
        if order is None:
            return None
        left = sorted(gone - {axis.at for axis in x.axes})
        drawn, others = (order(a, behind) for a, behind in ((x.drawn, 0), (x.others, 1)))
        within = [axis - sum(axis > other.at for other in _one_each(x.axes)) for axis in left]
        drawn = jnp.sum(drawn, tuple(within))
        others = jnp.sum(others, tuple(axis + 1 for axis in within))
        unchanged = _sum_of_others(drawn)
        return [Rows(self._chosen(jnp.moveaxis(unchanged[None] + others, -1, 0)))]

    def _contracted(self, equation: Any, operands: list[Found]) -> list[Found] | None:
        """Return a product that contracts the elements: that at the draw, and the difference of each entry times its row."""
        if equation.primitive.name != "dot_general" or sum(isinstance(x, Changed) for x in operands) != 1:
            return None
        side = 0 if isinstance(operands[0], Changed) else 1
        x, fixed = operands[side], operands[1 - side]
        contracted, batch = equation.params["dimension_numbers"]
        elements = sorted({axis.at for axis in x.axes})
        shape = tuple(x.drawn.shape[at] for at in elements)
        order = _elements_last([axis._replace(at=elements.index(axis.at)) for axis in x.axes], shape)
        if not x.is_finite or order is None or not set(elements) <= set(contracted[side]):
            return None
        if x.drawn.dtype == bool or equation.params.get("out_sharding") is not None:
            return None
        base = alone(equation)(*(x.drawn if i == side else fixed for i in (0, 1)))[0]
        partners = [int(contracted[1 - side][tuple(contracted[side]).index(at)]) for at in elements]
        ours = (elements, partners) if side == 0 else (partners, elements)
        left = [[int(a) for a in contracted[i] if int(a) not in ours[i]] for i in (0, 1)]
        beside = [[*ours[i], *(int(a) for a in batch[i])] for i in (0, 1)]

        def rows(difference: jax.Array) -> jax.Array:
            other = fixed.astype(base.dtype)
            return _product((difference, other) if side == 0 else (other, difference), left, beside)

        found = jax.vmap(rows)((x.others - x.drawn).astype(base.dtype))
        # (alternatives, elements' dimensions, *shape) to (elements, alternatives, *shape).
        behind = jnp.moveaxis(found, range(1, 1 + len(elements)), range(-len(elements), 0))
        return [Rows(base + self._chosen(jnp.moveaxis(order(behind, behind.ndim - len(elements)), -1, 0)))]

    def _chosen(self, every: jax.Array) -> jax.Array:
        """Return (branches, *shape) of what has (elements, alternatives, *shape)."""
        flat = every.reshape(-1, *every.shape[2:])
        return flat if self._is_all else flat[self._numbers]

    def rows(self, x: Found) -> jax.Array:
        """Return an array of its own for each branch."""
        if isinstance(x, Rows):
            return x.array
        count = self._numbers.shape[0]
        if not isinstance(x, Changed):
            return jnp.broadcast_to(x, (count, *jnp.shape(x)))
        places = jnp.unravel_index(self._numbers // self._each, self._sizes)
        shape = x.drawn.shape
        here = []
        for place, axis in zip(places, x.axes, strict=True):
            lies = (np.arange(shape[axis.at]) // axis.inner) % axis.size
            line = [1] * len(shape)
            line[axis.at] = -1
            here.append(place.reshape(-1, *(1,) * len(shape)) == lies.reshape(1, *line))
        others = x.others if self._each == 1 else x.others[self._numbers % self._each]
        return jnp.where(reduce(and_, here), others, x.drawn)


def _body(equation: Any) -> Any:
    """Return the program that an operation calls, of whose derivative nothing is asked; or None."""
    body = equation.params.get("call_jaxpr") if has_own_derivative(equation) else call_body(equation)
    fits = hasattr(body, "jaxpr") and len(body.jaxpr.invars) == len(equation.invars)
    return body if fits else None


def _one_each(axes: Sequence[Axis]) -> list[Axis]:
    """Return one of the axes in each dimension."""
    return list({axis.at: axis for axis in axes}.values())


def _elements_last(axes: Sequence[Axis], shape: tuple[int, ...]) -> Any:
    """Return a function that brings the elements, in their order, into one last dimension; None if a dimension has more than elements.

    It takes an array and the number of its dimensions in front of those of `shape`.
    """
    split: list[list[int]] = [[size] for size in shape]
    for at in {axis.at for axis in axes}:
        mine = sorted((axis for axis in axes if axis.at == at), key=lambda axis: -axis.inner)
        split[at] = [axis.size for axis in mine]
        inner = [prod(split[at][i + 1 :]) for i in range(len(mine))]
        if prod(split[at]) != shape[at] or inner != [axis.inner for axis in mine]:
            return None
    first = [sum(len(parts) for parts in split[:at]) for at in range(len(shape))]
    places = []
    for axis in axes:
        mine = sorted((other for other in axes if other.at == axis.at), key=lambda other: -other.inner)
        places.append(first[axis.at] + mine.index(axis))
    rest = [first[at] for at in range(len(shape)) if at not in {axis.at for axis in axes}]
    sizes = [size for parts in split for size in parts]

    def bring(x: jax.Array, front: int) -> jax.Array:
        apart = x.reshape(*x.shape[:front], *sizes)
        ordered = apart.transpose(*range(front), *(front + at for at in (*rest, *places)))
        return ordered.reshape(*ordered.shape[: front + len(rest)], -1)

    return bring


def _sum_of_others(x: jax.Array) -> jax.Array:
    """Return for each entry along the last axis the sum of all others: without a subtraction, which of infinite entries would leave nothing."""
    nothing = jnp.zeros((*x.shape[:-1], 1), x.dtype)
    before = jnp.concatenate([nothing, jnp.cumsum(x[..., :-1], -1, dtype=x.dtype)], -1)
    after = jnp.concatenate([jax.lax.cumsum(x[..., 1:], x.ndim - 1, reverse=True), nothing], -1)
    return before + after


def _product(pair: tuple[jax.Array, jax.Array], contracted: list[list[int]], beside: list[list[int]]) -> jax.Array:
    """Return a product of two arrays: the dimensions beside each other first, then the free ones of each."""
    if contracted[0]:
        return jax.lax.dot_general(*pair, ((contracted[0], contracted[1]), (beside[0], beside[1])))
    free = [[a for a in range(x.ndim) if a not in together] for x, together in zip(pair, beside, strict=True)]
    first, second = (x.transpose(*beside[i], *free[i]) for i, x in enumerate(pair))
    count = len(beside[0])
    first = first.reshape(*first.shape, *(1,) * len(free[1]))
    return first * second.reshape(*second.shape[:count], *(1,) * len(free[0]), *second.shape[count:])


def by_rows(closed: Any, drawn: jax.Array, others: jax.Array, axes: Sequence[int], numbers: Any) -> list[jax.Array]:
    """Return the same as `evaluated`, from a program run for each branch."""
    sizes = [drawn.shape[axis] for axis in axes]
    value = Changed(drawn, others, tuple(Axis(at, 1, size) for at, size in zip(axes, sizes, strict=True)), True)
    return jax.vmap(as_function(closed))(Branches(sizes, others.shape[0], numbers).rows(value))
