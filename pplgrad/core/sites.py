"""What a run of a program looks like to the engine: plates, sites and costs, without any host library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pplgrad.core.array_ops import Array
from pplgrad.core.estimator import Estimator
from pplgrad.core.plates import Dependencies, Plate


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
    follows its path alone, its log density as it counts, with the draw held constant. `weights_alone` holds the costs of guide sites
    whose scale or weight is an array, with the gradient that flows through scale and weight alone: these may be learned. Where `costs` are
    averages over sites that are summed over, `drawn` holds the costs of the draw.
    """

    particles: int
    scores: list[Array]
    costs: list[Array]
    indices: dict[str, Array] = field(default_factory=dict)
    score_squared: Mapping[str, Callable[[], Array]] = field(default_factory=dict)
    through: Mapping[str, Array] = field(default_factory=dict)
    weights_alone: Mapping[str, Array] = field(default_factory=dict)
    drawn: list[Array] | None = None
