"""The operations of a program sorted by what they do to what."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.numpyro._compat_jax import call_body, host_primitives, is_custom_jvp, is_threefry, sub_jaxprs
from pplgrad.numpyro._fusion.graph import Node, Value

# Up to this many numbers in each are done together: beyond, a call costs little beside its work.
NUMBERS = 1 << 14

_RANDOM = {"random_bits", "random_wrap", "random_unwrap", "random_fold_in", "random_split"}
# Operations that cost too much to be done again.
EXPENSIVE = {"dot_general", "gather", "dynamic_slice", "scatter-add", "sort", *_RANDOM}
_ALIKE = EXPENSIVE | set(
    "abs acos acosh add add_any and argmax argmin asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type "
    "broadcast_in_dim cbrt ceil clamp concatenate convert_element_type copy cos cosh cumlogsumexp cummax cummin cumprod cumsum "
    "custom_jvp_call digamma div eq erf erf_inv erfc exp exp2 expand_dims expm1 floor ge gt igamma igammac integer_pow is_finite iota le lgamma "
    "log log1p logistic lt max min mul name ne neg nextafter not or pad polygamma pow reduce_and reduce_max reduce_min reduce_or "
    "reduce_prod reduce_sum regularized_incomplete_beta rem reshape rev round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh slice sqrt square squeeze stack stop_gradient sub tan tanh transpose xor".split()
)


@dataclass
class Group:
    """Nodes that are done together, in this order of rows; one node alone is done as it stands.

    `drawing` says that they belong to the first phase.
    """

    nodes: list[Node]
    drawing: bool


class Kinds:
    """Nodes sorted into kinds: those of one kind differ in the rows of the same arrays that they read alone.

    The `known` nodes are there before: whoever reads them need not know where they come from. `inputs` counts the program's
    inputs by type, and kinds of fewer than `rows` nodes are left alone.
    """

    def __init__(self, nodes: Iterable[Node], known: set[Node], inputs: Mapping[Any, int], rows: int) -> None:
        self._nodes = sorted(nodes, key=lambda node: node.number)
        self._known, self._inputs, self._rows = known, inputs, rows
        self._elements = _elements(self._nodes)
        self._opaque = {node for node in self._nodes if not can_be_batched(node)}
        self._alone = set(self._opaque)
        self._loose: set[Node] = set()
        self._kind: dict[Node, int] = {}
        # How many operations that are never done together stand one upon the other above a kind, and how many others since.
        self._depth: list[tuple[int, int]] = []
        self._members: dict[int, list[Node]] = {}
        self._sort()

    def _sort(self) -> None:
        """Sort until every kind is large enough.

        A node that finds too few of its kind is first compared by what it reads beside constants, then left alone.
        """
        while True:
            self._name()
            small = {node for members in self._members.values() if len(members) < self._rows for node in members}
            constants = {node for node in small if any(value.is_constant for value in node.operands)}
            if not constants <= self._loose:
                self._loose |= constants  # What reads these may find its kind yet.
            elif not small <= self._alone:
                self._alone |= small
            else:
                return

    def _name(self) -> None:
        numbers: dict[Any, int] = {}
        self._kind, self._depth, self._members = {}, [], {}
        for node in self._nodes:
            parents = [(p in self._opaque, self._kind[p]) for p in node.parents if p in self._kind and not p.leaf]
            stage = max((self._depth[kind][0] + opaque for opaque, kind in parents), default=0)
            kind = numbers.setdefault((stage, self._key(node)), len(numbers))
            if kind == len(self._depth):
                since = [depth for here, depth in (self._depth[kind] for _, kind in parents) if here == stage]
                self._depth.append((stage, 1 + max(since, default=0)))
            self._kind[node] = kind
            self._members.setdefault(kind, []).append(node)

    def _key(self, node: Node) -> Any:
        if node in self._alone:
            return node.number
        if node in self._elements:
            return "elements", self._elements[node]
        loose = node in self._loose
        return node.settings, loose, tuple(self._operand(value, loose) for value in node.operands)

    def _operand(self, value: Value, loose: bool) -> Any:
        if value.is_constant:
            return ("constant", value.aval) if loose and value.aval.shape == () else value.exactly
        if value.node is None:
            # A parameter of its own for each of many sites is one row of all of them.
            return ("inputs", value.aval) if self._inputs[value.aval] >= self._rows else value.exactly
        if value.node.leaf or value.node in self._known or value.node in self._opaque:
            return "known", value.aval, value.place
        return self._kind[value.node], value.place

    def on_several_levels(self, level: Mapping[Node, int]) -> set[Node]:
        """Return the nodes whose kinds are on several levels, and done together if that does not matter."""
        spread = (nodes for nodes in self._members.values() if len({level[node] for node in nodes}) > 1)
        return {node for nodes in spread for node in nodes} - self._alone

    def groups(self, level: Mapping[Node, int] | None) -> Iterator[Group]:
        """Yield the groups in an order in which they can be done: level by level where these are given, in the first phase."""
        found: dict[Any, list[Node]] = defaultdict(list)
        for node in self._nodes:
            kind = self._kind[node]
            found[0 if level is None else level[node], self._depth[kind], kind].append(node)
        for place in sorted(found):
            members = found[place]
            if len(members) < self._rows:
                yield from (Group([node], level is not None) for node in members)
            else:
                yield Group(members, level is not None)


def can_be_batched(node: Node) -> bool:
    """Return whether an operation gives on rows what it gives on each, and is small enough for it to matter."""
    if not _is_alike(node.equation):
        return False
    if is_custom_jvp(node.equation) and not (node.derivative and all(map(_is_alike, node.derivative.jaxpr.eqns))):
        return False
    values = [value.aval for value in (*node.operands, *node.outputs)]
    small = [aval for aval in values if aval.size <= NUMBERS]
    return len(small) == len(values) or (node.name == "slice" and node.outputs[0].aval.size <= NUMBERS)


def _is_alike(equation: Any) -> bool:
    """Return whether an operation, with those that it calls, gives on rows what it gives on each."""
    name = equation.primitive.name
    if equation.primitive not in host_primitives() or equation.effects:
        return False
    if name not in _ALIKE and call_body(equation) is None:
        return False
    if name in _RANDOM and not all(_is_fit_for_random(atom.aval) for atom in (*equation.invars, *equation.outvars)):
        return False
    if any(equation.params.get(name) is not None for name in ("sharding", "out_sharding")):
        return False
    return all(_is_alike(inner) for body in sub_jaxprs(equation) for inner in body.eqns)


def _is_fit_for_random(aval: Any) -> bool:
    return not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) or is_threefry(aval)


def _elements(nodes: list[Node]) -> dict[Node, Any]:
    """Return the slices that take one place after the other along an axis of one array, by what they have in common."""
    found: dict[Node, Any] = {}
    for node in nodes:
        if node.name != "slice" or node.equation.params["strides"] is not None:
            continue
        whole, part = node.operands[0].aval.shape, node.outputs[0].aval.shape
        axes = [i for i, (full, size) in enumerate(zip(whole, part, strict=True)) if size != full]
        if len(axes) == 1 and part[axes[0]] == 1:
            found[node] = (node.operands[0].exactly, axes[0], node.outputs[0].aval)
    counts = Counter(found.values())
    return {node: common for node, common in found.items() if counts[common] > 1}
