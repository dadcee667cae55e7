"""Where a cost depends on a reparameterized draw, and no derivative follows it: the estimate along the draw would be biased.

A cost whose every dependence on a draw goes through an operation of the program's own that jumps or stops gradients has a derivative of
zero along the draw, where that of its expectation is not. Comparisons inside of densities and of JAX's own functions count for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pplgrad.numpyro._compat import has_own_derivative, origin_of, sub_jaxprs
from pplgrad.numpyro._tracing.continuous_operations import BODIES, CONTINUOUS
from pplgrad.numpyro._tracing.control_dependence import NO_SITES, Sites, Steering, is_float

_JUMPS = set("eq ne lt le gt ge round floor ceil sign argmax argmin stop_gradient convert_element_type".split())
"""Operations without a derivative. What may have one is taken to have it: a cost that jumps for another reason is not refused."""


class _Lost(Steering):
    """Follows draws through what is known to have no derivative."""

    def _judged(self, equation: Any, kind: str, operands: list[Sites]) -> tuple[list[bool], str] | None:
        nothing = [False] * len(equation.outvars)
        if has_own_derivative(equation):
            return nothing, kind
        if kind in BODIES:
            return None
        if not _is_flat(equation):
            return nothing, kind
        return self._jumps(equation, kind, origin_of(equation), CONTINUOUS, operands), kind


def lost_paths(closed: Any, names: Collection[str], costs: Mapping[str, int]) -> dict[str, tuple[str, str]]:
    """Return the sites among `names` on which a cost depends without a derivative: the cost's name, and the operation that lost it.

    `costs` are the numbers of the outputs that hold each cost.
    """
    found: dict[str, tuple[str, str]] = {}
    if not names or not _any_cut(closed.jaxpr):
        return found
    outputs = _Lost(names).walk(closed.jaxpr, [NO_SITES] * len(closed.jaxpr.invars))
    for cost, number in costs.items():
        smooth = {name for name, by in outputs[number] if not by}
        for name, by in sorted(outputs[number]):
            if name not in smooth:
                found.setdefault(name, (cost, by))
    return found


def _any_cut(jaxpr: Any) -> bool:
    return any(_is_flat(equation) or any(map(_any_cut, sub_jaxprs(equation))) for equation in jaxpr.eqns)


def _is_flat(equation: Any) -> bool:
    kind = equation.primitive.name
    return kind in _JUMPS and not (kind == "convert_element_type" and is_float(equation.outvars[0]))
