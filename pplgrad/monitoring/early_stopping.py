"""Early stopping on a bound of data that training does not see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pplgrad.errors import ConfigurationError


class EarlyStopping:
    """Says when a bound on held-out data has stopped rising.

    It estimates nothing. The bound is a plain number, which the caller computes as often as it likes: the negative of
    `svi.evaluate_loss(validation)` in Pyro, and of `svi.evaluate(state, validation)` in NumPyro.

    Args:
        patience: how many values in a row may be no better than the best one; the last of them stops. At least 1.
        minimum_change: how much a value must exceed the best one to be better, in the bound's units, at least 0. Default: 0.

    Shapes:
        One number at a time. A bound rises as it gets better; give a loss its negative.

    Assumptions:
        The value's own noise counts as change: evaluate with the same random numbers each time, or with many particles.

    Raises:
        ConfigurationError: `patience` or `minimum_change` is out of range, a value is not a number (NaN stops nothing and is no best), or
            a state is another object's.

    Example:
        >>> stopping = EarlyStopping(patience=2)
        >>> [stopping.update(bound) for bound in (-3.0, -2.0, -2.5, -2.1)]
        [False, False, False, True]
        >>> stopping.best, stopping.best_update
        (-2.0, 1)
        >>> again = EarlyStopping(patience=2)
        >>> again.load_state_dict(stopping.state_dict())
        >>> again.stopped
        True

    References:
        Prechelt (1998), Early stopping, but when?, the class UP.
    """

    def __init__(self, patience: int, minimum_change: float = 0.0) -> None:
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ConfigurationError(f"EarlyStopping(patience={patience!r}): give a whole number, 1 or more.")
        if not 0 <= minimum_change < math.inf:
            raise ConfigurationError(f"EarlyStopping(minimum_change={minimum_change!r}): give a number, 0 or more.")
        self.patience = patience
        self.minimum_change = minimum_change
        self.best = -math.inf
        """The best value so far."""
        self.best_update = -1
        """The number of the update that brought it, from 0."""
        self.updates = 0
        self.stopped = False

    def update(self, bound: Any) -> bool:
        """Take the next value of the bound, and return whether training should stop. Once it has, it stays so."""
        value = float(bound)
        if math.isnan(value):
            raise ConfigurationError(
                "EarlyStopping.update(nan): the bound is not a number; look for the site with elbo.diagnose(...), and lower the learning rate."
            )
        # The first value is the best one, whatever it is.
        if self.best_update < 0 or value > self.best + self.minimum_change:
            self.best, self.best_update = value, self.updates
        self.stopped = self.stopped or self.updates - self.best_update >= self.patience
        self.updates += 1
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers, to be saved beside a training's own."""
        return {"best": self.best, "best_update": self.best_update, "updates": self.updates, "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; patience and minimum change stay those of this object."""
        if state.keys() != self.state_dict().keys():
            raise ConfigurationError(
                "EarlyStopping.load_state_dict(state): the state is not one that state_dict() returned."
            )
        self.best, self.best_update = float(state["best"]), int(state["best_update"])
        self.updates, self.stopped = int(state["updates"]), bool(state["stopped"])
