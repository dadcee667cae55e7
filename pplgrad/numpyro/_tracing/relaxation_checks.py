"""Where a program treats a relaxed value as if it were hard: found in its jaxpr."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from pplgrad.engine.black_box import BlackBox
from pplgrad.errors import EstimatorError, first_line
from pplgrad.numpyro._compat_jax import called_back, is_literal, scan_of, sub_jaxprs, tag_of, touches_state
from pplgrad.numpyro._tracing.control_dependence import CALLBACKS, steering

_COMPARING = {"eq", "ne", "lt", "le", "gt", "ge", "round", "floor", "ceil", "sign", "argmax", "argmin", "is_finite"}
_MOVING = {
    "reshape",
    "broadcast_in_dim",
    "squeeze",
    "expand_dims",
    "transpose",
    "slice",
    "concatenate",
    "copy",
    "name",
    "rev",
    "pad",
    "convert_element_type",
    "stop_gradient",
    "reduce_precision",
    "stack",
    "unstack",
    "split",
    "tile",
}
_PICKING = {"gather", "dynamic_slice", "select_n"}
"""Their first operand is picked from, or picks: the values come out, and indices go in."""


def misused(
    closed: Any, names: Collection[str], derived: Collection[str] = (), costs: Collection[int] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the relaxed sites whose value itself is compared, rounded, turned into whole numbers or used as an index.

    Followed are the copies of the value and its parts, and not what is computed from it: what a sampler or a density
    does with its parameters is its own affair, unless it steers a loop or a branch. Second come the sites, of these
    and of those that are `derived` in any case, along which the derivative of an output among `costs` is cut.
    """
    found: dict[str, str] = {}
    _walk(closed.jaxpr, [None] * len(closed.jaxpr.invars), set(names), found)
    steers, cut = steering(closed, {*names, *derived}, costs) if names else ({}, {})
    return {**{name: by for name, by in steers.items() if name in names}, **found}, {**cut, **steers}


def raise_if_index(error: TypeError) -> None:
    """Say it plainly if JAX refused a number with a fraction where it wanted an integer."""
    if "integer" in str(error) or "carry" in str(error):
        raise EstimatorError(
            "A relaxed site's value, a number with a fraction, is used as an index or an integer loop carry: compute with the "
            "value itself (one_hot @ table, float carries), or use ScoreFunction() or LocalExpectation() at the site. "
            f"({first_line(error)})"
        ) from error


def _walk(jaxpr: Any, inputs: list[str | None], names: set[str], found: dict[str, str]) -> list[str | None]:
    """Return which relaxed site each output is a copy of."""
    known: dict[Any, str | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> str | None:
        return None if is_literal(atom) else known.get(atom)

    held: str | None = None  # What a mutable array may hold.
    for equation in _used(jaxpr):
        site, kind = tag_of(equation), equation.primitive.name
        operands = [of(atom) for atom in equation.invars]
        copied = next((name for name in operands if name is not None), None)
        if site is not None:
            outputs = [site if site in names else None]
        elif copied is None:
            outputs = [None] * len(equation.outvars)
            inner = list(sub_jaxprs(equation))
            if inner:
                outputs = _inside(equation, inner, operands, names, found)
        elif kind in _COMPARING or _is_whole(equation) or kind in CALLBACKS:
            found.setdefault(copied, "black_box" if isinstance(called_back(equation.params), BlackBox) else kind)
            outputs = [None] * len(equation.outvars)
        elif kind in _PICKING:
            outputs = [_picked(equation, operands, found)]
        elif kind in _MOVING:
            outputs = [copied] * len(equation.outvars)
        else:
            outputs = _inside(equation, list(sub_jaxprs(equation)), operands, names, found)
        if touches_state(equation):
            held = copied if copied is not None else held
            outputs = [held if name is None else name for name in outputs]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _used(jaxpr: Any) -> list[Any]:
    """Return the equations that an output needs: NumPyro validates the parameters of a distribution and drops the result."""
    needed = {id(atom) for atom in jaxpr.outvars}
    found = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(var) in needed for var in equation.outvars):
            needed |= {id(atom) for atom in equation.invars}
            found.append(equation)
    return found[::-1]


def _is_whole(equation: Any) -> bool:
    """Return whether a value is converted to whole numbers or truth values, by whatever operation has no other result."""
    types = [var.aval.dtype for var in equation.outvars if hasattr(var.aval, "dtype")]
    return bool(types) and not any(jnp.issubdtype(t, jnp.inexact) for t in types) and not any(sub_jaxprs(equation))


def _picked(equation: Any, operands: list[str | None], found: dict[str, str]) -> str | None:
    kind = equation.primitive.name
    choosers, values = (operands[:1], operands[1:]) if kind == "select_n" else (operands[1:], operands[:1])
    for name in choosers:
        if name is not None:
            found.setdefault(name, kind)
    return next((name for name in values if name is not None), None)


def _inside(
    equation: Any, bodies: list[Any], operands: list[str | None], names: set[str], found: dict[str, str]
) -> list[str | None]:
    """Walk the bodies of a call, a scan or a branch; what comes out of a loop's carry is followed once more into it."""
    outputs: list[str | None] = [None] * len(equation.outvars)
    for body in bodies:
        given = operands[len(operands) - len(body.invars) :] if len(body.invars) <= len(operands) else None
        inputs: list[str | None] = given if given is not None else [None] * len(body.invars)
        result = _walk(body, inputs, names, found)
        scan = scan_of(equation)
        if scan is not None:
            again = [*inputs[: scan.consts], *result[: scan.carry], *inputs[scan.consts + scan.carry :]]
            result = _walk(body, again, names, found)
        if len(result) == len(outputs):
            outputs = [a if a is not None else b for a, b in zip(outputs, result, strict=True)]
    return outputs
