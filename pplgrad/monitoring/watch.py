"""`Watch`: what a training run shows of its gradient while it goes on, and where that is sent."""

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
    r"""Shows, every so many steps, what becomes of the gradient at each site.

    Estimates, from `draws` more gradients g at the parameters and arguments of the step, for the whole program and for each
    site (the parameters that its density reads, unconstrained): `gradient_variance` tr Cov[g], and `signal_to_noise`
    ‖E[g]‖ / √tr Cov[g] (0 where so few draws show none). For each site too: `entropy`, in nats, of one element of its batch shape, by the formula where the
    library has one and by −log q of the draws elsewhere; `explained_variance` 1 − Var[c − b] / Var[c] of its downstream
    cost c and baseline b; `temperature`, `scale` and what else its estimator is set to or learns, by those names.

    Every `every` steps, from the first on, `callback` gets a plain dict `{"step", "loss", "gradient_variance", "signal_to_noise",
    "sites": {name: {...}}}` of numbers, and `tensorboard`, a folder, an event file (needs tensorboardX). A step that is watched
    costs `draws` more, so that a run costs about draws / every more; training itself is the same with and without. In NumPyro
    it works inside `jit` and `SVI.run`, and the program must be one that JAX can trace.

    Shapes: any program. Losses and costs in nats; the variance in their squares per squared unit of the parameters.

    Raises `ConfigurationError` if there is neither callback nor folder, `every` is below 1 or `draws` below 2.

    >>> watch = Watch(print, every=200)
    >>> watch.draws
    3

    Source: Mohamed, Rosca, Figurnov and Mnih (2020), section 3, for what the variance means.
    """

    callback: Callable[[Record], None] | None = None
    tensorboard: str | PathLike | None = None
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
    """A watch at work: it knows the last step that was told, and holds the event file once there is something to write."""

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

    def tell(self, step: Any, numbers: Mapping[str, Any], sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Send a record where the user wants it; one of a step that was told already (an evaluation) is dropped."""
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
        values = {name: value for name, value in record.items() if name not in ("step", "sites")}
        for site, found in record["sites"].items():
            values |= {f"{site}/{name}": value for name, value in found.items()}
        for name, value in values.items():
            self._writer.add(name, value, record["step"])
        self._writer.flush()


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
