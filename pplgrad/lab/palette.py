"""The colours, dashes and markers of every picture: Okabe and Ito's colours, which colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3))
MARKERS = "osD^vPX*<>hd"


def colour(names: Sequence[str], name: str) -> str:
    """Return the colour of one of several names."""
    return COLOURS[names.index(name) % len(COLOURS)]


def dash(names: Sequence[str], name: str) -> tuple[int, ...]:
    """Return the dashes of one of several names: other ones for each turn through the colours."""
    return DASHES[names.index(name) // len(COLOURS) % len(DASHES)]


def marker(names: Sequence[str], name: str) -> str:
    """Return the marker of one of several names."""
    return MARKERS[names.index(name) % len(MARKERS)]
