"""A decaying average of past downstream costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pplgrad.baselines.running import average_shapes, read_averages, update_averages
from pplgrad.core.baseline import Baseline, BaselineTerms, Evaluation
from pplgrad.core.plates import Plate
from pplgrad.errors import ConfigurationError


def check_decay(owner: str, decay: float) -> None:
    """Refuse a decay outside [0, 1)."""
    if not 0 <= decay < 1:
        raise ConfigurationError(f"{owner}(decay={decay}): the decay must be at least 0 and below 1.")


@dataclass(frozen=True)
class DecayingAverage(Baseline):
    r"""An exponentially decaying average of the downstream costs of past draws.

    The baseline is b_t = Σ_{s<t} λ^{t−1−s} f_s / Σ_{s<t} λ^{t−1−s} with λ = `decay`, and zero before the first draw. Only draws before the
    current one are included, because an average that includes the current draw shrinks the gradient.

    Args:
        decay: λ, in [0, 1). Default: 0.9.
        per_element: whether each element of the full plates has its own average. Default: False.

    Shapes:
        One number shared by all elements of the site's plates, or with `per_element=True` one number for each element of the full
        plates (a subsampled plate reads and updates the elements drawn). In nats. The average is kept as state: in Pyro's param store
        or NumPyro's mutable state.

    Raises:
        ConfigurationError: if `decay` is outside [0, 1).

    Example:
        >>> DecayingAverage(0.9)
        DecayingAverage(decay=0.9, per_element=False)

    References:
        Mnih and Gregor (2014), section 2.3 (the input-independent baseline c).
    """

    decay: float = 0.9
    per_element: bool = False
    per_site: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_decay("DecayingAverage", self.decay)

    def state_shapes(self, plates: Sequence[Plate]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the average and its weight."""
        return average_shapes(["mean"], plates, self.per_element)

    @property
    def takes_sites(self) -> bool:
        """Whether several sites are evaluated at once: not where each element has an average of its own."""
        return type(self) is DecayingAverage and not self.per_element

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return the average from before the draw, and the state that includes it."""
        (value,) = read_averages(terms, ["mean"], self.per_element)
        state = update_averages(terms, {"mean": terms.cost}, self.decay, self.per_element)
        return Evaluation(value, None, state)
