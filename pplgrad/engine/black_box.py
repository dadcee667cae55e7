"""A function of NumPy arrays that is called element by element: what `black_box` of both libraries has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from pplgrad.errors import ProgramError

Shape = tuple[int, ...]

_AT_MOST = 4
"""So many rows are looked at by themselves when the promise of a vectorized function is checked."""
# A separate generator, so that no other draws change.
_ROWS = np.random.default_rng(0)


class BlackBox:
    """A function f, and the shapes of its values: (*batch, *event) each, where batch shapes broadcast.

    `batch` is the batch shape of all, `batch_dims` and `event_dims` those of each value, `shape` that of what f returns of one element.
    """

    def __init__(
        self, function: Callable, shapes: Sequence[Shape], event_dim: Any, vectorized: bool, shape: Any, dtype: Any
    ) -> None:
        if not callable(function):
            raise ProgramError(f"black_box takes a function of NumPy arrays first; got {type(function).__name__}.")
        self.function, self.vectorized, self.dtype = function, bool(vectorized), np.dtype(dtype)
        self.name = _name_of(function)
        if not shapes:
            raise self._error("has no values; write black_box(function, value, ...), with what it is computed from")
        self.event_dims = self._checked_events(event_dim, shapes)
        self.batch_dims = tuple(len(s) - event for s, event in zip(shapes, self.event_dims, strict=True))
        self.shape = self._checked_shape(shape)
        batches = [tuple(s[:own]) for s, own in zip(shapes, self.batch_dims, strict=True)]
        try:
            self.batch: Shape = np.broadcast_shapes(*batches)
        except ValueError as error:
            raise self._error(
                f"has values of batch shapes {', '.join(map(str, batches))}, which do not broadcast; event dimensions are not "
                f"among them if event_dim says so (it is {event_dim!r})"
            ) from error

    def places(self, shapes: Sequence[Shape], out: Shape) -> list[tuple[int | None, ...]]:
        """Return for each axis of each value the axis of the result that follows it element by element; None for event axes.

        `shapes` and `out` may have further axes in front, the same number in all.
        """
        lead = len(out) - len(self.batch) - len(self.shape)
        found: list[tuple[int | None, ...]] = []
        for shape, event in zip(shapes, self.event_dims, strict=True):
            own = len(shape) - lead - event
            first = lead + len(self.batch) - own
            kept: list[int | None] = [*range(lead), *range(first, first + own)]
            found.append((*kept, *(None for _ in range(event))))
        return found

    def evaluate(self, arrays: Sequence[np.ndarray], check: bool) -> np.ndarray:
        """Return f of each element, of shape (*batch, *shape); with `check` a vectorized function is held to its promise."""
        batch, rows = self._rows(arrays)
        if not len(rows[0]):
            return np.zeros(batch + self.shape, self.dtype)
        if self.vectorized:
            found = self._whole(rows)
            if check and len(found) > 1:
                self._check(rows, found)
        else:
            found = np.stack([self._one([x[i].copy() for x in rows]) for i in range(len(rows[0]))])
        return found.astype(self.dtype, copy=False).reshape(batch + self.shape)

    def _rows(self, arrays: Sequence[np.ndarray]) -> tuple[Shape, list[np.ndarray]]:
        """Return the batch shape, axes in front included, and the values with one row for each element of it."""
        given = [np.asarray(x) for x in arrays]
        aligned, batches = [], []
        for x, own, event in zip(given, self.batch_dims, self.event_dims, strict=True):
            lead = x.ndim - own - event
            x = x.reshape(x.shape[:lead] + (1,) * (len(self.batch) - own) + x.shape[lead:])
            aligned.append(x)
            batches.append(x.shape[: x.ndim - event])
        batch = np.broadcast_shapes(*batches)
        size = int(np.prod(batch, dtype=int))
        rows = []
        for x, event in zip(aligned, self.event_dims, strict=True):
            element = x.shape[x.ndim - event :]
            rows.append(np.broadcast_to(x, batch + element).reshape((size, *element)))
        return batch, rows

    def _one(self, row: list[Any]) -> np.ndarray:
        """Return f of one element."""
        return self._checked(self.function(*row), self.shape, "of one element")

    def _whole(self, rows: list[np.ndarray]) -> np.ndarray:
        """Return f of all rows at once. It gets copies: what it writes into is its own."""
        return self._checked(self.function(*map(np.array, rows)), (len(rows[0]), *self.shape), "of all rows")

    def _check(self, rows: list[np.ndarray], found: np.ndarray) -> None:
        """Raise if a row comes out otherwise by itself than among all."""
        kinds = [x for x in (self.dtype, found.dtype) if x.kind == "f"]
        relative = max(float(np.finfo(x).eps) for x in kinds) ** 0.5
        sizes = np.abs(found[np.isfinite(found)].astype(float))
        within = relative * float(sizes.max(initial=0.0))
        for i in _ROWS.choice(len(found), min(len(found), _AT_MOST), replace=False):
            alone = self._whole([x[i : i + 1] for x in rows])[0]
            if not np.allclose(found[i], alone, rtol=relative, atol=within, equal_nan=True):
                raise self._error(
                    f"was given with vectorized=True, but row {i} of what it returns is another one when the row is computed by itself "
                    "(rows are mixed, or its numbers are random); drop vectorized=True, and it is called for each element by itself"
                )

    def _checked(self, found: Any, shape: Shape, what: str) -> np.ndarray:
        try:
            array = np.asarray(found)
        except ValueError as error:
            raise self._error(f"returned {what} no array ({error}); return real numbers of shape {shape}") from error
        if array.dtype.kind not in "biuf":
            kind = type(found).__name__ if array.dtype.kind == "O" else str(array.dtype)
            raise self._error(f"returned {what} {kind}; return real numbers of shape {shape}")
        if array.shape != shape:
            advice = f"; black_box(..., shape=...) says what one element's is, now {self.shape}"
            raise self._error(f"returned {what} an array of shape {array.shape} instead of {shape}{advice}")
        return array

    def _checked_events(self, event_dim: Any, shapes: Sequence[Shape]) -> tuple[int, ...]:
        given = tuple(event_dim) if isinstance(event_dim, (tuple, list)) else (event_dim,) * len(shapes)
        if len(given) != len(shapes) or not all(_is_count(x) for x in given):
            raise self._error(
                f"has event_dim={event_dim!r}; write a number of dimensions, 0 or more, or a tuple with one for each of its "
                f"{len(shapes)} values"
            )
        for place, (event, shape) in enumerate(zip(given, shapes, strict=True)):
            if event > len(shape):
                raise self._error(
                    f"has event_dim={event} at value {place}, whose shape {tuple(shape)} has no more than {len(shape)} dimensions"
                )
        return given

    def _checked_shape(self, shape: Any) -> Shape:
        if not isinstance(shape, (tuple, list)) or not all(_is_count(n) for n in shape):
            raise self._error(
                f"has shape={shape!r}; write what it returns of one element: () for a number, (3,) for three"
            )
        return tuple(int(n) for n in shape)

    def _error(self, words: str) -> ProgramError:
        return ProgramError(f"black_box: '{self.name}' {words}.")


class CalledBack(BlackBox):
    """A black box that compiled code calls, and that is held to its promise at the 1st, 2nd, 4th, 8th ... call.

    Numbers of 64 bits, among values of these `kinds` and in the result, travel as two of 32 along a last axis.
    """

    def __init__(self, *args: Any, kinds: Sequence[Any]) -> None:
        super().__init__(*args)
        self._kinds = [np.dtype(kind) for kind in kinds]
        self._calls = count(1)

    @property
    def halved(self) -> list[bool]:
        """Whether each value travels as halves."""
        return [is_halved(kind) for kind in self._kinds]

    def places(self, shapes: Sequence[Shape], out: Shape) -> list[tuple[int | None, ...]]:
        """Return what `BlackBox.places` does, where the axis of the halves is one more of each element."""
        whole = [shape[:-1] if h else shape for shape, h in zip(shapes, self.halved, strict=True)]
        found = super().places(whole, out[:-1] if is_halved(self.dtype) else out)
        return [(*places, None) if h else places for places, h in zip(found, self.halved, strict=True)]

    def __call__(self, *arrays: Any) -> np.ndarray:
        number = next(self._calls)
        pairs = zip(arrays, self._kinds, strict=True)
        whole = [np.ascontiguousarray(x).view(k)[..., 0] if is_halved(k) else np.asarray(x) for x, k in pairs]
        found = self.evaluate(whole, number & (number - 1) == 0)
        return np.ascontiguousarray(found[..., None]).view(np.uint32) if is_halved(self.dtype) else found


def is_halved(kind: Any) -> bool:
    """Return whether numbers of a kind travel as halves."""
    return np.dtype(kind).kind in "iuf" and np.dtype(kind).itemsize == 8


def _is_count(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool) and bool(x >= 0)


def _name_of(function: Any) -> str:
    if isinstance(function, partial):
        return _name_of(function.func)
    return getattr(function, "__qualname__", None) or type(function).__name__
