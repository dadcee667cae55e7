"""Where a cost depends on a reparameterized draw, and no derivative follows it: the estimate along the draw would be biased.

A cost whose every dependence on a draw goes through an operation of the program's own that jumps or stops gradients has a derivative of
zero along the draw, where that of its expectation is not. Comparisons inside of densities and of JAX's own functions count for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pplgrad.numpyro._compat_jax import has_own_derivative, jax_function_of, mark_of, origin_of, sub_jaxprs, while_of
from pplgrad.numpyro._tracing.continuous_operations import BODIES, CONTINUOUS, jumping_outputs
from pplgrad.numpyro._tracing.control_dependence import NO_SITES, Sites, Steering, is_float, reads_fractions

_FLAT = set("round floor ceil sign stop_gradient".split())
"""Operations with a derivative of zero; beside them all that makes whole numbers or truth values of numbers with a fraction."""
_SEVERAL = {"sort", "top_k", "eigh", "svd"}
"""Operations of which some outputs jump."""
_STEPS = {"heaviside"}
"""JAX's functions that are flat, and hand on their argument where it is no number."""


class _Lost(Steering):
    """Follows draws through what is known to have no derivative; `before` has the draws that each one's value was computed from."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self.before: dict[str, set[str]] = {}

    def _drawn(self, name: str, before: Sites) -> Sites:
        # The model draws what the guide drew.
        self.before.setdefault(name, set()).update(site for site, _ in before if site != name)
        return super()._drawn(name, before)

    def _through(self, equation: Any, operands: list[Sites]) -> list[Sites]:
        found, name = super()._through(equation, operands), mark_of(equation)
        # A draw of the model's follows what it was computed from, and is one itself.
        return found if name is None else [sites | super(_Lost, self)._drawn(name, NO_SITES) for sites in found]

    def _judged(self, equation: Any, kind: str, operands: list[Sites]) -> tuple[list[bool], str] | None:
        nothing = [False] * len(equation.outvars)
        if kind in BODIES:
            known = jax_function_of(equation)
            return ([True for _ in nothing], str(known)) if known in _STEPS else None
        if has_own_derivative(equation):
            return nothing, kind
        flat = _flat_outputs(equation)
        if not any(flat) or not reads_fractions(equation, operands) or self._trusts(origin_of(equation), CONTINUOUS):
            return nothing, kind
        return flat, kind


def lost_paths(
    closed: Any, names: Collection[str], points: Collection[str], costs: Iterable[tuple[str, int]]
) -> dict[str, tuple[str, str]]:
    """Return the sites among `names` on which a cost depends without a derivative: the cost's name, and the operation that lost it.

    `points` are the sites of point masses, which stand for the draws that they were computed from, and `costs` the names of the costs with
    the numbers of the outputs that hold them.
    """
    found: dict[str, tuple[str, str]] = {}
    walker = _Lost({*names, *points})
    outputs = walker.walk(closed.jaxpr, [NO_SITES] * len(closed.jaxpr.invars))
    for cost, number in costs:
        smooth = {name for name, by in outputs[number] if not by}
        for name, by in sorted(outputs[number]):
            if name not in smooth:
                for drawn in _behind(name, points, walker.before) & set(names):
                    found.setdefault(drawn, (cost, by))
    return found


def _behind(name: str, points: Collection[str], before: Mapping[str, Collection[str]]) -> set[str]:
    """Return the draws that a site stands for: itself, or those behind a point mass."""
    if name not in points:
        return {name}
    return set().union(*(_behind(other, points, before) for other in before.get(name, ())))


def _flat_outputs(equation: Any) -> list[bool]:
    """Return which outputs of an operation of numbers with a fraction have a derivative of zero, or none."""
    kind = equation.primitive.name
    several = jumping_outputs(equation, kind) if kind in _SEVERAL else [False] * len(equation.outvars)
    return [kind in _FLAT or jump or not is_float(x) for jump, x in zip(several, equation.outvars, strict=True)]


def may_lose(jaxpr: Any) -> bool:
    """Return whether a derivative may be lost in a program at all."""
    for equation in jaxpr.eqns:
        bodies = list(sub_jaxprs(equation))
        if while_of(equation) is not None or any(map(may_lose, bodies)):
            return True
        if not bodies and any(_flat_outputs(equation)) and any(map(is_float, equation.invars)):
            return True
    return False
