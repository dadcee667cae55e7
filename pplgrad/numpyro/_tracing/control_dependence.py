"""Where what was computed from a relaxed value steers control flow, or loses its derivative: found in a program's jaxpr.

A loop that runs as often as a relaxed value says, or a branch that it chooses, jumps where the value passes a threshold, and a jump has
no gradient: an estimator that differentiates along the relaxation would miss it, without a word. Comparisons as such are left alone,
since densities and samplers make them of their parameters. So is `stop_gradient` in JAX's and NumPyro's own functions (as in a
`logsumexp`), whose derivatives are whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp

from pplgrad.engine.black_box import BlackBox
from pplgrad.numpyro._compat import (
    While,
    called_back,
    caller_of,
    has_own_derivative,
    is_literal,
    is_stopped_by_library,
    scan_of,
    sub_jaxprs,
    tag_of,
    touches_state,
    while_of,
)

Sites = frozenset[tuple[str, str]]
"""Relaxed sites that something was computed from, and for each by what its derivative was cut on the way, if it was."""
NO_SITES: Sites = frozenset()


CALLBACKS = ("pure_callback", "io_callback")
"""Operations that compute in Python; what `jax.debug` does with a value has no part in a program."""
_ROUNDING = {"round", "floor", "ceil", "sign", "argmax", "argmin"}
_JUMPING = {"eq", "ne", "lt", "le", "gt", "ge", "convert_element_type", *_ROUNDING}


def cuts_derivative(equation: Any) -> bool:
    """Return whether an operation of the program's own has no derivative."""
    kind = equation.primitive.name
    if kind == "stop_gradient":
        return not is_stopped_by_library(equation)
    if kind not in _JUMPING or not any(_is_float(atom) for atom in equation.invars):
        return False
    if kind == "convert_element_type" and _is_float(equation.outvars[0]):
        return False
    caller = caller_of(equation)
    return caller == "program" or (caller == "jax" and kind in _ROUNDING)


def _is_float(atom: Any) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", jnp.int32), jnp.inexact)


class Steering:
    """Follows what is computed from relaxed sites through a jaxpr; `found` names those that steer, with what they steer."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = NO_SITES  # What a mutable array may hold.
        self.found: dict[str, str] = {}

    def walk(self, jaxpr: Any, inputs: Sequence[Sites]) -> list[Sites]:
        """Return the relaxed sites that each output was computed from."""
        known: dict[Any, Sites] = dict(zip(jaxpr.invars, inputs, strict=True))

        def of(atom: Any) -> Sites:
            return NO_SITES if is_literal(atom) else known.get(atom, NO_SITES)

        for equation in jaxpr.eqns:
            operands = [of(atom) for atom in equation.invars]
            name = tag_of(equation)
            if name is not None:
                outputs = [frozenset({(name, "")}) if name in self._names else NO_SITES]
            else:
                outputs = self._through(equation, operands)
            if touches_state(equation):
                self._held = self._held.union(*operands)
                outputs = [sites | self._held for sites in outputs]
            known.update(zip(equation.outvars, outputs, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _through(self, equation: Any, operands: list[Sites]) -> list[Sites]:
        kind, loop, scan = equation.primitive.name, while_of(equation), scan_of(equation)
        if loop is not None:
            return self._while(loop, operands)
        if scan is not None:
            first = scan.consts
            return self._repeated(scan.body.jaxpr, operands[:first], operands[first:], scan.carry)
        bodies = list(sub_jaxprs(equation))
        every = NO_SITES.union(*operands)
        count = len(equation.outvars)
        if kind in CALLBACKS:
            self._steers(every, "black_box" if isinstance(called_back(equation.params), BlackBox) else kind)
        if cuts_derivative(equation):
            every = frozenset((name, by or kind) for name, by in every)
        if not bodies or has_own_derivative(equation):
            return [every] * count
        chooses = NO_SITES
        if kind == "cond":
            chooses, *operands = operands
            self._steers(chooses, "cond")
        found = []
        for body in bodies:
            given = operands if len(body.invars) == len(operands) else [every] * len(body.invars)
            found.append(self.walk(body, given))
        if any(len(outputs) != count for outputs in found) or (kind != "cond" and len(found) > 1):
            return [every] * count  # A derivative's rule has other outputs, and is no part of what is computed.
        return [chooses.union(*column) for column in zip(*found, strict=True)]

    def _while(self, loop: While, operands: list[Sites]) -> list[Sites]:
        ahead, body = operands[: loop.ahead_consts], operands[loop.ahead_consts :]
        carried = self._repeated(loop.body.jaxpr, body[: loop.body_consts], body[loop.body_consts :], None)
        self._steers(NO_SITES.union(*self.walk(loop.ahead.jaxpr, [*ahead, *carried])), "while")
        return carried

    def _repeated(self, body: Any, consts: list[Sites], rest: list[Sites], carry: int | None) -> list[Sites]:
        """Walk the body of a loop until nothing new comes round; `carry` is None where all is carried."""
        count = len(rest) if carry is None else carry
        carried = rest[:count]
        while True:
            outputs = self.walk(body, [*consts, *carried, *rest[count:]])
            grown = [a | b for a, b in zip(carried, outputs, strict=False)]
            if grown == carried:
                return [*carried, *outputs[count:]]
            carried = grown

    def _steers(self, sites: Sites, what: str) -> None:
        for name, _ in sorted(sites):
            self.found.setdefault(name, what)


def steering(
    closed: Any, names: Collection[str], costs: Collection[int] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the relaxed sites from which what steers a loop or a branch is computed, and those whose derivative is cut; and by what.

    `costs` are the numbers of the outputs whose derivatives are asked for, None for all.
    """
    walker = Steering(names)
    outputs = walker.walk(closed.jaxpr, [NO_SITES] * len(closed.jaxpr.invars))
    asked = outputs if costs is None else [outputs[number] for number in costs]
    return walker.found, {name: by for name, by in sorted(NO_SITES.union(*asked)) if by}
