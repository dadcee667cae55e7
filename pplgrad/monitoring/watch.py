"""`Watch`: measurements of the gradient during training, and where they are sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from pplgrad.errors import ConfigurationError

Record = dict[str, Any]


@dataclass(frozen=True)
class Watch:
    r"""Measurements of the gradient at each site, made every few training steps.

    Estimates, from `draws` additional gradients g at the step's parameters and arguments, for the whole program and for each site (the
    unconstrained parameters that the site's density reads):

    - `gradient_variance`: tr Cov[g].
    - `signal_to_noise`: ‖E[g]‖ / √tr Cov[g]. It is 0 where so few draws show no signal.

    It also estimates for each site:

    - `entropy`: the entropy of one element of the site's batch shape, in nats. It is in closed form where the library has a formula, and
      the mean of −log q over the draws elsewhere.
    - `explained_variance`: 1 − Var[c − b] / Var[c], for the site's downstream cost c and baseline b.
    - `temperature`, `scale` and other numbers that the site's estimator is set to or learns, under their own names.

    A measurement is made every `every` steps, starting with the first. Its record is a plain dict of numbers, `{"step", "loss",
    "gradient_variance", "signal_to_noise", "sites": {name: {...}}}`. A measured step costs `draws` additional gradients, so that
    a run costs about draws / every more. Training itself is the same with and without a watch. In NumPyro a watch works inside `jit` and
    `SVI.run`.

    Args:
        callback: function of the record, such as `to_wandb(run)` or `to_mlflow()`. Default: None.
        tensorboard: folder of a TensorBoard event file (needs tensorboardX). Default: None.
        every: number of steps between measurements, at least 1. Default: 200.
        draws: number of additional gradients in a measurement, at least 2. Default: 3.

    Shapes:
        Any program. Losses and costs are in nats. The variance is in nats² per squared unit of the parameters.

    Assumptions:
        In NumPyro the program must be one that JAX can trace.

    Raises:
        ConfigurationError: there is neither a callback nor a folder, the callback is not callable, `every` is below 1, `draws` is
            below 2, or tensorboardX is needed and not installed.

    Example:
        >>> watch = Watch(print, every=200)
        >>> watch.draws
        3

    References:
        Mohamed, Rosca, Figurnov and Mnih (2020), section 3, for the meaning of the variance.
    """

    callback: Callable[[Record], None] | None = None
    tensorboard: str | PathLike[str] | None = None
    every: int = 200
    draws: int = 3

    def __post_init__(self) -> None:
        if self.callback is None and self.tensorboard is None:
            raise ConfigurationError("Watch() shows nothing to anyone; give a callback, or a folder as tensorboard=...")
        if self.callback is not None and not callable(self.callback):
            raise ConfigurationError(
                f"Watch(callback=...) takes a function of a dict; got {type(self.callback).__name__}."
            )
        for name, least in (("every", 1), ("draws", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"Watch({name}={value!r}): give a whole number, {least} or more.")
        if self.tensorboard is not None:
            _event_file()


class Watcher:
    """The state of a watch: the last step that was recorded, and the event file once there is something to write."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.steps = 0
        """Steps so far, where the library's plug-in counts them here."""
        self.known: dict[Any, Any] = {}
        """What a plug-in has found out of the program and needs again."""
        self._writer: Any = None
        self._last: int | None = None

    def __reduce__(self) -> tuple:
        # A copy of a guide is a run of its own.
        return Watcher, (self.watch,)

    def due(self, step: int) -> bool:
        """Return whether a step is watched."""
        return step % self.watch.every == 0

    def emit(self, step: Any, numbers: Mapping[str, Any], sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Send a record to the user's function or file. A second record of the same step (an evaluation) is dropped."""
        step = int(step)
        if step == self._last or not self.due(step):
            return
        self._last = step
        shown = {site: _plain(found) for site, found in sites.items()}
        record: Record = {"step": step, **_plain(numbers), "sites": shown}
        if self.watch.tensorboard is not None:
            self._write(record)
        if self.watch.callback is not None:
            self.watch.callback(record)

    def _write(self, record: Record) -> None:
        if self._writer is None:
            self._writer = _event_file()(self.watch.tensorboard)
        for name, value in by_name(record).items():
            self._writer.add(name, value, record["step"])
        self._writer.flush()


def by_name(record: Record) -> dict[str, float]:
    """Return a record's numbers by one name each: those of a site as `site/name`."""
    values = {name: value for name, value in record.items() if name not in ("step", "sites")}
    for site, found in record["sites"].items():
        values |= {f"{site}/{name}": value for name, value in found.items()}
    return values


def _plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers as Python's; of an array (a temperature for each element), the mean."""
    return {name: float(np.mean(np.asarray(value))) for name, value in numbers.items()}


def _event_file() -> Any:
    try:
        import tensorboardX  # noqa: F401

        from pplgrad.monitoring.event_file import EventFile
    except ModuleNotFoundError:
        raise ConfigurationError(
            "Watch(tensorboard=...) needs tensorboardX, which is not installed; pip install 'pplgrad[watch]', or give a callback."
        ) from None
    return EventFile
