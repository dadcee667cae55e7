"""A traced program as a graph of operations: calls opened, what is the same computed once, what is not wanted left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.numpyro._compat_jax import as_slices, call_body, is_custom_jvp, is_literal, tag_of
from pplgrad.numpyro._fusion.structural_equality import Itself, Structure, array

_TAG = "tag"


@dataclass(eq=False, repr=False)
class Value:
    """Something that operations read: an output of a node, an input of the program, or a constant written in place."""

    aval: Any
    node: Node | None = None
    place: int = 0
    constant: Any = None

    @property
    def is_constant(self) -> bool:
        """Whether it is written in place."""
        return self.node is None and self.constant is not None

    @cached_property
    def exactly(self) -> Any:
        """What tells whether two values are one and the same."""
        return (self.aval, array(self.constant)) if self.is_constant else Itself(self)


@dataclass(eq=False, repr=False)
class Node:
    """One operation; those with the same `settings` do the same to the same operands.

    `derivative` is the program of the value and the derivative of a function that has one of its own. `leaf` says that what
    reads its output need not know where that comes from: see `_alike`.
    """

    number: int
    equation: Any
    operands: tuple[Value, ...]
    settings: int
    derivative: Any = None
    outputs: list[Value] = field(default_factory=list)
    leaf: bool = False

    @property
    def name(self) -> str:
        """The name of the operation."""
        return self.equation.primitive.name

    @property
    def parents(self) -> Iterator[Node]:
        """The nodes that it reads."""
        return (value.node for value in self.operands if value.node is not None)


@dataclass
class Graph:
    """The nodes in an order in which they can be evaluated, the inputs (constants of the jaxpr first), and the outputs."""

    nodes: list[Node]
    inputs: list[Value]
    outputs: list[Value]


def graph_of(closed: Any) -> Graph:
    """Return the graph of a closed jaxpr."""
    jaxpr = closed.jaxpr
    variables = [*jaxpr.constvars, *jaxpr.invars]
    inputs = [Value(var.aval) for var in variables]
    builder = _Builder()
    outputs = builder.add(jaxpr, dict(zip(variables, inputs, strict=True)))
    return Graph(builder.nodes, inputs, outputs)


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._known: dict[Any, Node] = {}
        self._structure = Structure()
        self._numbers: dict[Any, int] = {}

    def add(self, jaxpr: Any, env: dict[Any, Value]) -> list[Value]:
        def read(atom: Any) -> Value:
            return Value(atom.aval, constant=atom.val) if is_literal(atom) else env[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            body = call_body(equation) or as_slices(equation)
            if body is not None:
                inner = dict(zip(body.jaxpr.invars, operands, strict=True))
                # A constant array inside a call is as good as one written in place.
                inner.update(
                    (var, Value(var.aval, constant=const))
                    for var, const in zip(body.jaxpr.constvars, body.consts, strict=True)
                )
                outputs = self.add(body.jaxpr, inner)
            elif _changes_nothing(equation, operands[:1]):
                outputs = operands
            else:
                outputs = self._node(equation, tuple(operands)).outputs
            env.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _node(self, equation: Any, operands: tuple[Value, ...]) -> Node:
        """Return a node for an equation: the one that is there, if the same was computed before."""
        # What is read has been found before: from here on a tag's name says nothing.
        same = _TAG if tag_of(equation) is not None else self._structure.operation(equation)
        settings = self._numbers.setdefault(same, len(self._numbers))
        key = (settings, _read(operands))
        node = self._known.get(key)
        if node is None:
            derivative = self._structure.derivative(equation) if is_custom_jvp(equation) else None
            node = Node(len(self.nodes), equation, operands, settings, derivative)
            node.outputs = [Value(var.aval, node, i) for i, var in enumerate(equation.outvars)]
            self.nodes.append(node)
            self._known[key] = node
        return node


def _read(operands: Iterable[Value]) -> Any:
    """Return what operations read that read the same in the same places."""
    return tuple(value.exactly for value in operands)


def above(values: Iterable[Value], stop: Any) -> set[Node]:
    """Return the nodes that values are computed from, without those for which `stop` is true, and what these need."""
    found: set[Node] = set()
    waiting = [value.node for value in values if value.node is not None]
    while waiting:
        node = waiting.pop()
        if node not in found and not stop(node):
            found.add(node)
            waiting.extend(node.parents)
    return found


def without_gradient(value: Value) -> bool:
    """Whether no gradient flows through a value, as far as its type and where it comes from tell."""
    if not jnp.issubdtype(value.aval.dtype, jnp.inexact):
        return True
    if value.is_constant:
        return not isinstance(value.constant, jax.core.Tracer)
    return value.node is not None and (value.node.name == "stop_gradient" or latent(value.node))


def latent(node: Node) -> bool:
    """Whether a node is the value of a latent site through which no gradient flows."""
    return tag_of(node.equation) is not None and without_gradient(node.operands[0])


def flowing(nodes: Iterable[Node], inputs: Iterable[Value]) -> set[Value]:
    """Return the values that may carry gradient if these inputs do."""
    found = {value for value in inputs if jnp.issubdtype(value.aval.dtype, jnp.inexact)}
    for node in nodes:
        if any(value in found or (value.is_constant and not without_gradient(value)) for value in node.operands):
            found.update(value for value in node.outputs if not without_gradient(value))
    return found


def _changes_nothing(equation: Any, operands: Sequence[Value]) -> bool:
    """Whether an equation holds constant what is so already, or marks a latent value again (the model's, after the guide's)."""
    if equation.primitive.name == "stop_gradient":
        return without_gradient(operands[0])
    return tag_of(equation) is not None and operands[0].node is not None and latent(operands[0].node)


def levels(nodes: Sequence[Node]) -> dict[Node, int]:
    """Return how many latent values stand, one upon the other, above each node."""
    found: dict[Node, int] = {}
    for node in nodes:
        found[node] = max((found[parent] + latent(parent) for parent in node.parents), default=0)
    return found
