"""Whether gradient flows to the bounds of a distribution's support, read off the traced program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import (
    Delta,
    Distribution,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    TransformedDistribution,
)
from numpyro.distributions.constraints import Constraint

from pplgrad.engine.support import Classes, Support
from pplgrad.numpyro._compat_jax import is_literal, sub_jaxprs

_DIFFERENTIATED = ("JVPTracer", "LinearizeTracer")


def _known(x: Any) -> float | None:
    if isinstance(x, jax.core.Tracer):
        return None
    numbers = np.ravel(x)
    return float(numbers[0]) if numbers.size and (numbers == numbers[0]).all() else None


_SUPPORT = Support(
    Classes(
        Distribution,
        (Independent, ExpandedDistribution, MaskedDistribution),
        TransformedDistribution,
        Delta,
        Constraint,
        lambda x: isinstance(x, (jax.Array, np.ndarray)),
        _known,
    )
)


def bounds(fn: Any) -> list[jax.Array]:
    """Return the arrays that decide where a distribution's support ends, and that gradient may flow to."""
    with jax.ensure_compile_time_eval():  # What transforms do to edges that are constants is a constant.
        found = [x for x in _SUPPORT.arrays(fn) if isinstance(x, jax.core.Tracer)]
    return [x for x in found if jnp.issubdtype(x.dtype, jnp.inexact)]


def is_differentiated(params: Any) -> bool:
    """Return whether the innermost active transform of JAX differentiates parameters."""
    return any(type(x).__name__ in _DIFFERENTIATED for x in jax.tree.leaves(params))


def carries_gradient(x: Any, unknown: bool) -> bool:
    """Return whether JAX differentiates what a value outside of any trace of its own is computed from.

    With `unknown` it does not differentiate the parameters here. Then it may differentiate whatever another transform (`jit`, `vmap`,
    `checkpoint`, `scan`) hands in, from outside of that transform.
    """
    if type(x).__name__ in _DIFFERENTIATED:
        return True
    return unknown and isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.inexact)


def gradient_reaches(closed: Any, inputs: Sequence[bool], unknown: bool) -> list[bool]:
    """Return which outputs of a closed jaxpr may have a derivative with respect to some of its inputs.

    What the program closes over counts as well where it is being differentiated, or may be (`unknown`: see `carries_gradient`).
    """
    constants = [carries_gradient(x, unknown) for x in closed.consts]
    return _walk(closed.jaxpr, constants, inputs)


def _walk(jaxpr: Any, constants: Sequence[bool], inputs: Sequence[bool]) -> list[bool]:
    smooth = set()

    def note(variables: Sequence[Any], flags: Sequence[bool]) -> None:
        for variable, flag in zip(variables, flags, strict=True):
            if flag and jnp.issubdtype(variable.aval.dtype, jnp.inexact):
                smooth.add(variable)

    def flows(atom: Any) -> bool:
        return not is_literal(atom) and atom in smooth

    note(jaxpr.constvars, constants)
    note(jaxpr.invars, inputs)
    for equation in jaxpr.eqns:
        given = [flows(atom) for atom in equation.invars]
        if not any(given) or equation.primitive.name == "stop_gradient":
            continue
        bodies = list(sub_jaxprs(equation))
        one = len(bodies) == 1 and len(bodies[0].invars) == len(given) and not bodies[0].constvars
        if one and len(bodies[0].outvars) == len(equation.outvars) and equation.primitive.name not in ("scan", "while"):
            note(equation.outvars, _walk(bodies[0], [], given))
        else:
            note(equation.outvars, [True] * len(equation.outvars))
    return [flows(atom) for atom in jaxpr.outvars]
