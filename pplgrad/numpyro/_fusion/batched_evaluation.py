"""Evaluation of a traced program with what several sites have in common done together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.numpyro._array_ops import ours
from pplgrad.numpyro._compat_jax import with_weakness
from pplgrad.numpyro._fusion.graph import Node, Value, flowing, graph_of
from pplgrad.numpyro._fusion.grouping import Group
from pplgrad.numpyro._fusion.loop_rerolling import OUTPUTS, Loop
from pplgrad.numpyro._fusion.scan_fission import Steps, steps_of, stop_gradient
from pplgrad.numpyro._fusion.scheduling import ROWS, plan
from pplgrad.numpyro._fusion.stacked_views import StackedViews, cut, gathered, picked
from pplgrad.numpyro._fusion.threefry import operation

# An array and the row of it that a value is, or None where the value is the array.
Place = tuple[jax.Array, int | None]


def fused(closed: Any, wanted: Sequence[bool]) -> BatchedProgram | None:
    """Return a closed jaxpr whose outputs are `wanted` or not, with what it does several times done together.

    None where there is not enough of that: the program is best left as it was traced.
    """
    batched = BatchedProgram(closed, wanted)
    return batched if batched.changes_something else None


class BatchedProgram:
    """A closed jaxpr as a function of its flat arguments.

    It returns arrays that hold the outputs; `places` says, once it was called, in which array each output is, and in which row
    of it (None: it is the array). An output that is not `wanted` is in none (None).
    """

    def __init__(self, closed: Any, wanted: Sequence[bool], rows: int = ROWS) -> None:
        self._constants = closed.consts
        self._graph = graph_of(closed)
        self._outputs = [value if w else None for value, w in zip(self._graph.outputs, wanted, strict=True)]
        self._steps = self._scans(rows)
        self._plan = plan(self._graph, [value for value in self._outputs if value is not None], rows)
        self.places: list[tuple[int, int | None] | None] = []

    @property
    def changes_something(self) -> bool:
        """Whether anything is done together or taken apart; else the program is best left as it was traced."""
        groups = (isinstance(group, Loop) or len(group.nodes) > 1 for group in self._plan)
        return any(groups) or any(node in self._steps for group in self._plan for node in group.nodes)

    def _scans(self, rows: int) -> dict[Node, Steps]:
        """Return the scans that are taken apart."""
        scans = [node for node in self._graph.nodes if node.name == "scan"]
        if not scans:
            return {}
        smooth = flowing(self._graph.nodes, self._graph.inputs)
        read = {value for node in self._graph.nodes for value in node.operands} | set(self._outputs)
        found: dict[Node, Steps] = {}
        for node in scans:
            operands = [value in smooth for value in node.operands]
            steps = steps_of(node, operands, [value in read for value in node.outputs], rows)
            if steps is not None:
                found[node] = steps
        return found

    @ours
    def __call__(self, *arguments: Any) -> list[jax.Array]:
        run = _Run(self._steps)
        run.drawn.update(
            (value, (array, None))
            for value, array in zip(self._graph.inputs, (*self._constants, *arguments), strict=True)
        )
        for group in self._plan:
            if isinstance(group, Loop):
                run.repeat(group)
            else:
                run.evaluate(group)
        return self._sources(run)

    def unpacked(self, found: Sequence[jax.Array]) -> tuple[list, StackedViews]:
        """Return the outputs, from the arrays that a call returned with the particles in front, and which are rows of one."""
        views = StackedViews()
        outputs = [None if place is None else _at(found, views, *place) for place in self.places]
        return outputs, views

    def _sources(self, run: _Run) -> list[jax.Array]:
        """Return the arrays in which the outputs are, with the types that were traced, and note which output is where."""
        sources: list[jax.Array] = []
        numbers: dict[tuple[int, bool], int] = {}
        self.places = []
        for value in self._outputs:
            if value is None:
                self.places.append(None)
                continue
            array, row = run.place(value, False)
            weak = bool(getattr(value.aval, "weak_type", False))
            if (id(array), weak) not in numbers:
                numbers[id(array), weak] = len(sources)
                sources.append(with_weakness(array, weak))
            self.places.append((numbers[id(array), weak], row))
        return sources


def _at(found: Sequence[jax.Array], views: StackedViews, source: int, row: int | None) -> jax.Array:
    return found[source] if row is None else views.row(found[source], row)


class _Run:
    """The values of one evaluation: those of the first phase in `drawn`, those of the second, which go before, in `scored`."""

    def __init__(self, steps: Mapping[Node, Steps]) -> None:
        self._steps = steps
        self.drawn: dict[Value, Place] = {}
        self.scored: dict[Value, Place] = {}
        self._rows: dict[int, tuple[jax.Array, list[jax.Array]]] = {}
        self._stacks: dict[Any, jax.Array] = {}

    def place(self, value: Value, drawing: bool) -> Place:
        """Return where a value is, as one of the phases sees it."""
        if value.is_constant:
            return value.constant, None
        return self.drawn[value] if drawing or value not in self.scored else self.scored[value]

    def evaluate(self, group: Group) -> None:
        """Evaluate a group and keep its outputs."""
        kept = self.drawn if group.drawing else self.scored
        first = group.nodes[0]
        if len(group.nodes) == 1:
            run = self._steps.get(first) or operation(first.equation)
            found = run(*(self._one(value, group.drawing) for value in first.operands))
            kept.update((value, (array, None)) for value, array in zip(first.outputs, found, strict=True))
        else:
            for place, array in enumerate(self._evaluate_group(group)):
                kept.update((node.outputs[place], (array, row)) for row, node in enumerate(group.nodes))

    def _evaluate_group(self, group: Group) -> list[jax.Array]:
        first = group.nodes[0]
        if first.name == "slice" and len({node.operands[0].exactly for node in group.nodes}) == 1:
            return [self._slices(group)]
        operands: list[Any] = []
        axes: list[int | None] = []
        for values in zip(*(node.operands for node in group.nodes), strict=True):
            if len({value.exactly for value in values}) == 1:
                operands.append(self._one(values[0], group.drawing))
                axes.append(None)
            else:
                operands.append(self._stack(values, group.drawing))
                axes.append(0)
        return jax.vmap(operation(first.equation), in_axes=tuple(axes))(*operands)

    def _slices(self, group: Group) -> jax.Array:
        """Return one place after the other along an axis of one array, as rows."""
        whole = group.nodes[0].operands[0]
        array = jnp.asarray(self._one(whole, group.drawing))
        starts = [node.equation.params["start_indices"] for node in group.nodes]
        part = group.nodes[0].outputs[0].aval.shape
        axis = next(i for i in range(array.ndim) if part[i] != array.shape[i])
        places = [start[axis] for start in starts]
        return jnp.expand_dims(picked(jnp.moveaxis(array, axis, 0), places), axis + 1)

    def repeat(self, loop: Loop) -> None:
        """Draw turn after turn; nothing that comes out of it carries gradient."""
        columns = list(zip(*loop.outside, strict=True))
        varies = [len({value.exactly for value in column}) > 1 for column in columns]
        fixed = [None if v else stop_gradient(self._one(c[0], True)) for c, v in zip(columns, varies, strict=True)]
        rows = [stop_gradient(self._stack(c, True)) if v else None for c, v in zip(columns, varies, strict=True)]
        runs = [operation(node.equation) for node in loop.turns[0]]

        def step(carry: list, row: list) -> tuple[list, list]:
            found: list[list] = []
            for run, sources in zip(runs, loop.read, strict=True):
                operands = []
                for kind, number in sources:
                    if kind == "same":
                        operands.append(found[number // OUTPUTS][number % OUTPUTS])
                    elif kind == "before":
                        operands.append(carry[number])
                    else:
                        operands.append(row[number] if varies[number] else fixed[number])
                found.append(run(*operands))
            return [found[i][place] for i, place in loop.carried], [found[i][place] for i, place in loop.kept]

        start = [stop_gradient(_as(value.aval.dtype, self._one(value, True))) for value in loop.before]
        _, kept = jax.lax.scan(step, start, rows, length=len(loop.turns))
        for (i, place), array in zip(loop.kept, kept, strict=True):
            self.drawn.update((nodes[i].outputs[place], (array, row)) for row, nodes in enumerate(loop.turns))

    def _one(self, value: Value, drawing: bool) -> Any:
        """Return a value as an array of its own."""
        array, row = self.place(value, drawing)
        return array if row is None else self._row(array, row)

    def _row(self, array: jax.Array, row: int) -> jax.Array:
        """Return a row; all rows of an array are cut at once, whose derivative is one concatenation."""
        if id(array) not in self._rows:
            self._rows[id(array)] = array, cut(array)
        return self._rows[id(array)][1][row]

    def _stack(self, values: Sequence[Value], drawing: bool) -> jax.Array:
        """Return values as the rows of one array, with as few cuts as there are."""
        key = (tuple(value.exactly for value in values), drawing)
        if key not in self._stacks:
            places = [self.place(value, drawing) for value in values]
            self._stacks[key] = gathered([(_as(values[0].aval.dtype, array), row) for array, row in places])
        return self._stacks[key]


def _as(dtype: Any, array: Any) -> jax.Array:
    return array if isinstance(array, jax.Array) else jnp.asarray(array, dtype)
