"""The contract of baselines: a quantity subtracted from a site's downstream cost that does not depend on the site's draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.data_parallel import DataParallel
from pplgrad.core.plates import Plate
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import BaselineError, ConfigurationError

State = Mapping[str, Array]


@dataclass(frozen=True)
class BaselineTerms:
    """The quantities that a baseline may use for one draw of a site (or of a group of sites, for a stateless baseline).

    Attributes:
        site: the name of the site.
        ops: the array operations of the host library.
        cost: the downstream cost minus the preceding baselines of a sum, of shape (particles, *elements); a constant.
        plates: the plates of the site.
        indices: the elements of subsampled plates, by plate name.
        state: the arrays of the baseline's state from before the draw.
        score_squared: returns the squared gradient of log q with respect to the distribution's parameters, summed over them, of the shape
            of `cost`.
        predict: returns the output of the baseline's network or function.
        peers: the processes among which the data is split, if it is. State must then be learned from all of them.
        sites: the number of sites where several are evaluated at once (see `Baseline.takes_sites`), else 0.
    """

    site: str
    ops: Ops
    cost: Array
    plates: tuple[Plate, ...]
    indices: Mapping[str, Array]
    state: State
    score_squared: Callable[[], Array]
    predict: Callable[[], Array]
    peers: DataParallel | None = None
    sites: int = 0


class Evaluation(NamedTuple):
    """The result of evaluating a baseline for one draw.

    Attributes:
        value: the value of the baseline.
        loss: the loss that trains the baseline; None if nothing is learned.
        state: the state after the draw.
    """

    value: Array
    loss: Array | None
    state: State


class Baseline(ABC):
    """Base class of baselines: a quantity that is subtracted from a site's downstream cost and does not depend on the site's draw.

    Baselines add up with `+`. Each baseline of a sum is applied to the remainder of the preceding ones.

    Example:
        >>> from pplgrad import Constant, LeaveOneOut
        >>> Constant(1.0) + LeaveOneOut()
        Constant(value=1.0) + LeaveOneOut()
    """

    per_site: ClassVar[bool] = False
    """Whether the baseline has state, a network or a function, and so is evaluated site by site."""

    learned: ClassVar[bool] = False
    """Whether the baseline has parameters that an optimizer trains."""

    calls_function: ClassVar[bool] = False
    """Whether the baseline calls a function of the user's that may read upstream sites."""

    needs_score_squared: ClassVar[bool] = False
    """Whether the baseline asks for the squared gradient of log q."""

    @property
    def reads_particles(self) -> bool:
        """Whether the value for one particle is computed from the other particles of the same step."""
        return False

    @property
    def takes_sites(self) -> bool:
        """Whether a baseline that keeps something for each site can be evaluated at several sites of equal plates at once.

        Costs, predictions and values then have shape (particles, sites, *elements), and the arrays of the state one more axis in front.
        """
        return False

    @property
    def normalizes(self) -> bool:
        """Whether the signal is rescaled, in addition to the subtraction of the baseline."""
        return False

    def state_shapes(self, plates: Sequence[Plate]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the arrays that are kept from step to step; they are initialised to zero."""
        return {}

    def check(self, site: SiteInfo) -> None:
        """Raise `BaselineError` if the baseline cannot serve the site."""

    @abstractmethod
    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return the baseline's value for this draw, its loss, and its state for the next draw."""

    def rescale(self, terms: BaselineTerms, signal: Array) -> Array:
        """Return the remaining signal, rescaled if the baseline normalises it."""
        return signal

    def __add__(self, other: Baseline) -> Baseline:
        """Return a baseline that subtracts this one, and then `other` from the remainder."""
        if not isinstance(other, Baseline):
            return NotImplemented
        return SumOfBaselines((*parts_of(self), *parts_of(other)))


@dataclass(frozen=True, repr=False)
class SumOfBaselines(Baseline):
    """A sum of baselines, applied one after the other; created by `+`."""

    parts: tuple[Baseline, ...]

    def __post_init__(self) -> None:
        crossing = [part for part in self.parts if part.reads_particles]
        if len(crossing) > 1:
            # What the first leaves at particle j already contains the cost of particle k, so that a second one
            # computed for k from the others would see k's own draw, and bias the gradient.
            raise ConfigurationError(
                f"{crossing[0]!r} + {crossing[1]!r}: only one baseline of a sum may be computed from the other "
                "particles, or the sum would see the particle's own draw; drop one of them, or let one learn from "
                "the past, as OptimalConstant(decay=0.9) does."
            )

    @property
    def reads_particles(self) -> bool:
        return any(part.reads_particles for part in self.parts)

    def check(self, site: SiteInfo) -> None:
        for part in self.parts:
            part.check(site)

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        raise TypeError("A sum of baselines is evaluated part by part.")

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def parts_of(baseline: Baseline | None) -> tuple[Baseline, ...]:
    """Return the baselines that a baseline is the sum of."""
    if baseline is None:
        return ()
    return baseline.parts if isinstance(baseline, SumOfBaselines) else (baseline,)


def needs_particles(baseline: Baseline, site: SiteInfo, remedy: str) -> None:
    """Refuse a baseline over particles if there is only one particle, or if a bound combines the particles."""
    if site.combined:
        better = "VIMCO() there, or " if site.combined > 1 else ""
        raise BaselineError(
            f"{baseline!r} at site '{site.name}' reads the other particles, and under {site.objective!r} what they get holds "
            f"this particle's draw too, which would bias the gradient; use {better}ScoreFunction() without a baseline or with one "
            "that learns from the past."
        )
    if site.particles < 2:
        raise BaselineError(
            f"{baseline!r} at site '{site.name}' needs at least two particles, and there is one; pass "
            f"num_particles=2 or more to the ELBO, or use {remedy}."
        )
