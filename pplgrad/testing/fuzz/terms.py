"""What the arguments of a random program's distributions are made of.

Every term does two things: `value` works it out in plain NumPy, for every outcome at once, and `code` writes it down as
source that runs in either library. Neither knows of the other, so that a host that goes wrong is not followed by the oracle.

Arrays have shape (coordinates, outcomes, *plate dimensions). Along the first axis stand copies of the parameters, of which each
has one coordinate moved by an imaginary 1e-30: the imaginary part of a result is then its exact derivative (Squire and Trapp, 1998).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Plate:
    """A plate: its dimension, its size, and how many of its elements are drawn."""

    name: str
    dim: int
    size: int
    drawn: int

    @property
    def subsampled(self) -> bool:
        """Whether a part of the elements is drawn."""
        return self.drawn < self.size


@dataclass
class Point:
    """What terms are worked out from: parameters, draws, the elements that subsampled plates drew, and the Python state."""

    params: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    dims: int
    indices: dict[str, np.ndarray]
    state: float

    def aligned(self, x: np.ndarray) -> np.ndarray:
        """Return what has the coordinates alone in front with outcomes and all plate dimensions behind."""
        return x.reshape(x.shape[0], *(1,) * (self.dims + 2 - x.ndim), *x.shape[1:])


class Term:
    """Base class of terms."""

    def value(self, at: Point) -> np.ndarray:
        """Return the term's value, of shape (coordinates or 1, outcomes or 1, *plate dimensions)."""
        raise NotImplementedError

    def code(self) -> str:
        """Return the term as source."""
        raise NotImplementedError

    def parts(self) -> list[Term]:
        """Return the terms that it is made of."""
        found: list[Term] = []
        for f in fields(self):  # type: ignore[arg-type]
            held = getattr(self, f.name)
            found += [x for x in (held if isinstance(held, tuple) else (held,)) if isinstance(x, Term)]
        return found

    def walk(self) -> list[Term]:
        """Return the term and everything inside it."""
        return [self, *(inner for part in self.parts() for inner in part.walk())]


@dataclass(frozen=True)
class Const(Term):
    """A number."""

    number: float

    def value(self, at: Point) -> np.ndarray:
        return at.aligned(np.full((1,), self.number))

    def code(self) -> str:
        return "array('-inf')" if self.number == -np.inf else repr(self.number)


@dataclass(frozen=True)
class Param(Term):
    """An entry of a vector of parameters."""

    vector: str
    entry: int

    def value(self, at: Point) -> np.ndarray:
        return at.aligned(at.params[self.vector][:, self.entry])

    def code(self) -> str:
        return f"{self.vector}[{self.entry}]"


@dataclass(frozen=True)
class Local(Term):
    """A parameter for each element of a plate."""

    name: str
    plate: Plate

    def value(self, at: Point) -> np.ndarray:
        x = at.params[self.name]
        x = x.reshape(len(x), self.plate.size, *(1,) * (-self.plate.dim - 1))
        if self.plate.subsampled:
            x = x[:, at.indices[self.plate.name]]
        return at.aligned(x)

    def code(self) -> str:
        full = (
            f"{self.name}.reshape({self.plate.size}{', 1' * (-self.plate.dim - 1)})"
            if self.plate.dim < -1
            else self.name
        )
        return f"take({full}, {self.plate.name}_index, {self.plate.dim})" if self.plate.subsampled else full


@dataclass(frozen=True)
class Draw(Term):
    """What a site drew, as a number."""

    site: str
    integer: bool

    def value(self, at: Point) -> np.ndarray:
        return at.draws[self.site]

    def code(self) -> str:
        return f"number({self.site})" if self.integer else f"(1.0 * {self.site})"


_ALONG: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "total": lambda x, dim: x.sum(dim, keepdims=True),
    "whole": lambda x, dim: x.sum(dim, keepdims=True),
    "flip": lambda x, dim: np.flip(x, dim),
    "shift": lambda x, dim: np.roll(x, 1, dim),
    "first": lambda x, dim: np.take(x, [0], dim),
    "last": lambda x, dim: np.take(x, [-1], dim),
    "sums": lambda x, dim: np.cumsum(x, dim),
    "mix": lambda x, dim: np.moveaxis(np.moveaxis(x, dim, -1) @ matrix(x.shape[dim]), -1, dim),
}
"""Ways to reach other elements of a plate: by sums ("whole" is `x.sum()`, for programs of one plate), picks, orders, products."""

LEAVING = ("total", "whole", "first", "last")
MIXING = ("flip", "shift", "sums", "mix")


def matrix(size: int) -> np.ndarray:
    """Return the matrix with which elements of a plate are mixed."""
    return np.fromfunction(lambda i, j: 0.7 * (i != j) - 0.4 * (i == j) + 0.2 * i, (size, size))


@dataclass(frozen=True)
class Along(Term):
    """A term that reaches other elements of a plate."""

    way: str
    plate: Plate
    x: Term

    def value(self, at: Point) -> np.ndarray:
        return _ALONG[self.way](self.x.value(at), self.plate.dim)

    def code(self) -> str:
        if self.way == "whole":
            return f"{self.x.code()}.sum()"
        return f"{self.way}({self.x.code()}, {self.plate.dim})"


@dataclass(frozen=True)
class Gather(Term):
    """The element of a plate that a draw names."""

    plate: Plate
    x: Term
    site: str
    whole: bool

    def value(self, at: Point) -> np.ndarray:
        x, k = self.x.value(at), at.draws[self.site].real.astype(int)
        shape = np.broadcast_shapes(x.shape[:2], k.shape[:2])
        x = np.broadcast_to(x, (*shape, *x.shape[2:]))
        return np.take_along_axis(x, np.broadcast_to(k, (*shape, *k.shape[2:])), self.plate.dim)

    def code(self) -> str:
        if self.whole:
            return f"{self.x.code()}[whole_number({self.site})]"
        return f"gather({self.x.code()}, {self.site}, {self.plate.dim})"


@dataclass(frozen=True)
class Lookup(Term):
    """An entry of a table of parameters at the number that a site drew."""

    table: str
    site: str

    def value(self, at: Point) -> np.ndarray:
        k = at.draws[self.site].real.astype(int)
        return at.params[self.table][:, k[0]]

    def code(self) -> str:
        return f"{self.table}[whole_number({self.site})]"


@dataclass(frozen=True)
class More(Term):
    """Whether a term is above a number, as 0 or 1."""

    x: Term
    than: float

    def value(self, at: Point) -> np.ndarray:
        return (self.x.value(at).real > self.than).astype(float)

    def code(self) -> str:
        return f"more({self.x.code()}, {self.than})"


@dataclass(frozen=True)
class Choose(Term):
    """One of two terms, by a third: with `where`, or (`python`) by an `if` of the language, `lax.cond` in JAX."""

    test: Term
    yes: Term
    no: Term
    python: bool

    def value(self, at: Point) -> np.ndarray:
        return np.where(self.test.value(at).real > 0.5, self.yes.value(at), self.no.value(at))

    def code(self) -> str:
        test, yes, no = self.test.code(), self.yes.code(), self.no.code()
        return f"branch({test}, lambda: {yes}, lambda: {no})" if self.python else f"where({test}, {yes}, {no})"


_SMOOTH: dict[str, Callable[[np.ndarray], np.ndarray]] = {"tanh": np.tanh, "sin": np.sin, "square": lambda x: x * x}


@dataclass(frozen=True)
class Smooth(Term):
    """A smooth function of a term."""

    function: str
    x: Term

    def value(self, at: Point) -> np.ndarray:
        return _SMOOTH[self.function](self.x.value(at))

    def code(self) -> str:
        return f"{self.function}({self.x.code()})"


@dataclass(frozen=True)
class Detour(Term):
    """The same number, by a way that leaves the library's own operations."""

    way: str
    x: Term

    def value(self, at: Point) -> np.ndarray:
        return self.x.value(at)

    def code(self) -> str:
        return f"{self.way}({self.x.code()})"


@dataclass(frozen=True)
class Opaque(Term):
    """Σ tanh(c x) + c / 2 over numbers c, inside a function that keeps its numbers to itself (see `functions.py`)."""

    way: str
    numbers: tuple[float, ...]
    x: Term

    def value(self, at: Point) -> np.ndarray:
        x = self.x.value(at)
        return np.sum([np.tanh(c * x) + c / 2 for c in self.numbers], axis=0)

    def code(self) -> str:
        return f"{self.name}({self.x.code()})"

    @property
    def name(self) -> str:
        """The function's name in the source."""
        return f"{self.way}_{abs(hash(self.numbers)) % 10**6}"


@dataclass(frozen=True)
class Sum(Term):
    """A sum."""

    terms: tuple[Term, ...]

    def value(self, at: Point) -> np.ndarray:
        total: Any = 0.0
        for term in self.terms:
            total = total + term.value(at)
        return total

    def code(self) -> str:
        return " + ".join(term.code() for term in self.terms)


@dataclass(frozen=True)
class Times(Term):
    """A product."""

    a: Term
    b: Term

    def value(self, at: Point) -> np.ndarray:
        return self.a.value(at) * self.b.value(at)

    def code(self) -> str:
        return " * ".join(f"({x.code()})" if isinstance(x, Sum) else x.code() for x in (self.a, self.b))


@dataclass(frozen=True)
class Switch(Term):
    """One of two terms, by the Python state that the program reads, known by its source."""

    read: str
    yes: Term
    no: Term

    def value(self, at: Point) -> np.ndarray:
        return self.yes.value(at) if at.state else self.no.value(at)

    def code(self) -> str:
        return f"({self.yes.code()} if {self.read} else {self.no.code()})"


@dataclass(frozen=True)
class Setting(Term):
    """The Python state as a number."""

    read: str

    def value(self, at: Point) -> np.ndarray:
        return at.aligned(np.full((1,), float(at.state)))

    def code(self) -> str:
        return f"float({self.read})"
