"""The mean of the other particles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pplgrad.core.baseline import Baseline, BaselineTerms, Evaluation, needs_particles

if TYPE_CHECKING:
    from pplgrad.core.site_info import SiteInfo


@dataclass(frozen=True)
class LeaveOneOut(Baseline):
    r"""The leave-one-out baseline: the mean downstream cost of the other particles of the same step.

    The baseline of particle k is b_k = (1 / (K − 1)) Σ_{j≠k} f_j, for each element of the site's plates. K is the number of particles.

    Shapes:
        (particles, *plates), in nats.

    Raises:
        BaselineError: with one particle, or under an objective that combines particles.

    Example:
        >>> LeaveOneOut().reads_particles
        True

    References:
        Salimans and Knowles (2014), section 4.
        Mnih and Rezende (2016), equation 9 (the same mean over the other samples).
        Kool, van Hoof and Welling (2019), equation 8.
    """

    @property
    def reads_particles(self) -> bool:
        """Return True: the value for one particle comes from the others."""
        return True

    def check(self, site: SiteInfo) -> None:
        """Refuse a single particle."""
        needs_particles(self, site, "DecayingAverage(0.9)")

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return, for each particle, the mean of the others."""
        cost, xp = terms.cost, terms.ops.xp
        if cost.shape[0] == 1:
            # Looped particles may differ in structure, and a site that one particle alone has gets no baseline.
            return Evaluation(terms.ops.constant(np.zeros(()), cost), None, {})
        total = xp.sum(cost, axis=0, keepdims=True)
        return Evaluation((total - cost) / (cost.shape[0] - 1), None, {})
