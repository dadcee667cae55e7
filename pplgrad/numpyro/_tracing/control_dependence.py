"""Where what was computed from a relaxed value steers control flow, or loses its derivative: found in a program's jaxpr.

A loop that runs as often as a relaxed value says, or a branch that it chooses, jumps where the value passes a threshold, and a jump has
no gradient: an estimator that differentiates along the relaxation would miss it, without a word. So does any operation that is not
known to be continuous with its own derivative (`continuous_operations.py`). What NumPyro's densities and samplers do with their
parameters is left alone, and so are those of JAX's functions that are known to be continuous, whatever they compare inside.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from pplgrad.engine.black_box import BlackBox
from pplgrad.numpyro._compat_jax import (
    Origin,
    While,
    arguments_of,
    called_back,
    has_librarys_derivative,
    has_own_derivative,
    is_literal,
    jax_function_of,
    origin_of,
    scan_of,
    sub_jaxprs,
    tag_of,
    touches_state,
    while_of,
)
from pplgrad.numpyro._tracing.continuous_operations import (
    BODIES,
    CONTINUOUS,
    SMOOTH,
    is_continuous_call,
    jumping_outputs,
    jumping_outputs_of_function,
)

Sites = frozenset[tuple[str, str]]
"""Relaxed sites that something was computed from, and for each by what its derivative was cut on the way, if it was."""
NO_SITES: Sites = frozenset()


CALLBACKS = ("pure_callback", "io_callback")
"""Operations that compute in Python; what `jax.debug` does with a value has no part in a program."""


class Context(NamedTuple):
    """Under what a jaxpr is walked: who called the function of JAX's that it is the body of, its name, and whether it is a derivative."""

    caller: str = "program"
    function: str = ""
    derives: bool = False


def is_float(atom: Any) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", jnp.int32), jnp.inexact)


def reads_fractions(equation: Any, operands: Sequence[Sites]) -> bool:
    """Return whether an operation reads numbers with a fraction that were computed from a site."""
    return any(sites and is_float(atom) for sites, atom in zip(operands, equation.invars, strict=True))


class Steering:
    """Follows what is computed from relaxed sites through a jaxpr; `found` names those that steer, with what they steer."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = NO_SITES  # What a mutable array may hold.
        self._context = Context()
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
                outputs = [self._drawn(name, NO_SITES.union(*operands))]
            else:
                outputs = self._through(equation, operands)
            if touches_state(equation):
                self._held = self._held.union(*operands)
                outputs = [sites | self._held for sites in outputs]
            known.update(zip(equation.outvars, outputs, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _drawn(self, name: str, before: Sites) -> Sites:
        """Return what a site's value is computed from: itself, and nothing of what it was drawn from."""
        return frozenset({(name, "")}) if name in self._names else NO_SITES

    def _through(self, equation: Any, operands: list[Sites]) -> list[Sites]:
        kind, every = equation.primitive.name, NO_SITES.union(*operands)
        if not every:  # A body may have sites of its own.
            return self._inside(equation, operands)
        if kind in CALLBACKS:
            self._steers(every, "black_box" if isinstance(called_back(equation.params), BlackBox) else kind)
        judged = self._judged(equation, kind, operands)
        if judged is None:
            return self._inside(equation, operands)
        jumps, by = judged
        cut = frozenset((name, old or by) for name, old in every)
        return [cut if jump else every for jump in jumps]

    def _judged(self, equation: Any, kind: str, operands: list[Sites]) -> tuple[list[bool], str] | None:
        """Return which outputs lose the derivative, and by what; None for an operation whose bodies are to be walked."""
        origin, count = origin_of(equation), len(equation.outvars)
        known, derives = jax_function_of(equation), self._context.derives or origin.derives
        own = has_own_derivative(equation)
        if own and not has_librarys_derivative(equation):
            jumps = [True] * count  # Such a derivative is what the program says, the value's own or not.
        elif known is not None and (own or kind in BODIES) and self._is_continuous(equation, known, operands, derives):
            jumps = jumping_outputs_of_function(known, count)
        elif own and known is None:
            jumps = [False] * count  # NumPyro's, or pplgrad's.
        elif own or kind in BODIES:
            return None
        else:
            jumps = self._jumps(equation, kind, origin, SMOOTH if derives else CONTINUOUS, operands)
        return jumps, f"{kind} in {self._context.function or known}" if known or self._context.function else kind

    def _is_continuous(self, equation: Any, known: str, operands: list[Sites], derives: bool) -> bool:
        return is_continuous_call(known, arguments_of(equation), [bool(sites) for sites in operands], derives)

    def _jumps(
        self, equation: Any, kind: str, origin: Origin, trusted: Collection[str], operands: list[Sites]
    ) -> list[bool]:
        """Return which outputs of a single operation lose the derivative along what they are computed from."""
        count = len(equation.outvars)
        if not reads_fractions(equation, operands) or self._trusts(origin, trusted):
            return [False] * count
        return jumping_outputs(equation, kind)

    def _trusts(self, origin: Origin, trusted: Collection[str]) -> bool:
        """Return whether an operation is one of NumPyro's, or inside of a function of JAX's that is trusted."""
        return self._caller(origin) == "library" or not origin.functions.isdisjoint(trusted)

    def _caller(self, origin: Origin) -> str:
        return self._context.caller if origin.caller == "jax" else origin.caller

    def _inside(self, equation: Any, operands: list[Sites]) -> list[Sites]:
        """Walk the bodies of an operation, under what is known of who called it."""
        before, origin, known = self._context, origin_of(equation), jax_function_of(equation)
        self._context = Context(
            self._caller(origin), (before.function or known) if known else "", before.derives or origin.derives
        )
        try:
            return self._walked(equation, operands)
        finally:
            self._context = before

    def _walked(self, equation: Any, operands: list[Sites]) -> list[Sites]:
        loop, scan, every, count = (
            while_of(equation),
            scan_of(equation),
            NO_SITES.union(*operands),
            len(equation.outvars),
        )
        if loop is not None:
            return self._while(loop, operands)
        if scan is not None:
            first = scan.consts
            return self._repeated(scan.body.jaxpr, operands[:first], operands[first:], scan.carry)
        bodies = list(sub_jaxprs(equation))
        chooses = NO_SITES
        if equation.primitive.name == "cond":
            chooses, *operands = operands
            self._steers(chooses, "cond")
        found = []
        for body in bodies:
            given = operands if len(body.invars) == len(operands) else [every] * len(body.invars)
            found.append(self.walk(body, given))
        if not found or any(len(outputs) != count for outputs in found):
            return [every] * count  # A derivative's rule has other outputs, and is no part of what is computed.
        if equation.primitive.name != "cond" and len(found) > 1:
            return [every] * count
        return [chooses.union(*column) for column in zip(*found, strict=True)]

    def _while(self, loop: While, operands: list[Sites]) -> list[Sites]:
        ahead, body = operands[: loop.ahead_consts], operands[loop.ahead_consts :]
        carried = self._repeated(loop.body.jaxpr, body[: loop.body_consts], body[loop.body_consts :], None)
        turns = NO_SITES.union(*self.walk(loop.ahead.jaxpr, [*ahead, *carried]))
        self._steers(turns, "while")
        # What comes out depends on how many turns there were, and that has no derivative.
        return [sites | {(name, by or "while") for name, by in turns} for sites in carried]

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
