"""Which operations of a program do the same at several sites, and in what order they can be done together.

A loop in Python that draws a hundred sites is traced to a hundred copies of the same operations, which cost a compiler minutes and the
machine a call each. Copies that read only what is known can be one operation on all their rows. Known, for the densities, are
the values of latent sites whose gradient does not pass through the draw: so a program is done in two phases, the draws
one upon the other and then all densities at once, and what both need is computed once if it comes out the same in both, and
twice if that is cheap.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from pplgrad.numpyro._fusion.graph import Graph, Node, Value, above, latent, levels, without_gradient
from pplgrad.numpyro._fusion.grouping import EXPENSIVE, Group, Kinds
from pplgrad.numpyro._fusion.loop_rerolling import Loop, Readers, draw_loops, key_loops

# From this many copies on operations are done together.
ROWS = 5


def plan(graph: Graph, wanted: Iterable[Value], rows: int = ROWS) -> list[Group | Loop]:
    """Return how the wanted outputs are computed, with operations of which there are at least so many done together.

    The groups and loops are in an order in which they can be done. What the second phase does again goes before what the
    first one did.
    """
    level = levels(graph.nodes)
    keys = key_loops(graph.nodes, level, rows)
    made = {node for loop in keys for node in loop.nodes}
    for node in graph.nodes:
        node.leaf = latent(node) or node in made
    outputs = list(wanted)
    leaves = _leaves(outputs)
    drawing = {node for leaf in leaves - made for node in (leaf, *above(leaf.operands, _is_leaf))}
    inputs = Counter(value.aval for value in graph.inputs)
    first = Kinds(drawing, set(), inputs, rows)
    again = {node for node in first.on_several_levels(level) if not node.leaf and node.name not in EXPENSIVE}
    known = drawing - again
    second = Kinds(above(outputs, lambda node: node.leaf or node in known), known, inputs, rows)
    draws, scores = list(first.groups(level)), list(second.groups(None))
    readers = _readers(draws, scores, outputs)
    return [*_making(keys, readers), *_with_loops(draws, level, readers, rows), *scores]


def _readers(draws: list[Group], scores: list[Group], outputs: list[Value]) -> Readers:
    """Return who reads the values of the first phase."""
    found: dict[Value, set[Node | None]] = defaultdict(set)
    scored = {node for group in scores for node in group.nodes}
    for value in (*outputs, *(value for node in scored for value in node.operands)):
        if value.node not in scored:
            found[value].add(None)
    for group in draws:
        for node in group.nodes:
            for value in node.operands:
                found[value].add(node)
    after = [value for value, nodes in found.items() if None in nodes]
    return Readers(found, above(after, lambda node: all(map(without_gradient, node.outputs))))


def _making(keys: list[Loop], readers: Readers) -> list[Group | Loop]:
    """Return what makes the keys that are read, each loop after what it reads."""
    needed: list[Loop] = []
    for loop in reversed(keys):
        if not loop.open_turns(readers) and loop.kept:
            needed.append(loop)
            for value in loop.reads:
                readers.of[value].add(None)
                for node in above([value], _is_leaf):
                    for other in node.operands:
                        readers.of[other].add(None)
    found: list[Group | Loop] = []
    done: set[Node] = set()
    for loop in reversed(needed):
        before = above(loop.reads, _is_leaf) - done
        found += [Group([node], True) for node in sorted(before, key=lambda node: node.number)]
        found.append(loop)
        done |= before
    return found


def _with_loops(draws: list[Group], level: dict[Node, int], readers: Readers, rows: int) -> list[Group | Loop]:
    """Return the groups of the first phase with what draws do turn after turn put into loops."""
    last = max((level[group.nodes[0]] for group in draws), default=-1)
    by_level: list[list[Node]] = [[] for _ in range(last + 1)]
    whole = [place > 0 for place in range(last + 1)]  # What comes first reads nothing that was drawn before.
    for group in draws:
        by_level[level[group.nodes[0]]] += group.nodes
        whole[level[group.nodes[0]]] &= len(group.nodes) == 1
    turns = [sorted(nodes, key=lambda n: n.number) if w else None for nodes, w in zip(by_level, whole, strict=True)]
    loops = {level[loop.turns[0][0]]: loop for loop in draw_loops(turns, level, readers, rows)}
    inside = {node for loop in loops.values() for node in loop.nodes}
    found: list[Group | Loop] = []
    for group in draws:
        if group.nodes[0] not in inside:
            found.append(group)
        elif level[group.nodes[0]] in loops:
            found.append(loops.pop(level[group.nodes[0]]))
    return found


def _is_leaf(node: Node) -> bool:
    return node.leaf


def _leaves(outputs: list[Value]) -> set[Node]:
    """Return the leaves that some outputs are computed from, and those that these are made from."""
    waiting = [value.node for value in outputs if value.node is not None and value.node.leaf]
    waiting += [parent for node in above(outputs, _is_leaf) for parent in node.parents if parent.leaf]
    found: set[Node] = set()
    while waiting:
        leaf = waiting.pop()
        if leaf not in found:
            found.add(leaf)
            cone = above(leaf.operands, _is_leaf) | {leaf}
            waiting.extend(parent for node in cone for parent in node.parents if parent.leaf)
    return found
