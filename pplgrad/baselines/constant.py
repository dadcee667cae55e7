"""A constant baseline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pplgrad.core.baseline import Baseline, BaselineTerms, Evaluation


@dataclass(frozen=True)
class Constant(Baseline):
    """A number, in the units of the objective (nats).

    Estimates nothing: b = value, for every element of the site's plates. E_q[b ∇ log q] = 0 for any constant, so
    that the mean of the gradient is unchanged.

    Shapes: a scalar, broadcast to (particles, *plates).

    >>> Constant(2.5).value
    2.5

    Source: Williams (1992), section 4 (reinforcement baseline).
    """

    value: float

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return the constant."""
        return Evaluation(terms.ops.constant(np.asarray(self.value), terms.cost), None, {})
