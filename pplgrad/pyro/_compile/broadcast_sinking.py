"""What is the same along a dimension computed once: elementwise operations done before their operand is expanded, not after.

Hosts expand a distribution's parameters to the shape of a draw, particles included, and take a sigmoid or a logarithm of the expanded
array: once more for each particle. A compiler would fuse that into its loops as it stands.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from pplgrad.pyro._compile.aten_recorder import must_run

aten: Any = torch.ops.aten


def sink_broadcasts(graph: Graph) -> None:
    """Let elementwise operations read arrays as they were before they were expanded, and compute no element twice.

    The graph is one of ATen operations that writes into nothing but its inputs, at its end, and `meta["val"]` of a node has the shape of
    what it returns. Its values stay the same.
    """
    before: dict[Node, Node] = {}
    given = set(graph.nodes)
    for node in list(graph.nodes):
        if node.target is aten.expand.default and _has_dimensions(node.args[0]):
            before[node] = before.get(node.args[0], node.args[0])
        elif any(x in before for x in node.all_input_nodes) and _is_elementwise(node):
            _visit(graph, node, before)
    for node in reversed(graph.nodes):
        if not node.users and (node in before or node not in given):
            graph.erase_node(node)


def _visit(graph: Graph, node: Node, before: dict[Node, Node]) -> None:
    """Let an operation read the arrays before they were expanded; if its result is smaller then, others may need the whole one too."""
    args, kwargs = map_arg(node.args, lambda x: before.get(x, x)), map_arg(node.kwargs, lambda x: before.get(x, x))
    shape = torch.broadcast_shapes(*(before.get(x, x).meta["val"].shape for x in node.all_input_nodes))
    full = node.meta["val"].shape
    if shape == full:
        node.args, node.kwargs = args, kwargs
    elif prod(shape) < prod(full):
        with graph.inserting_before(node):
            found = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        value = node.target(*map_arg(args, _value), **map_arg(kwargs, _value))  # type: ignore[operator]
        found.meta = {**node.meta, "val": value}
        found.meta.pop("tensor_meta", None)
        before[node] = found


def _value(node: Node) -> Any:
    return node.meta["val"]


def _has_dimensions(node: Any) -> bool:
    # What has none decides otherwise than other arrays on the dtype of a result.
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dim() > 0


def _is_elementwise(node: Node) -> bool:
    """Return whether each element of a result follows from those of the operands at its place, and from nothing random."""
    return (
        torch.Tag.pointwise in getattr(node.target, "tags", ())
        and not must_run(node)
        and all(map(_has_dimensions, (node, *node.all_input_nodes)))
    )
