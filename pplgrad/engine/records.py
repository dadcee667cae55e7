"""What a watched run shows of each site, from a few more draws of the gradient at the same parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pplgrad.core.array_ops import Array
from pplgrad.core.estimator import Estimator

Numbers = dict[str, Any]


@dataclass
class Record:
    """What one evaluation of the objective shows beside its gradient, by site.

    `signals` holds, for each part of a site's baseline, the signal before and after it, (particles, *plates); `learned` the
    numbers that an estimator learns.
    """

    signals: dict[str, list[tuple[Array, Array]]] = field(default_factory=dict)
    learned: dict[str, dict[str, Array]] = field(default_factory=dict)

    def tree(self) -> tuple[dict, dict]:
        """Return the arrays in plain containers."""
        return self.signals, self.learned


def learned_scalars(estimator: Estimator) -> dict[str, float]:
    """Return the single numbers that an estimator learns, and where they start."""
    return {name: start for name, start in estimator.learned(1, 2).items() if isinstance(start, float)}


def settings(estimator: Estimator, args: tuple, kwargs: Mapping[str, Any]) -> Numbers:
    """Return an estimator's temperature and scale where they are set; what it learns is known better."""
    if learned_scalars(estimator):
        return {}
    at = estimator.at(args, kwargs) if estimator.relaxes else estimator  # type: ignore[attr-defined]
    found = {name: getattr(at, name, None) for name in ("temperature", "scale")}
    return {name: value for name, value in found.items() if value is not None}


def seen(
    xp: Any,
    gradients: Sequence[Array],
    reads: Mapping[str, Sequence[int]],
    signals: Mapping[str, Sequence[tuple[Array, Array]]],
    numbers: Mapping[str, Numbers],
) -> tuple[Numbers, dict[str, Numbers]]:
    """Return the numbers of the whole gradient, and those of each site.

    `gradients` holds the draws for each parameter, (draws, *shape), and `reads` the numbers of the parameters that a site's
    density reads; `signals` are those of `Record`, with the draws in front; `numbers` is known of the sites already.
    """
    parts = [_spread(xp, draws) for draws in gradients]
    count = gradients[0].shape[0] if gradients else 2
    sites = {}
    for name, known in numbers.items():
        own = _gradient_numbers(xp, [parts[i] for i in reads[name]], count)
        for key, value in known.items():
            # What is learned is unconstrained: a positive number by its logarithm.
            own[key.removeprefix("log_")] = xp.exp(value) if key.startswith("log_") else value
        if signals.get(name):
            own["explained_variance"] = _explained(xp, signals[name])
        sites[name] = own
    return _gradient_numbers(xp, parts, count), sites


def _spread(xp: Any, draws: Array) -> tuple[Array, Array]:
    """Return the sum over coordinates of the variance, and of the squared mean."""
    mean = xp.mean(draws, axis=0)
    return xp.sum((draws - mean) ** 2) / (draws.shape[0] - 1), xp.sum(mean**2)


def _gradient_numbers(xp: Any, parts: Sequence[tuple[Array, Array]], draws: int) -> Numbers:
    if not parts:
        return {}
    variance = sum(part for part, _ in parts[1:]) + parts[0][0]
    squared = sum(part for _, part in parts[1:]) + parts[0][1] - variance / draws
    # The squared norm of a mean of few draws, less its own noise: it may come out below 0 where there is no signal.
    signal = xp.where(squared > 0, squared, xp.zeros_like(squared)) ** 0.5
    return {"gradient_variance": variance, "signal_to_noise": signal / variance**0.5}


def _explained(xp: Any, parts: Sequence[tuple[Array, Array]]) -> Array:
    """Return the part of the signal's variance, over draws, particles and plates, that the baseline takes away.

    Part by part, since a part may rescale what it leaves to the next.
    """
    left: Any = 1.0
    for before, after in parts:
        left = left * xp.mean((after - xp.mean(after)) ** 2) / xp.mean((before - xp.mean(before)) ** 2)
    return 1.0 - left
