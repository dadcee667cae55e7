"""Which sites each output of a traced program reads, and along which axes, from its jaxpr alone.

A tag at each latent value cuts the search: what is computed from a value reads that site, and not what the site
itself was drawn from (the engine closes the relation). Each plate of a site is an axis of its value; it is followed through
every operation that is known to keep elements apart, and lost in any other. Inside a `scan` a dependency is on the same
step, or through the carry on earlier steps; it keeps that form on the way out as long as the axis of the steps is followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pplgrad.core.plates import AFTER, EVERY, SAME, Plate
from pplgrad.numpyro._compat_jax import Scan, is_literal, scan_of, sub_jaxprs, tag_of, touches_state
from pplgrad.numpyro._tracing.axis_rules import Axis, moved, one_by_one


class Dependency(NamedTuple):
    """How a value reads a site: `steps` are flags about the steps of `scan`, which lie along the first of the axes.

    Without a scan the flags are EVERY, or inside of one about the step that runs. The other axes are those of the site's plates,
    None where an element may read other elements than its own.
    """

    steps: int
    scan: Any
    axes: tuple[Axis | None, ...]


Reads = Mapping[str, Dependency]
_NOTHING: Reads = {}


@dataclass(frozen=True)
class SitePlates:
    """A site's plates that are no time axis, and how many event dimensions stand right of theirs in its value."""

    plates: tuple[Plate, ...]
    event_dim: int

    def axes(self, shape: tuple[int, ...]) -> tuple[Axis | None, ...]:
        """Return the axes of a value of this shape: none of a scan's steps, and one for each plate."""
        found: list[Axis | None] = [None]
        for plate in self.plates:
            at = len(shape) - self.event_dim + plate.dim
            found.append(Axis(at, 1, plate.size) if at >= 0 and shape[at] == plate.size > 1 else None)
        return tuple(found)


SitePlatesByName = Mapping[str, SitePlates]


def outputs_read(closed: Any, site_plates: SitePlatesByName | None = None) -> list[Reads]:
    """Return what each output of a closed jaxpr reads; `site_plates` are those of the sites whose plates are followed."""
    walk = _Walk(site_plates or {}, 0, False)
    return walk.through(closed.jaxpr, [_NOTHING] * len(closed.jaxpr.invars))


@dataclass(frozen=True)
class _Walk:
    """Goes through equations, so many scans deep; in a `loop` no draw stands in a known step."""

    site_plates: SitePlatesByName
    depth: int
    loop: bool

    def through(self, jaxpr: Any, inputs: Sequence[Reads]) -> list[Reads]:
        """Return what each output of a jaxpr reads, from what its inputs read."""
        env: dict[Any, Reads] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Reads:
            return _NOTHING if is_literal(atom) else env.get(atom, _NOTHING)

        # What any mutable array, or the host, may hold by now: which of them an operation reads is not followed.
        state: Reads = _NOTHING
        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            found = self._equation(equation, operands)
            if touches_state(equation):
                within = (self._tags_inside(body) for body in sub_jaxprs(equation))
                state = self._lost(union(state, *operands, *within))
                found = [union(reads, state) for reads in found]
            for var, reads in zip(equation.outvars, found, strict=True):
                env[var] = reads
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Reads]) -> Sequence[Reads]:
        site, name, outs = tag_of(equation), equation.primitive.name, len(equation.outvars)
        if site is not None:
            return [self._drawn(site, equation.outvars[0].aval.shape)] * outs
        scan = scan_of(equation)
        if scan is not None:
            return self._scan(scan, inputs)
        found = _OPENED[name](self, equation, inputs) if name in _OPENED else None
        if found is not None:
            return found
        bodies = list(sub_jaxprs(equation))
        if name in _CALLS and len(bodies) >= 1 and len(bodies[0].invars) == len(inputs):
            return self.through(bodies[0], inputs)
        if one_by_one(equation):
            return inputs
        if not any(inputs) and not bodies:
            return [_NOTHING] * outs
        inner = [self._tags_inside(body) for body in bodies]
        return [union(*(_moved(equation, i, reads) for i, reads in enumerate(inputs)), *inner)] * outs

    def _drawn(self, site: str, shape: tuple[int, ...]) -> Reads:
        if self.depth > 1 or self.loop:
            return self._anywhere(site)
        axes = self.site_plates[site].axes(shape) if site in self.site_plates else (None,)
        return {site: Dependency(SAME if self.depth else EVERY, None, axes)}

    def _anywhere(self, site: str) -> Reads:
        plates = self.site_plates[site].plates if site in self.site_plates else ()
        return {site: Dependency(EVERY, None, (None,) * (1 + len(plates)))}

    def _lost(self, reads: Reads) -> Reads:
        """Return the same sites, read along no axis and in no known step."""
        return {site: dependency for name in reads for site, dependency in self._anywhere(name).items()}

    def _tags_inside(self, jaxpr: Any) -> Reads:
        found: dict[str, Dependency] = {}
        for equation in jaxpr.eqns:
            site = tag_of(equation)
            if site is not None:
                found.update(self._anywhere(site))
            for body in sub_jaxprs(equation):
                found.update(self._tags_inside(body))
        return found

    def _scan(self, scan: Scan, inputs: list[Reads]) -> list[Reads]:
        """Iterate the body over its carry until nothing new is read; time dependence is kept on the stacked outputs.

        Only an outermost scan has steps: those of one inside it are none of the outer scan's.
        """
        inner = _Walk(self.site_plates, self.depth + 1, self.loop)
        consts, carries, body = scan.consts, scan.carry, scan.body.jaxpr
        step = -inner.depth
        # What comes from outside is known for all steps alike.
        outside = [_every_step(reads) for reads in inputs] if self.depth == 0 else inputs
        given, carry = outside[:consts], outside[consts : consts + carries]
        rows = [_in_step(reads, step) for reads in outside[consts + carries :]]
        while True:
            found = inner.through(body, [*given, *carry, *rows])
            shifted = [
                union(old, _next_step(new, step, self.depth == 0))
                for old, new in zip(carry, found[:carries], strict=True)
            ]
            if shifted == carry:
                break
            carry = shifted
        last = [union(start, _next_step(new, step, False)) for start, new in zip(outside[consts:], found, strict=False)]
        last = [_every_step(reads) if self.depth == 0 else reads for reads in last[:carries]]
        token = object() if self.depth == 0 else None
        return last + [_stacked(reads, step, token, scan.length) for reads in found[carries:]]

    def _while(self, equation: Any, inputs: list[Reads]) -> list[Reads] | None:
        """Go on until nothing new is read; when a loop ends its condition says, for all elements alike."""
        p, inner = equation.params, _Walk(self.site_plates, self.depth, True)
        if not {"cond_nconsts", "body_nconsts", "cond_jaxpr", "body_jaxpr"} <= p.keys():
            return None
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        carry = inputs[second:]
        while True:
            asked = inner.through(p["cond_jaxpr"].jaxpr, [*inputs[:first], *carry])
            found = inner.through(p["body_jaxpr"].jaxpr, [*inputs[first:second], *carry])
            grown = [union(old, new, *asked) for old, new in zip(carry, found, strict=True)]
            if grown == carry:
                return carry
            carry = grown

    def _cond(self, equation: Any, inputs: list[Reads]) -> list[Reads]:
        branches = [self.through(branch.jaxpr, inputs[1:]) for branch in equation.params["branches"]]
        return [union(inputs[0], *(branch[i] for branch in branches)) for i in range(len(equation.outvars))]

    def _solved(self, equation: Any, inputs: list[Reads]) -> list[Reads] | None:
        """Follow the solver of a linear system, which computes the solution; the rest is for its derivatives."""
        lengths, solve = equation.params.get("const_lengths"), getattr(equation.params.get("jaxprs"), "solve", None)
        if lengths is None or solve is None:
            return None
        start, right = sum(lengths[: lengths._fields.index("solve")]), sum(lengths)
        return self.through(solve.jaxpr, [*inputs[start : start + lengths.solve], *inputs[right:]])


_OPENED = {"while": _Walk._while, "cond": _Walk._cond, "custom_linear_solve": _Walk._solved}
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
    "call_hi_primitive",
}


def union(*parts: Reads) -> Reads:
    """Return what any of the parts reads: an axis is one where it is the same for all; steps of different scans are no one's."""
    filled = [part for part in parts if part]
    if len(filled) < 2:
        return filled[0] if filled else _NOTHING
    result: dict[str, Dependency] = {}
    for reads in filled:
        for site, dependency in reads.items():
            old = result.get(site)
            result[site] = dependency if old is None or old == dependency else _joined(old, dependency)
    return result


def _joined(first: Dependency, second: Dependency) -> Dependency:
    axes = tuple(a if a == b else None for a, b in zip(first.axes, second.axes, strict=True))
    if first.scan is not second.scan or first.axes[0] != second.axes[0]:
        return Dependency(EVERY, None, (None, *axes[1:]))
    return Dependency(first.steps | second.steps, first.scan, axes)


def _moved(equation: Any, operand: int, reads: Reads) -> Reads:
    """Return what the output of an equation reads through an operand."""
    if all(axis is None for dependency in reads.values() for axis in dependency.axes):
        return reads
    result: dict[str, Dependency] = {}
    for site, dependency in reads.items():
        axes = tuple(None if axis is None else moved(equation, operand, axis) for axis in dependency.axes)
        lost = dependency.scan is not None and axes[0] is None
        result[site] = Dependency(EVERY, None, axes) if lost else Dependency(dependency.steps, dependency.scan, axes)
    return result


def _every_step(reads: Reads) -> Reads:
    return {site: Dependency(EVERY, None, (None, *dependency.axes[1:])) for site, dependency in reads.items()}


def _next_step(reads: Reads, step: int, outermost: bool) -> Reads:
    """Return what the next step reads through the carry: this step's draws are then earlier ones, and its element another."""
    result = {}
    for site, dependency in reads.items():
        axes = tuple(None if axis is not None and axis.at == step else axis for axis in dependency.axes)
        steps = AFTER if outermost and dependency.steps != EVERY else dependency.steps
        result[site] = Dependency(steps, dependency.scan, axes)
    return result


def _in_step(reads: Reads, step: int) -> Reads:
    """Return what a scan's step reads of an array that it goes along: an axis in front is the step itself."""

    def inside(axis: Axis | None) -> Axis | None:
        if axis is None or axis.at < 0:
            return axis
        if axis.at == 0:
            return Axis(step, 1, axis.size) if axis.inner == 1 else None
        return axis._replace(at=axis.at - 1)

    return {
        site: Dependency(dependency.steps, dependency.scan, tuple(map(inside, dependency.axes)))
        for site, dependency in reads.items()
    }


def _stacked(reads: Reads, step: int, scan: Any, length: int) -> Reads:
    """Return what the stacked outputs of a scan's steps read; the steps of `scan` then lie in front."""

    def outside(axis: Axis | None) -> Axis | None:
        if axis is None or step < axis.at < 0:
            return axis
        return Axis(0, 1, axis.size) if axis.at == step else axis._replace(at=axis.at + 1)

    result = {}
    for site, dependency in reads.items():
        axes = tuple(map(outside, dependency.axes))
        if scan is not None and dependency.steps != EVERY:
            result[site] = Dependency(dependency.steps, scan, (Axis(0, 1, length), *axes[1:]))
        else:
            result[site] = Dependency(dependency.steps, None, axes)
    return result
