"""A `scan` in which only what one step hands to the next is done step by step, and the rest on all steps at once.

NumPyro's `scan` splits keys, draws, and computes what densities read in one body, and the derivative goes through all of it once
more. What has to wait for the step before is less: keys are split whatever is drawn, a draw of the model waits for nothing, since it is
the guide's, and no gradient flows from step to step through draws of the score function. So a body is taken apart: into
loops of the carried values that depend on each other, which do only what these need, and operations on all steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplgrad.numpyro._compat_jax import Scan, scan_of
from pplgrad.numpyro._fusion.graph import Graph, Node, Value, above, flowing, graph_of, latent
from pplgrad.numpyro._fusion.grouping import EXPENSIVE, can_be_batched
from pplgrad.numpyro._fusion.threefry import operation

# More numbers of one value, over all steps, are not kept at once: a scan over so many is there to save memory.
ALL_STEPS = 1 << 22


def steps_of(node: Node, smooth: Sequence[bool], wanted: Sequence[bool], rows: int) -> Steps | None:
    """Return a scan taken apart, given which operands may carry gradient and which outputs are read; None where it runs as it stands.

    That is a scan of fewer than so many steps, of large values, or of operations that cannot be done on rows (control flow).
    """
    scan = scan_of(node.equation)
    if scan is None or scan.length < rows:
        return None
    graph = graph_of(scan.body)
    values = [value for inner in graph.nodes for value in inner.outputs]
    large = any(value.aval.size * scan.length > ALL_STEPS for value in values)
    return None if large or not all(map(can_be_batched, graph.nodes)) else Steps(scan, graph, smooth, wanted)


@dataclass(eq=False)
class _Loop:
    """Carried values, by number, that depend on each other, and the nodes that compute the next ones from them.

    `smooth` says whether gradient may flow from step to step, and `reads` what comes from outside.
    """

    carried: list[int]
    nodes: list[Node]
    smooth: bool
    reads: list[Value]


class Steps:
    """The function of its operands that a scan stands for; None is returned for an output that is not wanted."""

    def __init__(self, scan: Scan, graph: Graph, smooth: Sequence[bool], wanted: Sequence[bool]) -> None:
        self.scan, self.wanted = scan, wanted
        self.constants, given = graph.inputs[: len(scan.body.consts)], graph.inputs[len(scan.body.consts) :]
        self.fixed, self.carry = given[: scan.consts], given[scan.consts : scan.consts + scan.carry]
        self.rows = given[scan.consts + scan.carry :]
        self.results, self.after = graph.outputs, graph.outputs[: scan.carry]
        carrying = [value for value, s in zip(given, smooth, strict=True) if s]
        self._flows = self._flowing(graph, [*self.constants, *carrying])
        self.counted = {i: step for i in range(scan.carry) if (step := self._counts(i)) is not None}
        self.kept = {value: loop for loop in self._loops(graph) for value in self._kept(loop)}

    def __call__(self, *operands: Any) -> list[Any]:
        """Return the last carried values, and the outputs of all steps."""
        return _Run(self, operands).results()

    def _flowing(self, graph: Graph, inputs: list[Value]) -> set[Value]:
        """Return the values that may carry gradient."""
        while True:
            found = flowing(graph.nodes, inputs)
            more = [b for b, a in zip(self.carry, self.after, strict=True) if a in found and b not in found]
            if not more:
                return found
            inputs = inputs + more

    def _counts(self, i: int) -> Any:
        """Return what is added to a carried number in each step (0 for a value that stays), or None if more happens to it."""
        before, after = self.carry[i], self.after[i]
        if after is before:
            return 0
        if after.node is None or after.node.name != "add" or after.aval.shape:
            return None
        if not jnp.issubdtype(after.aval.dtype, jnp.integer):
            return None
        steps = [value.constant for value in after.node.operands if value is not before]
        return None if len(steps) != 1 or isinstance(steps[0], jax.Array) else steps[0]

    def _loops(self, graph: Graph) -> list[_Loop]:
        number = {value: i for i, value in enumerate(self.carry) if i not in self.counted}
        reads: dict[Value, set[int]] = {value: {i} for value, i in number.items()}
        for node in graph.nodes:
            found = {i for value in node.operands for i in reads.get(value, ())}
            reads.update((value, found) for value in node.outputs)
        reach = [set(reads.get(value, ())) for value in self.after]
        for middle in number.values():
            for found in reach:
                found |= reach[middle] if middle in found else set()
        groups = {tuple(j for j in sorted(reach[i]) if i in reach[j]) for i in number.values()}
        return [self._loop(group, reads) for group in sorted(groups) if group]

    def _loop(self, carried: Sequence[int], reads: dict[Value, set[int]]) -> _Loop:
        cone = above([self.after[j] for j in carried], lambda node: reads[node.outputs[0]].isdisjoint(carried))
        nodes = sorted(cone, key=lambda node: node.number)
        started = {self.carry[j] for j in carried}
        outside = [v for n in nodes for v in n.operands if v.node not in cone and v not in started]
        return _Loop(list(carried), nodes, bool(started & self._flows), list(dict.fromkeys(outside)))

    def _kept(self, loop: _Loop) -> list[Value]:
        """Return the values that a loop returns for each step. Other values that are read outside are recomputed.

        Of a loop without gradient no value is kept that carries one.
        """
        kept = [
            value
            for node in loop.nodes
            for value in node.outputs
            if (node.name in EXPENSIVE or latent(node)) and (loop.smooth or value not in self._flows)
        ]
        started = {self.carry[i] for i in loop.carried}
        made = {value.node for value in kept}
        for i in loop.carried:
            # What a step starts from is what the one before has ended with: this must not be computed from itself.
            nodes = above([self.after[i]], lambda node: node in made)
            if self.after[i] in started or any(value in started for node in nodes for value in node.operands):
                kept.append(self.after[i])
        return list(dict.fromkeys(kept))


@dataclass(frozen=True)
class _All:
    """A value of all steps, as rows; what stands without is the same in each."""

    rows: Any


class _Run:
    """The values of one evaluation."""

    def __init__(self, steps: Steps, operands: Sequence[Any]) -> None:
        self._steps, self._scan = steps, steps.scan
        self._known: dict[Value, Any] = dict(zip(steps.constants, steps.scan.body.consts, strict=True))
        consts, carry = operands[: self._scan.consts], operands[self._scan.consts :][: self._scan.carry]
        rows = operands[self._scan.consts + self._scan.carry :]
        self._known.update(zip(steps.fixed, consts, strict=True))
        self._known.update((value, _All(row)) for value, row in zip(steps.rows, rows, strict=True))
        self._start = {value: start for value, start in zip(steps.carry, carry, strict=True)}
        self._place = {value: i for i, value in enumerate(steps.carry)}
        self._ended: dict[int, Any] = {}
        for i, step in steps.counted.items():
            self._count(i, step)

    def _count(self, i: int, step: Any) -> None:
        value = self._steps.carry[i]
        start, length = self._start[value], self._scan.length
        if _is_zero(step):
            self._known[value], self._ended[i] = start, start
            return
        # Whole numbers wrap around after the largest one of their type, as they do step by step.
        numbers = np.arange(length + 1).astype(value.aval.dtype) * np.asarray(step, value.aval.dtype)
        ordered = numbers[-2::-1] if self._scan.reverse else numbers[:-1]
        self._known[value] = _All(ordered if _is_zero(start) else start + ordered)
        self._ended[i] = (start + numbers[-1:])[0]

    def results(self) -> list[Any]:
        """Return what the scan returns."""
        results: list[Any] = []
        for i, (value, wanted) in enumerate(zip(self._steps.results, self._steps.wanted, strict=True)):
            if not wanted:
                results.append(None)
            elif i < self._scan.carry:
                results.append(self._end(i))
            else:
                self._find(value)
                results.append(self._as_rows(self._value(value), value))
        return results

    def _end(self, i: int) -> Any:
        """Return the last of a carried value."""
        value = self._steps.after[i]
        if i not in self._ended:
            self._find(value)
        if i in self._ended:
            return self._ended[i]
        found = self._value(value)
        return found.rows[0 if self._scan.reverse else -1] if isinstance(found, _All) else found

    def _find(self, wanted: Value) -> None:
        """Compute a value, and before it those that it reads."""
        waiting = [wanted]
        while waiting:
            value = waiting[-1]
            missing = [] if self._is_known(value) else [v for v in self._reads(value) if not self._is_known(v)]
            waiting += missing
            if not missing:
                waiting.pop()
                if not self._is_known(value):
                    self._compute(value)

    def _is_known(self, value: Value) -> bool:
        return value.is_constant or value in self._known

    def _value(self, value: Value) -> Any:
        return value.constant if value.is_constant else self._known[value]

    def _reads(self, value: Value) -> Sequence[Value]:
        if value in self._steps.kept:
            return self._steps.kept[value].reads
        if value in self._place:
            return [self._steps.after[self._place[value]]]
        return value.node.operands  # type: ignore[union-attr]

    def _compute(self, value: Value) -> None:
        if value in self._steps.kept:
            self._repeat(self._steps.kept[value])
        elif value in self._place:
            self._known[value] = self._before(value)
        else:
            assert value.node is not None
            self._known.update(zip(value.node.outputs, self._evaluated(value.node), strict=True))

    def _before(self, value: Value) -> _All:
        """Return what each step starts from: what the one before has ended with."""
        after = self._steps.after[self._place[value]]
        rows = self._as_rows(self._value(after), after)
        start = jnp.asarray(self._start[value], value.aval.dtype)[None]
        return _All(jnp.concatenate([rows[1:], start] if self._scan.reverse else [start, rows[:-1]]))

    def _as_rows(self, found: Any, value: Value) -> Any:
        if isinstance(found, _All):
            return found.rows if isinstance(found.rows, jax.Array) else jnp.asarray(found.rows, value.aval.dtype)
        return jnp.broadcast_to(jnp.asarray(found, value.aval.dtype), (self._scan.length, *value.aval.shape))

    def _evaluated(self, node: Node) -> list[Any]:
        """Return the outputs of an operation: of all steps at once, or once if it does not depend on the step."""
        found = [self._value(value) for value in node.operands]
        if not any(isinstance(x, _All) for x in found):
            return operation(node.equation)(*found)
        if self._takes_turns(node, found):
            return [_All(jnp.expand_dims(found[0], 1))]
        arrays = [x.rows if isinstance(x, _All) else x for x in found]
        run = jax.vmap(operation(node.equation), in_axes=tuple(0 if isinstance(x, _All) else None for x in found))
        if all(isinstance(x, np.ndarray) or np.isscalar(x) for x in arrays):
            with jax.ensure_compile_time_eval():  # Numbers of steps, and what follows from them.
                return [_All(np.asarray(x)) for x in run(*arrays)]
        return [_All(x) for x in run(*arrays)]

    def _takes_turns(self, node: Node, found: Sequence[Any]) -> bool:
        """Whether an operation takes, in step t, place t along the first axis of an array: as the model takes the guide's draws."""
        if node.name != "dynamic_slice" or isinstance(found[0], _All) or len(found) < 2:
            return False
        array, first, *others = found
        whole = (1, *np.shape(array)[1:])
        steps = first.rows if isinstance(first, _All) else None
        return (
            node.equation.params["slice_sizes"] == whole
            and np.shape(array)[0] == self._scan.length
            and isinstance(steps, np.ndarray)
            and bool(np.all(steps == np.arange(self._scan.length)))
            and all(_is_zero(x) for x in others)
        )

    def _repeat(self, loop: _Loop) -> None:
        """Do step after step what carried values need; without gradient where none flows from step to step."""
        hold: Callable[[Any], Any] = (lambda x: x) if loop.smooth else stop_gradient
        carried = [self._steps.carry[i] for i in loop.carried]
        start = [hold(jnp.asarray(self._start[value], value.aval.dtype)) for value in carried]
        found = {value: self._value(value) for value in loop.reads}
        rows = {value: hold(x.rows) for value, x in found.items() if isinstance(x, _All)}
        fixed = {value: hold(x) for value, x in found.items() if not isinstance(x, _All)}
        after = [self._steps.after[i] for i in loop.carried]
        kept = [value for value, other in self._steps.kept.items() if other is loop]
        operations = [(node, operation(node.equation)) for node in loop.nodes]

        def step(carry: list, row: list) -> tuple[list, list]:
            known = {**fixed, **dict(zip(rows, row, strict=True)), **dict(zip(carried, carry, strict=True))}
            for node, run in operations:
                operands = [value.constant if value.is_constant else known[value] for value in node.operands]
                known.update(zip(node.outputs, run(*operands), strict=True))
            return [known[value] for value in after], [known[value] for value in kept]

        ends, steps = jax.lax.scan(
            step,
            start,
            list(rows.values()),
            length=self._scan.length,
            reverse=self._scan.reverse,
            unroll=self._scan.unroll,
        )
        self._ended.update(zip(loop.carried, ends, strict=True))
        self._known.update((value, _All(x)) for value, x in zip(kept, steps, strict=True))


def _is_zero(x: Any) -> bool:
    return not isinstance(x, (jax.Array, _All)) and bool(np.all(np.equal(x, 0)))


def stop_gradient(x: Any) -> Any:
    """Return a value as a constant to differentiation."""
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x
