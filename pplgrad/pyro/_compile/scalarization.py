"""Stacks of numbers in a recorded graph, taken apart: a row of its own for each number, and no array of them.

An eager step handles many sites in few operations on stacked arrays. A compiler is better served by the numbers themselves: it
keeps each in a register, where every array between two kernels, and every view of it, has to be allocated at each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from pplgrad.pyro._compile.aten_recorder import must_run, writes

aten: Any = torch.ops.aten

_LONGEST = 256
"""Gradients of the elements of a longer vector stay the vectors that they are."""


@dataclass(frozen=True)
class Rows:
    """An array of `ndim` dimensions as its rows along `dim`, without that dimension; None stands for a row of zeros.

    There are at least two rows, of one number each: all their dimensions have length one, and may change places.
    """

    dim: int
    ndim: int
    rows: tuple[Node | None, ...]

    @property
    def right(self) -> int:
        """The place of `dim` counted from the right, which broadcasting goes by."""
        return self.ndim - self.dim

    def axis(self, dim: int) -> int:
        """Return which dimension of the array `dim` is, counted from the left."""
        return dim % self.ndim

    def within(self, axis: int) -> int:
        """Return which dimension of a row another dimension of the array is."""
        return axis - (axis > self.dim)


def scalarize(module: GraphModule) -> bool:
    """Let a graph compute with the rows of its stacks of numbers, and return whether anything is computed with them.

    What it computes stays the same, but for the rounding of sums. An operation that is not known here gets the stack, and a graph that
    writes into tensors stays as it is.
    """
    graph = module.graph
    beginnings = _beginnings(graph)
    if not beginnings or any(writes(node) for node in graph.nodes):
        return False
    scalarizer = _Scalarizer(graph)
    for node in list(graph.nodes):
        scalarizer.visit(node, node in beginnings)
    graph.eliminate_dead_code(must_run)
    graph.lint()
    module.recompile()
    return scalarizer.followed


def _beginnings(graph: Graph) -> set[Node]:
    """Return the nodes that make a stack of numbers, or a vector of which one element is not zero, if most elements are made so."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    stacks = [node for node in calls if node.target is aten.stack.default]
    elements = [node for node in calls if node.target is aten.select_backward.default and len(_shape(node)) == 1]
    made = Counter(_shape(node)[0] for node in elements)
    return {
        *(node for node in stacks if len(node.args[0]) > 1 and prod(_shape(node.args[0][0])) == 1),  # type: ignore
        *(node for node in elements if 1 < (length := _shape(node)[0]) <= min(_LONGEST, 2 * made[length])),
    }


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["like"].shape)


def _kind(node: Any) -> tuple:
    return _shape(node), node.meta["like"].dtype


def _adds_numbers(node: Node) -> bool:
    """Return whether a sum has the dtype of what is added up, which is not so for integers and truth values."""
    return not node.kwargs and node.args[0].meta["like"].is_floating_point()  # type: ignore[union-attr]


class _Scalarizer:
    """Goes through a graph once; `known` are the nodes whose rows exist, `followed` says whether something is made of rows."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[Node, Rows] = {}
        self.followed = False

    def visit(self, node: Node, begins: bool) -> None:
        """Give a node rows, another node in its place, or the stacks that it needs."""
        inputs = [x for x in node.all_input_nodes if x in self.known]
        with self.graph.inserting_before(node):
            found = None
            if begins and not inputs:
                found = self._beginning(node)
            elif inputs and node.op == "call_function":
                found = self._followed(node)
                self.followed |= found is not None
            if isinstance(found, Rows):
                self.known[node] = found
            elif found is not None:
                node.replace_all_uses_with(found)
            else:
                for x in inputs:
                    node.replace_input_with(x, self._stacked(self.known[x]))

    def make(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add an operation, with what it makes as its `meta["like"]`."""
        node = self.graph.call_function(target, args, kwargs)
        on_meta = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
        like: Any = map_aggregate((args, on_meta), lambda x: x.meta["like"] if isinstance(x, Node) else x)
        node.meta["like"] = target(*like[0], **like[1])
        return node

    def _beginning(self, node: Node) -> Rows:
        given: Any = node.args
        ndim = len(_shape(node))
        if node.target is aten.stack.default:
            return Rows(given[1] % ndim if len(given) > 1 else 0, ndim, tuple(given[0]))
        x, (size,), _, index = given
        return Rows(0, 1, tuple(x if i == index % size else None for i in range(size)))

    def _followed(self, node: Node) -> Rows | Node | None:
        """Return what a node makes of rows, or None if it needs the stack."""
        if not isinstance(node.target, torch._ops.OpOverload) or any(isinstance(x, Node) for x in node.kwargs.values()):
            return None
        if "like" not in node.meta or must_run(node):
            return None
        if node.target is aten.add.Tensor and not node.kwargs:
            added = self._added(node)
            if added is not None:
                return added
        if any(None in self.known[x].rows for x in node.all_input_nodes if x in self.known):
            return None
        if node.target in _POINTWISE or torch.Tag.pointwise in node.target.tags:
            return self._pointwise(node)
        rule = _RULES.get(node.target)
        return None if rule is None or node.args[0] not in self.known else rule(self, node, self.known[node.args[0]])

    def _added(self, node: Node) -> Rows | None:
        """Return the sum of two arrays that may have rows of zeros."""
        first, second = (self.known.get(x) for x in node.args)  # type: ignore[arg-type]
        if first is None or second is None or first.dim != second.dim or len({_kind(x) for x in node.args}) > 1:
            return None
        pairs = zip(first.rows, second.rows, strict=True)
        rows = [y if x is None else x if y is None else self.make(aten.add.Tensor, x, y) for x, y in pairs]
        return Rows(first.dim, first.ndim, tuple(rows))

    def _pointwise(self, node: Node) -> Rows | None:
        nodes = node.all_input_nodes
        known = [self.known[x] for x in nodes if x in self.known]
        # A number's dtype counts for less beside an array's: with one dtype alone it does not matter that rows are numbers.
        if len({x.right for x in known}) > 1 or len({x.meta["like"].dtype for x in nodes} - {torch.bool}) > 1:
            return None
        right, count = known[0].right, len(known[0].rows)
        # Rows beside an array would be arrays themselves, one operation for each, and read with a stride.
        if node.meta["like"].numel() != count or not all(x in node.args for x in nodes):
            return None
        columns = [self._column(x, right, count) for x in node.args]
        rows = [self.make(node.target, *row, **node.kwargs) for row in zip(*columns, strict=True)]
        ndim = len(_shape(node))
        return Rows(ndim - right, ndim, tuple(rows))

    def _column(self, x: Any, right: int, count: int) -> Sequence[Any]:
        """Return what an argument is for each row."""
        if isinstance(x, Node) and x in self.known:
            return self.known[x].rows
        if not isinstance(x, Node) or len(_shape(x)) < right:
            return [x] * count
        dim = len(_shape(x)) - right
        if _shape(x)[dim] == 1:
            return [self.make(aten.select.int, x, dim, 0)] * count
        return [self.make(aten.select.int, x, dim, i) for i in range(count)]

    def _stacked(self, x: Rows) -> Node:
        rows = list(x.rows)
        if None in rows:
            zero = self.make(aten.zeros_like.default, next(row for row in rows if row is not None))
            rows = [zero if row is None else row for row in rows]
        return self.make(aten.stack.default, rows, x.dim)

    def sums(self, rows: Sequence[Any]) -> tuple[Node, ...]:
        """Return the first row, the sum of the first two, and so on."""
        sums = [rows[0]]
        for row in rows[1:]:
            sums.append(self.make(aten.add.Tensor, sums[-1], row))
        return tuple(sums)

    def each(self, x: Rows, target: Any, *args: Any) -> Rows:
        """Return the rows after the same was done to each."""
        return replace(x, rows=tuple(self.make(target, row, *args) for row in x.rows))


def _sum(scalarizer: _Scalarizer, node: Node, x: Rows) -> Node | Rows | None:
    if not _adds_numbers(node):
        return None
    given: Any = node.args
    keep = len(given) > 2 and given[2]
    axes = sorted(x.axis(dim) for dim in (given[1] if len(given) > 1 else ()) or range(x.ndim))
    within = [x.within(axis) for axis in axes if axis != x.dim]
    gone = [] if keep else axes
    if within:
        x = scalarizer.each(x, aten.sum.dim_IntList, within, keep)
    if x.dim not in axes:
        return Rows(x.dim - sum(axis < x.dim for axis in gone), x.ndim - len(gone), x.rows)
    total = scalarizer.sums(x.rows)[-1]
    return scalarizer.make(aten.unsqueeze.default, total, x.dim) if keep else total


def _cumsum(scalarizer: _Scalarizer, node: Node, x: Rows) -> Rows | None:
    given: Any = node.args
    if not _adds_numbers(node):
        return None
    axis = x.axis(given[1])
    return replace(x, rows=scalarizer.sums(x.rows)) if axis == x.dim else x


def _flip(scalarizer: _Scalarizer, node: Node, x: Rows) -> Rows:
    given: Any = node.args
    return replace(x, rows=x.rows[::-1]) if x.dim in [x.axis(dim) for dim in given[1]] else x


def _permute(scalarizer: _Scalarizer, node: Node, x: Rows) -> Rows:
    given: Any = node.args
    return replace(x, dim=[x.axis(dim) for dim in given[1]].index(x.dim))


def _select(scalarizer: _Scalarizer, node: Node, x: Rows) -> Rows | Node | None:
    given: Any = node.args
    axis, index = x.axis(given[1]), given[2]
    if axis == x.dim:
        return x.rows[index]
    return replace(scalarizer.each(x, node.target, x.within(axis), index), dim=x.dim - (axis < x.dim), ndim=x.ndim - 1)


def _unsqueeze(scalarizer: _Scalarizer, node: Node, x: Rows) -> Rows:
    given: Any = node.args
    axis = given[1] % (x.ndim + 1)
    before = axis <= x.dim
    return replace(scalarizer.each(x, node.target, axis - (not before)), dim=x.dim + before, ndim=x.ndim + 1)


def _squeeze(scalarizer: _Scalarizer, node: Node, x: Rows) -> Rows:
    given: Any = node.args
    axis = x.axis(given[1])
    if axis == x.dim:
        return x
    return replace(scalarizer.each(x, node.target, x.within(axis)), dim=x.dim - (axis < x.dim), ndim=x.ndim - 1)


def _expand(scalarizer: _Scalarizer, node: Node, x: Rows) -> Rows | None:
    return x if _shape(node) == _shape(node.args[0]) else None


_POINTWISE = (aten.clone.default, aten.detach.default, aten.alias.default, aten._to_copy.default)

_RULES: dict[Any, Callable[[_Scalarizer, Node, Rows], Rows | Node | None]] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.cumsum.default: _cumsum,
    aten.flip.default: _flip,
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.expand.default: _expand,
}
