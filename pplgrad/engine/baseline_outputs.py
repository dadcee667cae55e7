"""What a baseline's function or network returns, brought to the shape of its site's costs.

The steps of a scan lie left of every plate, with dimensions of length one between. A user's function knows nothing of these: it
may return one number for each step and element of the plates, and an error shows it the shapes that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.plates import Plate
from pplgrad.core.shapes import plate_shape
from pplgrad.errors import BaselineError


def known_shape(shape: Sequence[int], plates: Sequence[Plate], lead: int = 1) -> tuple[int, ...]:
    """Return a shape, of `lead` dimensions and then those of a site's costs, without the dimensions between steps and plates.

    >>> known_shape((2, 5, 1, 1, 3), [Plate("_time", -4, 5, 5, time=True), Plate("data", -1, 3, 3)])
    (2, 5, 3)
    """
    time = next((plate for plate in plates if plate.time), None)
    if time is None or len(shape) < lead - time.dim:
        return tuple(shape)
    own = len(plate_shape([plate for plate in plates if not plate.time]))
    steps = len(shape) + time.dim
    between = shape[steps + 1 : len(shape) - own]
    return (*shape[: steps + 1], *(size for size in between if size != 1), *shape[len(shape) - own :])


def fitted(ops: Ops, part: Any, site: str, value: Array, shape: Sequence[int], plates: Sequence[Plate]) -> Array:
    """Return a value that broadcasts to the shape of a site's costs, (particles, *plates), or refuse it."""
    shape, found = tuple(shape), tuple(value.shape)
    if _broadcasts(found, shape):
        return value
    known = known_shape(shape, plates)
    if known != shape and _broadcasts(found, known):
        own = len(known) - 2
        inner = found[len(found) - min(own, len(found)) :] if own else ()
        outer = found[: len(found) - len(inner)]
        gap = (1,) * (len(shape) - len(known))
        return ops.xp.reshape(value, (*outer, *gap, *(1,) * (own - len(inner)), *inner))
    dimensions = "particles, steps of the scan, then plates" if known != shape else "particles, then plates"
    each = "one number for each step, and each element" if known != shape else "one number for each element"
    raise BaselineError(
        f"{part!r} at site '{site}' returned shape {known_shape(found, plates)}, which does not fit the site's shape {known} "
        f"({dimensions}); return {each} of the site's plates."
    )


def _broadcasts(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(found, shape) == shape
    except ValueError:
        return False
