"""Whether gradient flows to the bounds of a distribution's support, read off the traced program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

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

from pplgrad.engine.checks import moving_support
from pplgrad.engine.support import Classes, Support
from pplgrad.numpyro._compat import is_literal, sub_jaxprs

if TYPE_CHECKING:
    from pplgrad.numpyro._program import Arrays, Static


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
    found = [x for x in _SUPPORT.arrays(fn) if isinstance(x, jax.core.Tracer)]
    return [x for x in found if jnp.issubdtype(x.dtype, jnp.inexact)]


def carries_gradient(x: Any) -> bool:
    """Return whether JAX differentiates what a value outside of any trace of its own is computed from."""
    return type(x).__name__ in ("JVPTracer", "LinearizeTracer")


def gradient_reaches(closed: Any, inputs: Sequence[bool]) -> list[bool]:
    """Return which outputs of a closed jaxpr may have a derivative with respect to some of its inputs.

    What the program closes over counts as well where it is being differentiated.
    """
    constants = [carries_gradient(x) for x in closed.consts]
    return _walk(closed.jaxpr, constants, inputs)


def refuse_moving(
    static: Static,
    arrays: Arrays,
    closed: Any = None,
    key: Any = None,
    params: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuse a site whose support moves with a parameter, under an estimator that takes it for fixed.

    `arrays` holds the numbers of the outputs of a traced particle, a function of key and parameters (mutable state, which is
    among these, is not differentiated), or without `closed` the arrays themselves.
    """
    asked = {name: arrays.probes.get("bounds:" + name, []) for name in static.estimators}
    if not any(asked.values()):
        return
    reached: list[bool] = []
    if closed is not None:
        still = jax.tree.map(lambda _: False, key)
        smooth = {name: jax.tree.map(lambda _: name not in arrays.mutable, x) for name, x in params.items()}  # noqa: B023
        reached = gradient_reaches(closed, jax.tree.leaves((still, smooth)))
    for name, found in asked.items():
        if any(carries_gradient(x) if closed is None else reached[x] for x in found):  # type: ignore[call-overload]
            raise moving_support(name, static.families[name], static.estimators[name], name in static.reparameterized)


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
