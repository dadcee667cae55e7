"""What a baseline's function may see: the program's arguments, and the values of upstream sites."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.plates import Plate
from pplgrad.errors import BaselineError, listed


class UpstreamSites(Mapping[str, Array]):
    """The values of the latent sites, of which a baseline of `owner` may read those its own draw cannot change."""

    def __init__(self, owner: str, values: Mapping[str, Array], ancestors: Mapping[str, Mapping[str, Any]]) -> None:
        self._owner = owner
        self._values = values
        self._ancestors = ancestors

    def __getitem__(self, name: str) -> Array:
        if name not in self._values:
            raise BaselineError(
                f"The baseline of site '{self._owner}' reads site '{name}', which the guide does not have; it may "
                f"read: {listed(self)}."
            )
        if not self._allowed(name):
            why = "its own value" if name == self._owner else f"site '{name}', which is computed from its value"
            raise BaselineError(
                f"The baseline of site '{self._owner}' reads {why}, which would bias the gradient; it may read the "
                f"program's arguments and upstream sites: {listed(self)}."
            )
        return self._values[name]

    def _allowed(self, name: str) -> bool:
        return name != self._owner and self._owner not in self._ancestors.get(name, {})

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._values if self._allowed(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def call_with_sites(function: Callable[..., Any], args: Sequence, kwargs: Mapping, sites: UpstreamSites) -> Any:
    """Call a user's function of the program's arguments, with `sites=` if it has that argument."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    if "sites" in parameters and "sites" not in kwargs:
        return function(*args, sites=sites, **kwargs)
    return function(*args, **kwargs)


def with_numbers(ops: Ops, x: Array, numbers: Sequence[float]) -> Array:
    """Return a network's inputs (*batch, features) with more of them, the same for all elements."""
    if not numbers:
        return x
    further = ops.xp.broadcast_to(ops.constant(numbers, x), (*x.shape[:-1], len(numbers)))
    return ops.xp.concat([x, further], axis=-1)


def default_inputs(
    ops: Ops, plates: Sequence[Plate], indices: Mapping[str, Array], arrays: Sequence[Array]
) -> Array | None:
    """Return the array arguments that line up with the site's plates, joined as features, or None.

    An argument lines up if its leading dimensions are the sizes of the plates, outermost first; for one subsampled
    plate the argument may be the full data, of which the drawn elements are taken: of each particle its own, in a dimension in
    front, where particles draw elements of their own.
    """
    if not plates:
        return None
    ordered = sorted(plates, key=lambda plate: plate.dim)
    sizes = tuple(plate.size for plate in ordered)
    full = tuple(plate.full_size for plate in ordered)
    features: list[Array] = []
    particles: tuple[int, ...] = ()
    for array in arrays:
        lead = tuple(array.shape[: len(sizes)])
        index = indices.get(ordered[0].name)
        if lead == full != sizes and len(sizes) == 1 and index is not None and len(index.shape) <= 2:
            particles = tuple(index.shape[:-1])
            features.append(ops.xp.reshape(array[index], (*particles, *sizes, -1)))
        elif lead == sizes:
            features.append(ops.xp.reshape(array, (*sizes, -1)))
    if not features:
        return None
    features = [ops.xp.broadcast_to(x, (*particles, *sizes, x.shape[-1])) for x in features] if particles else features
    joined = ops.xp.concat(features, axis=-1) if len(features) > 1 else features[0]
    # The plates' own dimensions may leave gaps, which hold nothing: one entry each.
    shape = [1] * max(-plate.dim for plate in plates)
    for plate in plates:
        shape[plate.dim] = plate.size
    return ops.xp.reshape(joined, (*particles, *shape, joined.shape[-1]))
