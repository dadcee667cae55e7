"""A program's operations in branches that change one element each (`engine/changed_elements.py`).

What keeps the elements apart is known from `axis_rules`: there the operation runs at the draw, and where all elements are changed. Sums over the
elements and products that contract them follow; behind whatever else there is, each branch has a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplgrad.engine.changed_elements import Changed, ChangedElements, Rows, elements_last
from pplgrad.numpyro._array_ops import OPS
from pplgrad.numpyro._compat_jax import (
    alone,
    as_function,
    call_body,
    has_own_derivative,
    host_primitives,
    is_literal,
    touches_state,
)
from pplgrad.numpyro._tracing.axis_rules import moved

# Operations that give finite numbers where they get finite ones. A difference of infinite numbers would be none.
_FINITE = set(
    """
    abs add and broadcast_in_dim ceil clamp concatenate convert_element_type copy cos cumsum dot_general eq erf floor gather ge gt
    integer_pow le logistic lt max min mul name ne neg not or reduce_max reduce_min reduce_sum reshape round select_n sign sin slice
    sort square squeeze stop_gradient sub tanh transpose xor
    """.split()
)
# Operations whose results are finite whatever they get.
_BOUNDED = set("and eq erf ge gt is_finite le logistic lt ne not or sign tanh xor".split())
# Operations that give infinite numbers of ordinary ones, as the logarithm of a probability of 0 is.
_OPENING = set("digamma lgamma log".split())


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
    branches = Branches(drawn, others, axes, numbers)
    return [branches.rows(x) for x in branches.evaluate(closed.jaxpr, closed.consts, [branches.start])]


class Branches(ChangedElements):
    """The branches of some numbers, and the program's operations in them."""

    def __init__(self, drawn: jax.Array, others: jax.Array, axes: Sequence[int], numbers: Any) -> None:
        sizes = [drawn.shape[axis] for axis in axes]
        # Of all branches in order nothing need be looked up.
        every = isinstance(numbers, np.ndarray) and np.array_equal(numbers, np.arange(prod(sizes) * others.shape[0]))
        super().__init__(OPS, sizes, others.shape[0], None if every else jnp.asarray(numbers), drawn)
        self.start = self.value(drawn, others, axes)
        # What is the same in all branches and may be infinite, by its identity, kept so that this stays its own.
        self._infinite: dict[int, Any] = {}

    def rows(self, x: Found) -> jax.Array:
        """Return an array of its own for each branch."""
        if isinstance(x, (Changed, Rows)):
            return super().rows(x)
        return jnp.broadcast_to(x, (self.count, *jnp.shape(x)))

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
            shared = alone(equation)(*operands)
            if not self._gives_finite(equation, operands):
                self._infinite.update((id(x), x) for x in shared)
            return shared
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

    def _is_finite(self, x: Found) -> bool:
        """Return whether all entries are finite, as far as is known: parameters and data count as finite, and constants are looked at."""
        if isinstance(x, (Changed, Rows)):
            return isinstance(x, Changed) and x.is_finite
        if id(x) in self._infinite:
            return False
        if isinstance(x, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return True
        return bool(np.isfinite(x).all())

    def _gives_finite(self, equation: Any, operands: list[Found]) -> bool:
        """Return whether an operation on what all branches share gives finite numbers, as far as is known."""
        name = equation.primitive.name
        return name in _BOUNDED or (name not in _OPENING and all(self._is_finite(x) for x in operands))

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
        is_finite = _keeps_finite(equation) and all(self._is_finite(x) for x in operands)
        return [Changed(one, other, axes, is_finite) for one, other in zip(drawn, others, strict=True)]  # type: ignore[arg-type]

    def _summed(self, equation: Any, operands: list[Found]) -> list[Found] | None:
        """Return a sum over the elements: that of the unchanged ones, from both sides, and the changed entry."""
        if equation.primitive.name != "reduce_sum":
            return None
        found = self.sum_over(operands[0], {int(axis) for axis in equation.params["axes"]})
        return None if found is None else [found]

    def _contracted(self, equation: Any, operands: list[Found]) -> list[Found] | None:
        """Return a product that contracts the elements: that at the draw, and the difference of each entry times its row."""
        if equation.primitive.name != "dot_general" or sum(isinstance(x, Changed) for x in operands) != 1:
            return None
        side = 0 if isinstance(operands[0], Changed) else 1
        x, fixed = operands[side], operands[1 - side]
        contracted, batch = equation.params["dimension_numbers"]
        partner = {int(a): int(b) for a, b in zip(contracted[side], contracted[1 - side], strict=True)}
        if not (x.is_finite and self._is_finite(fixed)) or not {axis.at for axis in x.axes} <= partner.keys():
            return None
        if x.drawn.dtype == bool:
            return None
        theirs = tuple(axis._replace(at=partner[axis.at]) for axis in x.axes)
        orders = elements_last(OPS, x.axes, x.drawn.shape), elements_last(OPS, theirs, fixed.shape)
        if None in orders or equation.params.get("out_sharding") is not None:
            return None
        base = alone(equation)(*(x.drawn if i == side else fixed for i in (0, 1)))[0]
        # The product may be of a wider type than what is multiplied, in which alone there is room for a difference.
        moves = self.of_elements(orders[0](x.others.astype(base.dtype) - x.drawn.astype(base.dtype), 1))  # type: ignore[misc]
        taken = self.of_each(orders[1](fixed.astype(base.dtype), 0))  # type: ignore[misc]
        pair, gone = (moves, taken), ({axis.at for axis in x.axes}, {axis.at for axis in theirs})
        pair, gone = (pair, gone) if side == 0 else (pair[::-1], gone[::-1])
        # Of each operand the branches are the first dimension, and the elements' are no more.
        left, beside = (
            [[1 + at - sum(g < at for g in gone[i]) for at in map(int, dims[i]) if at not in gone[i]] for i in (0, 1)]
            for dims in (contracted, batch)
        )
        precision = equation.params.get("precision")
        return [Rows(base + _product(pair, left, [[0, *beside[0]], [0, *beside[1]]], precision))]


def _keeps_finite(equation: Any) -> bool:
    """Return whether an operation gives finite numbers where it gets finite ones; a negative power of 0 is none."""
    return equation.primitive.name in _FINITE and equation.params.get("y", 0) >= 0


def _body(equation: Any) -> Any:
    """Return the program that an operation calls, of whose derivative nothing is asked; or None."""
    body = equation.params.get("call_jaxpr") if has_own_derivative(equation) else call_body(equation)
    fits = hasattr(body, "jaxpr") and len(body.jaxpr.invars) == len(equation.invars)
    return body if fits else None


def _product(
    pair: tuple[jax.Array, jax.Array], contracted: list[list[int]], beside: list[list[int]], precision: Any
) -> jax.Array:
    """Return a product of two arrays: the dimensions beside each other first, then the free ones of each."""
    if contracted[0]:
        numbers = ((contracted[0], contracted[1]), (beside[0], beside[1]))
        return jax.lax.dot_general(*pair, numbers, precision=precision)
    free = [[a for a in range(x.ndim) if a not in together] for x, together in zip(pair, beside, strict=True)]
    first, second = (x.transpose(*beside[i], *free[i]) for i, x in enumerate(pair))
    count = len(beside[0])
    first = first.reshape(*first.shape, *(1,) * len(free[1]))
    return first * second.reshape(*second.shape[:count], *(1,) * len(free[0]), *second.shape[count:])


def by_rows(closed: Any, drawn: jax.Array, others: jax.Array, axes: Sequence[int], numbers: Any) -> list[jax.Array]:
    """Return the same as `evaluated`, from a program run for each branch."""
    branches = Branches(drawn, others, axes, numbers)
    return jax.vmap(as_function(closed))(branches.rows(branches.start))
