"""What comes one out of the other by the same operations, found in a program that wrote it out: draws of a chain, and keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pplgrad.numpyro._compat_jax import is_threefry
from pplgrad.numpyro._fusion.graph import Node, Value, above

# What a node of a turn reads: an output of the same turn, or of the turn before, or something from outside.
Source = tuple[str, int]


@dataclass
class Readers:
    """The nodes that read each value of the first phase (None: something that comes after it), and the nodes whose gradient is needed."""

    of: dict[Value, set[Node | None]]
    with_gradient: set[Node]


@dataclass
class Loop:
    """The same operations turn after turn.

    `turns` holds the nodes of each turn, in one order; `before` is what the first turn reads in the place of each `carried`
    value of a turn before; `read` names, for each node and operand, the carried value, the value of the same turn, or the
    outside value by number. `outside` lists those for each turn, and `kept` is what others read of a turn.
    """

    turns: list[list[Node]]
    read: list[list[Source]]
    carried: list[tuple[int, int]]
    before: list[Value]
    outside: list[list[Value]]
    kept: list[tuple[int, int]]

    @property
    def nodes(self) -> Iterator[Node]:
        """The nodes of all turns."""
        return (node for nodes in self.turns for node in nodes)

    @property
    def reads(self) -> list[Value]:
        """What all turns read from outside."""
        return [*self.before, *(value for values in self.outside for value in values)]

    def open_turns(self, readers: Readers) -> list[int]:
        """Record which values of the iterations are read outside, and return the iterations whose values need a gradient."""
        own = set(self.nodes)
        kept = {
            (i, value.place)
            for nodes in self.turns
            for i, node in enumerate(nodes)
            for value in node.outputs
            if not readers.of.get(value, set()) <= own
        }
        self.kept = sorted(kept)
        return [t for t, nodes in enumerate(self.turns) if any(nodes[i] in readers.with_gradient for i, _ in kept)]


def draw_loops(
    by_level: Sequence[list[Node] | None],
    level: dict[Node, int],
    readers: Readers,
    rows: int,
) -> list[Loop]:
    """Return the loops of at least so many turns among the nodes of one level after the other.

    `by_level` has None where a level cannot be part of a loop.
    """
    loops, start = [], 0
    while start < len(by_level):
        for period in PERIODS:
            loop = _from(by_level, start, period, level)
            if loop is not None and len(loop.turns) * period >= rows:
                closed = _closed(loop, level, readers)
                loops += [closed] if closed is not None and len(closed.turns) * period >= rows else []
                start += len(loop.turns) * period
                break
        else:
            start += 1
    return loops


def _closed(loop: Loop, level: dict[Node, int], readers: Readers) -> Loop | None:
    """Return a loop without the iterations at its start and end that need a gradient; None if none is left."""
    found: Loop | None = loop
    while found is not None:
        open_turns = found.open_turns(readers)
        if not open_turns:
            return found
        edges = [-1, *open_turns, len(found.turns)]
        longest = max(range(len(edges) - 1), key=lambda i: edges[i + 1] - edges[i])
        turns = found.turns[edges[longest] + 1 : edges[longest + 1]]
        found = _longest(turns, level, level[turns[0][0]]) if len(turns) > 2 else None
    return None


# So many levels make a turn: more than one where sites take turns, or read what was drawn several steps before.
PERIODS = (1, 2, 3, 4)


def _from(by_level: Sequence[list[Node] | None], start: int, period: int, level: dict[Node, int]) -> Loop | None:
    """Return the longest loop whose turns are so many levels each, without what is kept of it."""
    turns = []
    for first in range(start, len(by_level) - period + 1, period):
        levels = by_level[first : first + period]
        if not all(levels):
            break
        turns.append([node for nodes in levels if nodes is not None for node in nodes])
    return _longest(turns, level, start) if len(turns) > 1 else None


def _longest(turns: list[list[Node]], level: dict[Node, int], start: int) -> Loop | None:
    """Return the loop of as many turns as follow the first two."""
    loop = _pattern(turns[0], turns[1])
    for number, nodes in enumerate(turns):
        if not _follows(loop, nodes, number, level, start):
            break
        loop.turns.append(nodes)
    return loop if loop.carried and len(loop.turns) > 2 else None


def _pattern(first: list[Node], second: list[Node]) -> Loop:
    """Return a loop without turns that goes from one to the other, read off what the second one reads."""
    here, there = _numbered(second), _numbered(first)
    loop = Loop([], [], [], [], [], [])
    slots: dict[tuple[int, int], int] = {}
    outside = 0
    for node in second:
        sources: list[Source] = []
        for value in node.operands:
            if value in here:
                sources.append(("same", here[value]))
            elif value in there:
                number, place = divmod(there[value], OUTPUTS)
                sources.append(("before", slots.setdefault((number, place), len(slots))))
            else:
                sources.append(("outside", outside))
                outside += 1
        loop.read.append(sources)
    loop.carried = list(slots)
    return loop


# More outputs than any node has.
OUTPUTS = 1 << 10


def _numbered(nodes: list[Node]) -> dict[Value, int]:
    return {value: i * OUTPUTS + value.place for i, node in enumerate(nodes) for value in node.outputs}


def _follows(loop: Loop, nodes: list[Node], turn: int, level: dict[Node, int], start: int) -> bool:
    """Return whether nodes are the loop's next turn, and note what they read."""
    if len(nodes) != len(loop.read):
        return False
    here = _numbered(nodes)
    earlier = _numbered(loop.turns[-1]) if loop.turns else {}
    before: dict[int, Value] = {}
    outside: list[Value] = []
    for i, (node, sources) in enumerate(zip(nodes, loop.read, strict=True)):
        if len(node.operands) != len(sources) or (loop.turns and node.settings != loop.turns[0][i].settings):
            return False
        for value, (kind, number) in zip(node.operands, sources, strict=True):
            if kind == "same":
                fits = here.get(value) == number
            elif kind == "outside":
                outside.append(value)
                fits = value not in here and _is_there(value, level, start)
            elif turn:
                j, place = loop.carried[number]
                fits = earlier.get(value) == j * OUTPUTS + place
            else:
                j, place = loop.carried[number]
                fits = before.setdefault(number, value) is value and value.aval == nodes[j].outputs[place].aval
                fits = fits and value not in here and _is_there(value, level, start)
            if not fits:
                return False
    if not turn:
        loop.before = [before[number] for number in range(len(loop.carried))]
    elif any(a.aval != b.aval for a, b in zip(outside, loop.outside[0], strict=True)):
        return False
    loop.outside.append(outside)
    return True


def _is_there(value: Value, level: dict[Node, int], start: int) -> bool:
    """Whether a value is known before the loop starts."""
    return value.node is None or level[value.node] < start


# What only takes a key out of those that a split has made.
_THIN = {"random_unwrap", "slice", "squeeze", "reshape"}


def key_loops(nodes: list[Node], level: dict[Node, int], rows: int) -> list[Loop]:
    """Return the loops that split one key after the other, as handlers do site after site, with all that reads no draw."""
    splits = [n for n in nodes if n.name == "random_split" and level[n] == 0 and is_threefry(n.outputs[0].aval)]
    if len(splits) < rows:
        return []
    children: dict[Node, list[Node]] = defaultdict(list)
    for node in nodes:
        for parent in set(node.parents):
            children[parent].append(node)
    loops, is_split = [], set(splits).__contains__
    for chain in _chains(splits):
        taken = [_taken_from(split, children) for split in chain]
        turns = []
        for number, split in enumerate(chain):
            cone = above(split.operands, is_split)
            if number:
                own = cone - taken[number - 1]
            else:
                own = _in_step(split, cone, chain[1], above(chain[1].operands, is_split) - taken[0])
            turns.append(sorted({split, *taken[number], *own}, key=lambda node: node.number))
        for first in (0, 1):
            loop = _longest(turns[first:], level, 1) if len(turns) > first + 1 else None
            if (
                loop is not None
                and len(loop.turns) >= rows
                and not above(loop.reads, lambda n: False) & set(loop.nodes)
            ):
                loops.append(loop)
                break
    return sorted(loops, key=lambda loop: loop.turns[0][0].number)


def _taken_from(split: Node, children: Mapping[Node, list[Node]]) -> set[Node]:
    """Return the nodes that only take keys out of a split."""
    found: set[Node] = set()
    waiting = list(children[split])
    while waiting:
        node = waiting.pop()
        if node.name in _THIN and len(node.operands) == 1:
            found.add(node)
            waiting.extend(children[node])
    return found


def _in_step(first: Node, above_first: set[Node], second: Node, above_second: set[Node]) -> set[Node]:
    """Return what stands above a split as it does above another one, going up from both at once."""
    found: set[Node] = set()
    pairs = [(first, second)]
    while pairs:
        for a, b in zip(*(node.operands for node in pairs.pop()), strict=False):
            if a.node in above_first and b.node in above_second and a.node.settings == b.node.settings:
                found.add(a.node)
                pairs.append((a.node, b.node))
    return found


def _chains(splits: list[Node]) -> list[list[Node]]:
    """Return the splits that come one out of the other in the same way, with the one that the first of them comes from."""
    chosen = set(splits)
    origin: dict[Node, tuple[Node, Any]] = {}
    for node in splits:
        found = _from_one(node, chosen)
        if found is not None:
            origin[node] = found
    after = {found: node for node, found in origin.items()}
    chains = []
    for node, (before, way) in origin.items():
        if before in origin and origin[before][1] == way:
            continue
        chain = [before, node]
        while (chain[-1], way) in after:
            chain.append(after[chain[-1], way])
        chains.append(chain)
    return chains


def _from_one(node: Node, splits: set[Node]) -> tuple[Node, Any] | None:
    """Return the one split that a split comes from and the way from there, or None if it reads something else too."""
    origins: set[Node] = set()

    def way(value: Value) -> Any:
        if value.node is None:
            return value.exactly if value.is_constant else None
        if value.node in splits:
            origins.add(value.node)
            return "origin", value.place
        parts = [way(operand) for operand in value.node.operands]
        return None if None in parts else (value.node.settings, value.place, tuple(parts))

    parts = [way(operand) for operand in node.operands]
    if None in parts or len(origins) != 1:
        return None
    return origins.pop(), (node.settings, tuple(parts))
