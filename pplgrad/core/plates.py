"""Plates, and how something depends on a draw in them: on which steps, and on which elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

# A dependency between two steps of one time axis is a set of these flags; a cost that depends on every
# step, and every dependency outside a time axis, carries all three.
SAME = 1
"""The cost at step t depends on the draw at step t."""
AFTER = 2
"""The cost at step t depends on the draws at steps before t."""
BEFORE = 4
"""The cost at step t depends on the draws at steps after t (a guide that runs backwards)."""
EVERY = SAME | AFTER | BEFORE


@dataclass(frozen=True)
class Plate:
    """A dimension of conditionally independent elements, or (`time=True`) the steps of a scan.

    `dim` is negative and counts from the right of the batch shape, `size` is the size in this run and
    `full_size` the size before subsampling.
    """

    name: str
    dim: int
    size: int
    full_size: int
    time: bool = False


class Read(NamedTuple):
    """How something depends on a site's draw.

    `steps` are the flags above. `across` names the plates along which an element may depend on other elements of the draw
    than its own: through a sum over the plate, a lookup, a shift, or a site outside of it. None stands for every plate, which
    is always right; the empty set says that each element depends on its own alone.
    """

    steps: int
    across: frozenset[str] | None

    def joined(self, other: Read) -> Read:
        """Return the dependency of something that depends in both ways."""
        across = None if self.across is None or other.across is None else self.across | other.across
        return Read(self.steps | other.steps, across)

    def mixes(self, plate: Plate) -> bool:
        """Return whether an element of the plate may depend on the draw's other elements."""
        return self.across is None or plate.name in self.across


WHOLE = Read(EVERY, None)
"""A dependency of which nothing more is known: on every element and every step."""
OWN = Read(EVERY, frozenset())
"""A dependency of each element on the draw's own element."""

Dependencies = Mapping[str, Read]
"""Site name to the way: the sites whose values something reads directly."""
