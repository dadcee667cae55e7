"""When two parts of traced programs are the same: settings, constants and sub-programs compared by what they are.

Nothing here reads printed text, which leaves out constants, and shows different functions of one name alike. Two jaxprs are
the same if they have the same equations on the same variables, numbers in place and constants; two arrays if they are one, or small
ones of the same type and bits; two functions if they are one. What is not known to be the same is different.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from pplgrad.numpyro._compat_jax import (
    context_of,
    derivative_of,
    has_known_zeros,
    host_primitives,
    is_custom_jvp,
    is_literal,
    rule_of,
    sub_jaxprs,
)

# Up to so many bytes arrays are compared by their contents.
BYTES = 1 << 16
# So often a rule that is written with another function's is followed into that one's; what goes on after that is different.
DEPTH = 3


class Different(Exception):
    """Something cannot be known to be the same as anything else."""


class Itself:
    """An object that is the same as itself alone. It is held, so that no other one gets its place in memory."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)


def array(x: Any) -> Any:
    """Return what arrays and numbers have in common that are the same: the array, or its type and bits."""
    if isinstance(x, jax.Array):
        return Itself(x)
    if isinstance(x, np.ndarray) and x.nbytes > BYTES:
        # The same place in memory: JAX puts a new view around a program's array wherever the program reads it.
        place = x.__array_interface__["data"][0], x.strides, x.shape, x.dtype
        return (place, Itself(x if x.base is None else x.base))
    bits = np.asarray(x)
    if bits.dtype.hasobject:
        return Itself(x)
    weak = getattr(getattr(x, "aval", None), "weak_type", None)
    return type(x), weak, bits.dtype, bits.shape, bits.tobytes()


class Structure:
    """What tells whether settings are the same, as something that can be hashed; of one program, whose equations are there."""

    def __init__(self) -> None:
        self._contexts: dict[Itself, Any] = {}
        self._rules: dict[Itself, Any] = {}
        self._known: dict[Itself, bool] = {}
        self._derivatives: dict[Itself, Any] = {}
        self._stack: list[tuple[Any, Any]] = []

    def operation(self, equation: Any) -> Any:
        """Return what equations have in common that do the same to the same operands.

        One that cannot be compared is the same as itself, and one whose results may change from time to time not even that.
        """
        if not self.is_known(equation):
            return Itself(object())
        try:
            return self._operation(equation)
        except Different:
            return Itself(equation)

    def is_known(self, equation: Any) -> bool:
        """Return whether an equation is made of JAX's own operations, which give the same whenever they get the same."""
        held = Itself(equation)
        if held not in self._known:
            inside = (other for body in sub_jaxprs(equation) for other in body.eqns)
            own = equation.primitive in host_primitives() and not equation.effects
            self._known[held] = own and all(map(self.is_known, inside))
        return self._known[held]

    def derivative(self, equation: Any) -> Any:
        """Return the program of a function's value and its own derivative, or None if there is none."""
        held = Itself(equation)
        if held not in self._derivatives:
            self._derivatives[held] = derivative_of(equation)
        return self._derivatives[held]

    def _operation(self, equation: Any) -> Any:
        settings = self._custom(equation) if is_custom_jvp(equation) else self.settings(equation.params)
        types = tuple(var.aval for var in equation.outvars)
        return Itself(equation.primitive), settings, types, self.context(equation)

    def context(self, equation: Any) -> Any:
        """Return what equations have in common that were traced under the same: the way of counting random numbers, a mesh."""
        held = Itself(equation.ctx)
        if held not in self._contexts:
            self._contexts[held] = self.settings(context_of(equation))
        return self._contexts[held]

    def settings(self, value: Any) -> Any:
        """Return what two settings have in common exactly if they are the same."""
        if value is None or isinstance(value, (bool, str, bytes, np.dtype, Enum)):
            return type(value), value
        if isinstance(value, int):
            return type(value), getattr(value, "dtype", None), int(value)
        if isinstance(value, (float, complex)):
            number = complex(value)
            return type(value), getattr(value, "dtype", None), struct.pack("dd", number.real, number.imag)
        if isinstance(value, Mapping):
            # In their order: one that differs is taken for different.
            return type(value), tuple((self.settings(k), self.settings(v)) for k, v in value.items())
        if isinstance(value, (tuple, list)):
            return type(value), tuple(self.settings(item) for item in value)
        if isinstance(value, jex.ClosedJaxpr):
            return self.program(value.jaxpr, value.consts)
        if isinstance(value, jex.Jaxpr):
            return self.program(value, ())
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            return array(value)
        return Itself(value)

    def program(self, jaxpr: Any, constants: Iterable[Any]) -> Any:
        """Return what jaxprs with these constants have in common that compute the same in the same way."""
        numbers: dict[Any, int] = {}

        def new(variables: Iterable[Any]) -> Any:
            return tuple((numbers.setdefault(var, len(numbers)), var.aval) for var in variables)

        def read(atom: Any) -> Any:
            return (atom.aval, array(atom.val)) if is_literal(atom) else numbers[atom]

        held = tuple(array(x) for x in constants)
        inputs = new((*jaxpr.constvars, *jaxpr.invars))
        equations = []
        for equation in jaxpr.eqns:
            operands = tuple(read(atom) for atom in equation.invars)
            equations.append((operands, self._operation(equation), new(equation.outvars)))
        return held, inputs, tuple(equations), tuple(read(atom) for atom in jaxpr.outvars)

    def _custom(self, equation: Any) -> Any:
        """Return what calls of functions with a derivative of their own have in common that are of the same function.

        The same are those whose values and derivatives are the same programs, the functions that these call in turn included.
        """
        held = Itself(equation)
        if self._stack:
            return self._function(equation)
        if held not in self._rules:
            try:
                self._rules[held] = self._function(equation)
            except Different:
                self._rules[held] = held
        return self._rules[held]

    def _function(self, equation: Any) -> Any:
        if has_known_zeros(equation) or len(self._stack) > DEPTH:
            raise Different
        rule = rule_of(equation)
        value = self.settings({k: v for k, v in equation.params.items() if isinstance(v, (jex.ClosedJaxpr, bool, int))})
        mine = (Itself(rule), value)
        if rule is not None and mine in self._stack:
            return "again", self._stack.index(mine)  # A derivative that is written with its own function.
        derivative = self.derivative(equation)
        if derivative is None or not all(map(self.is_known, derivative.jaxpr.eqns)):
            raise Different
        self._stack.append(mine)
        try:
            return value, self.program(derivative.jaxpr, derivative.consts)
        finally:
            self._stack.pop()
