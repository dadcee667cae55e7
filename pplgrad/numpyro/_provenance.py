"""Which sites each output of a traced program reads, from its jaxpr alone.

A tag at each latent value cuts the search: what is computed from a value reads that site, and not what the site
itself was drawn from (the engine closes the relation). Inside a `scan` a dependency is on the same step, or through the
carry on earlier steps; it keeps that form on the way out as long as the leading axis does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pplgrad.engine.program import AFTER, EVERY, SAME
from pplgrad.numpyro._compat import is_literal, scan_of, sub_jaxprs, tag_of

# What a value reads: site -> (flags, the scan whose steps the flags are about, or None).
Reads = Mapping[str, tuple[int, Any]]
_NOTHING: Reads = {}
# Operations that leave the leading axis where it is, if it keeps its size.
_KEEPING = {"reshape", "broadcast_in_dim", "convert_element_type", "squeeze", "expand_dims", "copy", "stop_gradient"}


def outputs_read(closed: Any) -> list[Reads]:
    """Return what each output of a closed jaxpr reads."""
    return _walk(closed.jaxpr, [_NOTHING] * len(closed.jaxpr.invars), inside=False)


def _walk(jaxpr: Any, inputs: Sequence[Reads], inside: bool) -> list[Reads]:
    env: dict[Any, Reads] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Reads:
        return _NOTHING if is_literal(atom) else env.get(atom, _NOTHING)

    for equation in jaxpr.eqns:
        found = _equation(equation, [read(atom) for atom in equation.invars], inside)
        for var, reads in zip(equation.outvars, found, strict=True):
            env[var] = reads
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, inputs: list[Reads], inside: bool) -> list[Reads]:
    site = tag_of(equation)
    outs = len(equation.outvars)
    if site is not None:
        return [{site: (SAME if inside else EVERY, None)}] * outs
    name = equation.primitive.name
    if name == "scan" and not inside:
        return _scan(equation, inputs)
    if name == "while":
        return _while(equation, inputs, inside)
    if name == "cond":
        branches = [_walk(b.jaxpr, inputs[1:], inside) for b in equation.params["branches"]]
        return [union(inputs[0], *(branch[i] for branch in branches)) for i in range(outs)]
    bodies = list(sub_jaxprs(equation))
    if name in _CALLS and len(bodies) >= 1 and len(bodies[0].invars) == len(inputs):
        return _walk(bodies[0], inputs, inside)
    everything = union(*inputs, *(_tags_inside(body) for body in bodies))
    if not inside and not _keeps_leading_axis(equation):
        everything = _every_step(everything)
    return [everything] * outs


_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "call",
    "remat",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_lin",
}


def _scan(equation: Any, inputs: list[Reads]) -> list[Reads]:
    """Iterate the body over its carry until nothing new is read; time dependence is kept on the stacked outputs.

    For an outermost scan only: the steps of one inside it are none of the outer scan's.
    """
    scan = scan_of(equation)
    assert scan is not None
    consts, carries, body = scan.consts, scan.carry, scan.body.jaxpr
    # What comes from outside is known for all steps alike.
    outside = [_every_step(reads) for reads in inputs]
    carry = outside[consts : consts + carries]
    while True:
        found = _walk(body, outside[:consts] + carry + outside[consts + carries :], inside=True)
        shifted = [union(old, _next_step(new)) for old, new in zip(carry, found[:carries], strict=True)]
        if shifted == carry:
            break
        carry = shifted
    axis = object()
    last = [_every_step(union(reads, first)) for reads, first in zip(found[:carries], outside[consts:], strict=False)]
    stacked = [
        {site: (flags, axis if flags != EVERY else None) for site, (flags, _) in reads.items()}
        for reads in found[carries:]
    ]
    return last + stacked


def _while(equation: Any, inputs: list[Reads], inside: bool) -> list[Reads]:
    """Everything that a loop carries may depend on everything that enters it, and on its condition."""
    bodies = [_tags_inside(body) for body in sub_jaxprs(equation)]
    everything = union(*inputs, *bodies)
    return [everything if inside else _every_step(everything)] * len(equation.outvars)


def _tags_inside(jaxpr: Any) -> Reads:
    found: dict[str, tuple[int, Any]] = {}
    for equation in jaxpr.eqns:
        site = tag_of(equation)
        if site is not None:
            found[site] = (EVERY, None)
        for body in sub_jaxprs(equation):
            found.update(_tags_inside(body))
    return found


def _keeps_leading_axis(equation: Any) -> bool:
    if equation.primitive.name not in _KEEPING:
        return False
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if not before or not after or before[0] != after[0]:
        return False
    return equation.primitive.name != "broadcast_in_dim" or equation.params["broadcast_dimensions"][0] == 0


def union(*parts: Reads) -> Reads:
    """Return what any of the parts reads; steps of different scans have nothing to do with each other."""
    result: dict[str, tuple[int, Any]] = {}
    for reads in parts:
        for site, (flags, axis) in reads.items():
            if site not in result:
                result[site] = (flags, axis)
                continue
            old, old_axis = result[site]
            result[site] = (old | flags, axis) if axis is old_axis else (EVERY, None)
    return result


def _every_step(reads: Reads) -> Reads:
    return {site: (EVERY, None) for site in reads}


def _next_step(reads: Reads) -> Reads:
    """Return what the next step reads through the carry: this step's draws are then earlier ones."""
    return {site: (EVERY if flags == EVERY else AFTER, axis) for site, (flags, axis) in reads.items()}
