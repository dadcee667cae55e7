"""What a run of a program looks like to the engine: plates, sites and costs, without any host library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pplgrad.engine.ops import Array

if TYPE_CHECKING:
    from pplgrad.estimators.base import Estimator

# A dependency between two steps of one time axis is a set of these flags; a cost that depends on every
# step, and every dependency outside a time axis, carries all three.
SAME = 1
"""The cost at step t depends on the draw at step t."""
AFTER = 2
"""The cost at step t depends on the draws at steps before t."""
BEFORE = 4
"""The cost at step t depends on the draws at steps after t (a guide that runs backwards)."""
EVERY = SAME | AFTER | BEFORE


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


@dataclass(frozen=True)
class SiteSpec:
    """A latent draw of the guide: its name, plates, estimator, and the sites that its distribution reads."""

    name: str
    plates: tuple[Plate, ...]
    estimator: Estimator
    reads: Dependencies = field(default_factory=dict)


@dataclass(frozen=True)
class CostSpec:
    """One log density of the model (`sign=+1`) or of the guide (`sign=-1`), and the sites that it reads.

    `closed` says that it is an expectation over the site's draw, in closed form: a divergence, or minus an entropy.
    """

    name: str
    plates: tuple[Plate, ...]
    sign: float
    reads: Dependencies = field(default_factory=dict)
    closed: bool = False


@dataclass
class Run:
    """The arrays of one run, in the order of the specifications it was recorded for.

    Every array has shape (particles, *batch), where the batch dimensions end at the right as the plates' `dim`
    say. `scores` holds log q of each site, neither scaled nor masked, with its gradient; `costs` holds each
    log density as it counts in the objective, scaled and masked, with the gradient that flows through it.
    `indices` gives the elements of a subsampled plate, of shape (n,) or (particles, n). `through` holds, for a site that
    follows its path alone, its log density as it counts, with the draw held constant.
    """

    particles: int
    scores: list[Array]
    costs: list[Array]
    indices: dict[str, Array] = field(default_factory=dict)
    score_squared: Mapping[str, Callable[[], Array]] = field(default_factory=dict)
    through: Mapping[str, Array] = field(default_factory=dict)
