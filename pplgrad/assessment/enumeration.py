"""The exact evidence of latents with few values: an element of a plate at a time, since elements have evidence of their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from pplgrad.assessment.draws import Draws, Latent, Values
from pplgrad.core.objectives import log_sum_exp
from pplgrad.errors import ProgramError

LogJoint = Callable[[Values], np.ndarray]
"""From values of all latents to log p of each element of the plates."""


class ChangingSupport(ProgramError):
    """The values that a site can take are others at other values of the latents."""


def check_support(name: str, expected: np.ndarray | None, found: np.ndarray | None) -> None:
    """Refuse to enumerate a site whose values are not those that it had at a draw of the guide."""
    if expected is not None and (found is None or not np.array_equal(expected, found)):
        raise ChangingSupport(f"the values of site '{name}' depend on other latents")


def exact_evidence(draws: Draws, log_joint: LogJoint, limit: int) -> tuple[float | None, str]:
    """Return the log evidence, or None and the reason why it cannot be summed up."""
    reason = _reason(draws, limit)
    if reason:
        return None, reason
    try:
        rows = [np.asarray(log_joint(values), float).reshape(-1) for values in assignments(draws)]
    except ChangingSupport as changing:
        return None, str(changing)
    with np.errstate(divide="ignore"):  # Data may be impossible.
        return float(log_sum_exp(np, np.stack(rows), 0).sum()) + draws.beside, ""


def _reason(draws: Draws, limit: int) -> str:
    count = 1
    for latent in draws.latents.values():
        if latent.support is None:
            return f"site '{latent.name}' has no finite support that guide and model share"
        if latent.mask is not None:
            return f"site '{latent.name}' is masked"
        parts = _parts(latent, draws)
        # The number itself may be too large to write down.
        if parts * math.log(len(latent.support)) + math.log(count) > math.log(limit) + 1e-9:
            return f"the latents of an element have more than {limit:,} values together"
        count *= len(latent.support) ** parts
    return ""


def _parts(latent: Latent, draws: Draws) -> int:
    """Return how many elements a site has within one element of the plates with weights."""
    plates = {name for name, _ in draws.plates}
    shape = latent.log_q.shape[1:]
    return math.prod(size for size, plate in zip(shape, latent.element_axes, strict=True) if plate not in plates)


def assignments(draws: Draws) -> Iterator[dict[str, np.ndarray]]:
    """Yield values of all latents in which all elements of the plates have the same; together every value of one element."""
    latents = list(draws.latents.values())
    plates = {name for name, _ in draws.plates}
    choices = [
        itertools.product(range(len(x.support)), repeat=_parts(x, draws)) for x in latents if x.support is not None
    ]
    for picked in itertools.product(*choices):
        values = {}
        for latent, numbers in zip(latents, picked, strict=True):
            assert latent.support is not None
            shape = latent.log_q.shape[1:]
            own = [1 if axis in plates else size for size, axis in zip(shape, latent.element_axes, strict=True)]
            number = np.broadcast_to(np.reshape(np.array(numbers, int), own), shape)
            values[latent.name] = latent.support[number].astype(latent.values.dtype)
        yield values
