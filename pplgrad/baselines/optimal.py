"""The constant that minimises the variance of the score-function gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pplgrad.baselines.average import check_decay
from pplgrad.baselines.running import average_shapes, read_averages, update_averages
from pplgrad.core.array_ops import Array
from pplgrad.core.baseline import Baseline, BaselineTerms, Evaluation, needs_particles
from pplgrad.core.plates import Plate

if TYPE_CHECKING:
    from pplgrad.core.site_info import SiteInfo


@dataclass(frozen=True)
class OptimalConstant(Baseline):
    r"""The variance-minimising constant baseline: the mean of the downstream cost, weighted by the squared score.

    Estimates b = E[f ‖s‖²] / E[‖s‖²]. s is the gradient of log q with respect to the parameters of the site's distribution (for a
    Bernoulli its logit). b is the constant with the least total variance of (f − b) s.

    Args:
        decay: None estimates both expectations from the other particles of the step. A number in [0, 1) estimates them from past draws,
            by averages with this decay. Default: None.
        per_element: whether each element of the site's plates has its own averages of past draws. Default: False.

    Shapes:
        One number for each element of the site's plates, (particles, *plates). From past draws, one number shared by all elements unless
        `per_element=True`. In nats.

    Assumptions:
        The draw itself is never used for its own baseline, so that the gradient stays unbiased.

    Raises:
        BaselineError: with `decay=None`, if there is one particle or the objective combines particles.
        ConfigurationError: if `decay` is outside [0, 1).

    Example:
        >>> OptimalConstant(decay=0.9).reads_particles
        False

    References:
        Weaver and Tao (2001), theorem 1.
        Greensmith, Bartlett and Baxter (2004), theorem 8.
    """

    decay: float | None = None
    per_element: bool = False
    needs_score_squared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.decay is not None:
            check_decay("OptimalConstant", self.decay)

    @property
    def per_site(self) -> bool:  # type: ignore[override]
        """Return True if the expectations come from the past."""
        return self.decay is not None

    @property
    def reads_particles(self) -> bool:
        """Return True if the expectations come from the other particles."""
        return self.decay is None

    def state_shapes(self, plates: Sequence[Plate]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the two averages and their weight."""
        return {} if self.decay is None else average_shapes(["weighted", "square"], plates, self.per_element)

    def check(self, site: SiteInfo) -> None:
        """Refuse a single particle when the expectations come from the others."""
        if self.decay is None:
            needs_particles(self, site, "OptimalConstant(decay=0.9)")

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return the ratio of the two averages without the particle's own draw."""
        xp, ops = terms.ops.xp, terms.ops
        square = ops.stop_gradient(terms.score_squared())
        square = xp.broadcast_to(square, tuple(terms.cost.shape))
        weighted = square * terms.cost
        if self.decay is None:
            others = xp.sum(square, axis=0, keepdims=True) - square
            return Evaluation(_ratio(xp, xp.sum(weighted, axis=0, keepdims=True) - weighted, others), None, {})
        top, bottom = read_averages(terms, ["weighted", "square"], self.per_element)
        state = update_averages(terms, {"weighted": weighted, "square": square}, self.decay, self.per_element)
        return Evaluation(_ratio(xp, top, bottom), None, state)


def _ratio(xp, top: Array, bottom: Array) -> Array:  # type: ignore[no-untyped-def]
    safe = xp.where(bottom > 0, bottom, xp.ones_like(bottom))
    return xp.where(bottom > 0, top / safe, xp.zeros_like(bottom))
