"""A constant baseline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pplgrad.core.baseline import Baseline, BaselineTerms, Evaluation


@dataclass(frozen=True)
class Constant(Baseline):
    """A constant baseline.

    The baseline is b = `value` for every element of the site's plates. Nothing is estimated. E_q[b ∇ log q] = 0 for any constant, so
    the mean of the gradient does not change.

    Args:
        value: the number that is subtracted, in the units of the objective (nats).

    Shapes:
        A scalar, broadcast to (particles, *plates).

    Example:
        >>> Constant(2.5).value
        2.5

    References:
        Williams (1992), section 4 (reinforcement baseline).
    """

    value: float

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return the constant."""
        return Evaluation(terms.ops.constant(np.asarray(self.value), terms.cost), None, {})
