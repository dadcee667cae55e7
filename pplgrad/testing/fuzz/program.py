"""A random program: its sites, its parameters, and the Python state that it reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from pplgrad.testing.fuzz.terms import Detour, Draw, Gather, Lookup, Opaque, Plate, Setting, Switch, Term


@dataclass(frozen=True)
class Site:
    """A site of the guide or of the model.

    `family` is one of `FAMILIES`, or "factor"; `args` are the terms of its arguments. `mask` holds a number for each element of its last
    plate, or is a term that is 1 where the site counts. An observed site has `data`, of the full plates' size.
    """

    name: str
    plates: tuple[Plate, ...]
    family: str
    args: tuple[Term, ...]
    data: np.ndarray | None = field(default=None, compare=False)
    mask: tuple[bool, ...] | Term | None = None
    scale: float | None = None

    @property
    def latent(self) -> bool:
        """Whether the site is drawn."""
        return self.data is None and self.family != "factor"

    @property
    def categories(self) -> int | None:
        """The number of values of each element, if they are finitely many."""
        return {"bernoulli": 2, "categorical": len(self.args), "binomial": 3}.get(self.family)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its value."""
        shape = [1] * max((-plate.dim for plate in self.plates), default=0)
        for plate in self.plates:
            shape[plate.dim] = plate.drawn
        return tuple(shape)

    def terms(self) -> list[Term]:
        """Return all terms that the site reads, inside out."""
        own = [*self.args, *([self.mask] if isinstance(self.mask, Term) else [])]
        return [inner for term in own for inner in term.walk()]

    def reads(self) -> set[str]:
        """Return the names of the sites whose draws it reads."""
        return {term.site for term in self.terms() if isinstance(term, (Draw, Lookup, Gather))}


def _log_one_plus_exp(x: np.ndarray) -> np.ndarray:
    return np.log(1 + np.exp(x))


def _bernoulli(z: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return z * logits - _log_one_plus_exp(logits)


def _binomial(z: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return z * logits - 2 * _log_one_plus_exp(logits) + np.where(z.real == 1, math.log(2), 0.0)


def _categorical(z: np.ndarray, *logits: np.ndarray) -> np.ndarray:
    total = np.log(np.sum([np.exp(x) for x in np.broadcast_arrays(*logits)], axis=0))
    picked = sum(np.where(z.real == k, x - total, 0.0) for k, x in enumerate(logits))
    return np.asarray(picked)


def _normal(z: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return -0.5 * ((z - loc) / scale) ** 2 - np.log(scale) - 0.5 * math.log(2 * math.pi)


def _uniform(z: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    inside = (z.real >= low.real) & (z.real <= high.real)
    return np.where(inside, -np.log(high - low), -np.inf)


FAMILIES: dict[str, Callable[..., np.ndarray]] = {
    "bernoulli": _bernoulli,
    "categorical": _categorical,
    "binomial": _binomial,
    "normal": _normal,
    "uniform": _uniform,
}
"""The log density of each family, of a value and its arguments (logits; logits; logits of two trials; loc, scale; bounds)."""


@dataclass(frozen=True)
class Program:
    """A random program: see `random_program`.

    `noise` holds the standard noise of the sites that are reparameterized, of their shape. `state` is the kind of Python state that it
    reads (one of `STATES`), or None. `chain` is the number of steps of a loop whose sites are `c_0`, `c_1`, ... (and `cx_0`, ... for what is
    observed in it): `markov` in Pyro, `scan` with one site `c` in NumPyro.
    """

    seed: int
    plates: tuple[Plate, ...]
    params: dict[str, np.ndarray]
    guide: tuple[Site, ...]
    model: tuple[Site, ...]
    noise: dict[str, np.ndarray] = field(default_factory=dict)
    state: str | None = None
    chain: int = 0

    @property
    def dims(self) -> int:
        """The number of plate dimensions."""
        return max((-plate.dim for plate in self.plates), default=0)

    @property
    def discrete(self) -> list[Site]:
        """The latent sites of finitely many values, in the guide's order."""
        return [site for site in self.guide if site.categories is not None]

    def outcomes(self) -> int:
        """Return the number of joint values of the discrete sites, for one subsample."""
        return math.prod((site.categories or 1) ** math.prod(site.shape) for site in self.discrete)

    def terms(self) -> list[Term]:
        """Return all terms of the program."""
        return [term for site in (*self.guide, *self.model) for term in site.terms()]

    def latents(self, library: str) -> list[str]:
        """Return the names of the sites that may have an estimator, as a library has them."""
        names = [site.name for site in self.guide if site.categories is not None or site.family == "uniform"]
        looped = [name for name in names if in_chain(name)] if library == "numpyro" else []
        return [name for name in names if name not in looped] + ["c"] * bool(looped)

    @property
    def reads_state(self) -> bool:
        """Whether it reads the Python state."""
        return any(isinstance(term, (Switch, Setting)) for term in self.terms())

    def features(self) -> set[str]:
        """Return words for what is in the program, for tables and for tests that look for a kind."""
        found = {getattr(term, "way", type(term).__name__.lower()) for term in self.terms()}
        found |= {"detour" for term in self.terms() if isinstance(term, Detour)}
        found |= {"opaque" for term in self.terms() if isinstance(term, Opaque)}
        found |= {site.family for site in (*self.guide, *self.model)}
        found |= {"subsampled" for plate in self.plates if plate.subsampled}
        found |= {"masked" for site in (*self.guide, *self.model) if site.mask is not None}
        found |= {"scaled" for site in (*self.guide, *self.model) if site.scale is not None}
        found |= {"chain"} if self.chain else set()
        found |= {"reentered"} if _reentered(self.guide) or _reentered(self.model) else set()
        return found | ({f"state:{self.state}"} if self.state else set())

    def without(self, name: str) -> Program:
        """Return the program without a site, which nothing else may read."""
        guide = tuple(site for site in self.guide if site.name != name)
        model = tuple(site for site in self.model if site.name != name)
        noise = {key: x for key, x in self.noise.items() if key != name}
        return replace(self, guide=guide, model=model, noise=noise)


def in_chain(name: str) -> bool:
    """Return whether a site stands in the program's loop."""
    return name.startswith(("c_", "cx_"))


def _reentered(sites: tuple[Site, ...]) -> bool:
    """Return whether a plate is left and entered again."""
    names = {plate.name for site in sites for plate in site.plates}
    for name in names:
        inside = [any(plate.name == name for plate in site.plates) for site in sites]
        if inside.count(True) > 1 and False in inside[inside.index(True) : len(inside) - inside[::-1].index(True)]:
            return True
    return False
