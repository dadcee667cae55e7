"""Random programs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pplgrad.testing.fuzz.functions import DETOURS, OPAQUE_WAYS
from pplgrad.testing.fuzz.program import Program, Site, in_chain
from pplgrad.testing.fuzz.states import STATES, TORCH_STATES
from pplgrad.testing.fuzz.terms import (
    LEAVING,
    MIXING,
    Along,
    Choose,
    Const,
    Detour,
    Draw,
    Gather,
    Local,
    Lookup,
    More,
    Opaque,
    Param,
    Plate,
    Setting,
    Smooth,
    Sum,
    Switch,
    Term,
    Times,
)

MOST_OUTCOMES = 64
FLAVOURS = {
    "whole": 0.4,
    "state": 0.25,
    "detour": 0.25,
    "opaque": 0.25,
    "impossible": 0.15,
    "python": 0.2,
    "moved": 0.06,
    "mixing": 0.5,
    "chain": 0.15,
    "return": 0.3,
    "mixture": 0.15,
}


def random_program(seed: int, flavours: tuple[str, ...] | None = None) -> Program:
    """Return a small random program that both libraries can run, and whose exact loss and gradient are known.

    The program is a directed acyclic graph of discrete and reparameterized sites. It may have plates (nested, crossed, side by side,
    subsampled, left and entered again), masks, scales, sums and orders over plates, lookups by draw, comparisons, control flow and Python
    state. It has at most some dozens of outcomes.

    Args:
        seed: the seed of the random choices.
        flavours: the `FLAVOURS` that the program has, and no others. A kind of one is asked for by name, such as "state:namespace" or
            "detour:pickled". Default: the seed decides.

    Returns:
        The program, which `python -m pplgrad.testing.fuzz --seed` prints as source code.

    Example:
        >>> random_program(1).features() == random_program(1).features()
        True
        >>> random_program(1).outcomes() <= 64
        True

    References:
        Claessen and Hughes (2000), "QuickCheck: a lightweight tool for random testing of Haskell programs".
    """
    return _Maker(seed, flavours).program()


class _Maker:
    def __init__(self, seed: int, flavours: tuple[str, ...] | None) -> None:
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        # Numbers of their own, so that another flavour leaves the programs of named ones as they are.
        chances = np.random.default_rng([seed, 1])
        drawn = {name for name, chance in FLAVOURS.items() if chances.random() < chance}
        named = drawn if flavours is None else flavours
        self.flavours = {name.split(":")[0] for name in named}
        self.kinds = dict(name.split(":") for name in named if ":" in name)
        home = self.pick(["pyro", "numpyro"])
        self.detours = [self.kinds["detour"]] if "detour" in self.kinds else sorted(DETOURS[home])
        self.counts = {"a": 0, "b": 0}
        self.tables: dict[str, tuple[int, ...]] = {}
        self.noise: dict[str, np.ndarray] = {}
        self.state: str | None = None
        self.read = ""
        self.opaques: list[Opaque] = []
        self.vector = "a"
        self.steps = int(self.rng.integers(2, 4)) if "chain" in self.flavours else 0
        self.plates = self._plates()
        self.returns = "return" in self.flavours and bool(self.plates) and not {"moved", "mixture"} & self.flavours

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return bool(self.rng.random() < probability)

    def pick(self, items):  # type: ignore[no-untyped-def]
        """Return one of several."""
        return items[int(self.rng.integers(len(items)))]

    def _plates(self) -> tuple[Plate, ...]:
        def plate(name: str, dim: int) -> Plate:
            size = 3 if self.chance(0.3) else 2
            drawn = int(self.rng.integers(1, size)) if self.chance(0.2) else size
            return Plate(name, dim, size, drawn)

        if "mixture" in self.flavours:
            first = plate("p", -1)
            return replace(first, drawn=first.size), plate("q", -1)
        if "whole" in self.flavours:
            return (plate("p", -1),) if self.chance(0.6) else (plate("p", -1), plate("q", -1))
        kind = self.rng.random()
        if kind < 0.1:
            return ()
        if kind < 0.45:
            return (plate("p", -1),)
        return (plate("p", -1), plate("q", -2 if kind < 0.8 else -1))

    def place(self, most: int = 2) -> tuple[Plate, ...]:
        """Return the plates of a site, at most one for a dimension."""
        chosen: list[Plate] = []
        for p in self.plates:
            if self.chance(0.5) and all(p.dim != other.dim for other in chosen) and len(chosen) < most:
                chosen.append(p)
        return tuple(chosen)

    def program(self) -> Program:
        """Make the program."""
        latents = self._latents()
        if "state" in self.flavours:
            self.state = self.kinds.get("state") or self.pick([*STATES, *TORCH_STATES])
            self.read = (STATES | TORCH_STATES)[self.state].read
        self.vector = "a"
        guide = [self._guide_site(site, latents[:i]) for i, site in enumerate(latents)]
        if self.steps:
            guide += self._chain(guide, observed=False)
        self.vector = "b"
        model = self._model(guide)
        params = {name: 0.8 * self.rng.normal(size=max(n, 1)) for name, n in self.counts.items()}
        params |= {name: 0.8 * self.rng.normal(size=shape) for name, shape in self.tables.items()}
        found = Program(self.seed, self.plates, params, tuple(guide), tuple(model), self.noise, self.state, self.steps)
        return found if found.reads_state else replace(found, state=None)

    def _latents(self) -> list[Site]:
        """Return the latent sites, without arguments but with as many as there will be."""
        found: list[Site] = []
        for i in range(int(self.rng.integers(2, 5))):
            family = self.pick(["bernoulli", "bernoulli", "bernoulli", "categorical", "normal", "binomial"])
            plates = self.place()
            if "detour" in self.flavours and self.chance(0.5):
                family, plates = "bernoulli", ()
            if self.returns and i < 2:  # A plate's site, and one outside of the plate that will read it.
                family = "bernoulli"
                plates = self.plates[:1] if i == 0 else tuple(set(plates) - {self.plates[0]})
            if "moved" in self.flavours:
                family = "uniform" if i == 0 else "bernoulli"
            if "impossible" in self.flavours and i == 0:
                family = "categorical"
            if "mixture" in self.flavours and "moved" not in self.flavours and i < 2:
                family, plates = ("categorical", self.plates[1:]) if i else (family, self.plates[:1])
            count = {"categorical": 3 if self.chance(0.6) else 2}.get(family, 1)
            if "mixture" in self.flavours and i == 1 and family == "categorical":
                count = self.plates[0].size
            site = Site(f"z{i}", () if family == "uniform" else plates, family, (Const(0.0),) * count)
            if Program(0, self.plates, {}, (*found, site), ()).outcomes() * 2**self.steps > MOST_OUTCOMES:
                break
            found.append(self._around(site))
        return found or [Site("z0", (), "bernoulli", (Const(0.0),))]

    def _around(self, site: Site) -> Site:
        """Return the site under a mask or a scale."""
        if site.plates and self.chance(0.12):
            mask = tuple(self.chance(0.5) for _ in range(site.plates[-1].size))
            site = replace(site, mask=mask)
        return replace(site, scale=float(self.pick([0.5, 2.5]))) if self.chance(0.1) else site

    def _guide_site(self, site: Site, seen: list[Site]) -> Site:
        if site.family == "normal":
            self.noise[site.name] = self.rng.normal(size=site.shape)
            return replace(site, args=(self.expression(site, seen), Const(0.8)))
        if site.family == "uniform":
            self.noise[site.name] = self.rng.random(size=site.shape)
            middle = self.expression(site, seen)
            return replace(site, args=(Sum((middle, Const(-1.0))), Sum((middle, Const(1.5)))))
        args = [self.expression(site, seen) for _ in site.args]
        if self.returns and site.name == "z1":
            args = [Sum((args[0], Times(Const(2.0), self.atom(site, seen[:1]))))]
        if "impossible" in self.flavours and site.family == "categorical" and len(args) > 2:
            args[int(self.rng.integers(len(args)))] = Const(-np.inf)
        return replace(site, args=tuple(args))

    def _chain(self, seen: list[Site], observed: bool) -> list[Site]:
        """Return the sites of a loop, each of which reads the one before it."""
        start, more, slope = self.param(), self.param(), self.param()
        # What has been summed over a plate keeps a dimension, which the loop's carry has not.
        plain = [site for site in seen if not site.plates and not site.reads()]
        around = self.atom(Site("c", (), "bernoulli", ()), plain) if plain and self.chance(0.5) else Const(0.6)
        found: list[Site] = []
        for t in range(self.steps):
            before: Term = Draw(f"c_{t - 1}", False) if t else Const(0.0)
            found.append(Site(f"c_{t}", (), "bernoulli", (Sum((start, Times(more, before), around)),)))
            if observed:
                loc = Sum((slope, Times(Const(1.5), Draw(f"c_{t}", False))))
                found.append(Site(f"cx_{t}", (), "normal", (loc, Const(1.0)), self.rng.normal(size=()).round(2)))
        return found

    def _model(self, guide: list[Site]) -> list[Site]:
        """Return the latent sites in another order, with observed ones and factors between and after them."""
        chain = [site for site in guide if in_chain(site.name)]
        guide = guide[: len(guide) - len(chain)]
        order = [guide[i] for i in self.rng.permutation(len(guide))]
        found: list[Site] = []
        seen: list[Site] = []
        for site in order:
            prior = replace(site, args=tuple(self.expression(site, seen, 1) for _ in site.args))
            if site.family in ("normal", "uniform"):
                prior = replace(prior, family="normal", args=(prior.args[0], Const(1.3)))
            found.append(prior)
            seen.append(site)
            if self.chance(0.2):
                found.append(self._observed(len(found), seen))
        if chain:
            found += self._chain(seen, observed=self.chance(0.8))
            seen += chain
        count = int(self.rng.integers(1, 3))
        return [*found, *(self._observed(len(found) + i, seen, i == count - 1) for i in range(count))]

    def _observed(self, number: int, seen: list[Site], last: bool = False) -> Site:
        site = Site(f"x{number}", self.place(), "normal", ())
        back = [s for s in seen if s.name == "z1" and self.returns]
        mixed = [s for s in seen if s.name == "z1" and s.categories == self.plates[0].size] if self.plates else []
        if last and mixed and "mixture" in self.flavours and mixed[0].plates == self.plates[1:]:
            # Elements of one plate that draws in the other plate name.
            first = next(s for s in seen if s.name == "z0")
            site = replace(site, plates=self.plates[1:])
            gathered = Gather(self.plates[0], self.draw(first), "z1", whole=False)
            loc: Term = Sum((self._start(site), Times(Const(1.5), gathered)))
        elif last and back:
            # Back in the plate, and reading nothing but the site outside.
            site = replace(site, plates=(*self.plates[:1], *(p for p in back[0].plates if p.dim != self.plates[0].dim)))
            loc = Sum((self._start(site), Times(Const(1.5), self.atom(site, back))))
        elif self.read and (last or self.chance(0.4)):
            # Often the only thing that is read: what a site may depend on then changes with the state.
            loc = self.param() if self.chance(0.6) else self.expression(site, seen, 3, reads=1)
            loc = Sum((loc, self._by_state(site, seen)))
            self.read = ""
        else:
            loc = self.expression(site, seen, 3, reads=1)
        if self.chance(0.25):
            return replace(site, family="factor", args=(Smooth("sin", loc),))
        full = [1] * len(site.shape)
        for p in site.plates:
            full[p.dim] = p.size
        site = replace(site, args=(loc, Const(1.0)), data=self.rng.normal(size=full).round(2))
        fitting = [s for s in seen if s.family == "bernoulli" and set(s.plates) <= set(site.plates)]
        if fitting and self.chance(0.15):
            return replace(site, mask=More(self.draw(self.pick(fitting)), 0.5))
        return self._around(site)

    def _by_state(self, site: Site, seen: list[Site]) -> Term:
        yes = self.atom(site, seen)
        no = self.atom(site, seen) if self.chance(0.6) else Const(0.4)
        if self.chance(0.8):
            return Times(Const(2.0), Switch(self.read, yes, no))
        return Times(Setting(self.read), yes)

    def expression(self, site: Site, seen: list[Site], most: int = 2, reads: int = 0) -> Term:
        """Return a term for a site's argument that reads some of the sites before it."""
        terms: list[Term] = [self._start(site)]
        for _ in range(max(reads, int(self.rng.integers(0, most + 1))) if seen else 0):
            atom = self.atom(site, seen)
            if self.chance(0.25):
                atom = Times(atom, self.atom(site, seen))
            terms.append(Times(self.param() if self.chance(0.6) else Const(float(self.pick([-1.5, 0.7, 2.0]))), atom))
        return Sum(tuple(terms))

    def param(self) -> Param:
        """Return a new entry of the vector of parameters."""
        self.counts[self.vector] += 1
        return Param(self.vector, self.counts[self.vector] - 1)

    def table(self, shape: tuple[int, ...]) -> str:
        """Return the name of a new array of parameters."""
        name = f"{self.vector}{len(self.tables)}"
        self.tables[name] = shape
        return name

    def _start(self, site: Site) -> Term:
        if site.plates and self.chance(0.5):
            p = self.pick(site.plates)
            return Local(self.table((p.size,)), p)
        return self.param()

    @staticmethod
    def draw(site: Site) -> Draw:
        """Return what a site drew."""
        return Draw(site.name, site.family == "categorical")

    def atom(self, site: Site, seen: list[Site]) -> Term:
        """Return a term that reads one of the sites before, at the plates of this one."""
        read = self.pick(seen)
        if "detour" in self.flavours and self.chance(0.6):
            read = self.pick([s for s in seen if _detourable(s)] or seen)
        here = set(site.plates)
        if read.family == "categorical" and set(read.plates) <= here and self.chance(0.5):
            return Lookup(self.table((len(read.args),)), read.name)
        gathered = self._gathered(read, here, seen)
        if gathered is not None:
            return gathered
        x: Term = self.draw(read)
        if "detour" in self.flavours and _detourable(read) and self.chance(0.7):
            x = Detour(self.pick(self.detours), x)
        for p in read.plates:
            if p not in here:
                x = Along(self._leaving(read), p, x)
            elif "mixing" in self.flavours and p.drawn > 1 and self.chance(0.3):
                x = Along(self.pick(MIXING), p, x)
        return self._wrapped(x, site, seen, scalar=not (set(read.plates) & here), smooth=read.family == "normal")

    def _leaving(self, read: Site) -> str:
        if "whole" in self.flavours:
            return "whole" if len(read.plates) == 1 and self.chance(0.7) else self.pick(["total", "first", "last"])
        return str(self.pick([way for way in LEAVING if way != "whole"]))

    def _gathered(self, read: Site, here: set[Plate], seen: list[Site]) -> Term | None:
        """Return the element of a plate that another draw names, where there is one that can."""
        if len(read.plates) != 1 or read.plates[0] in here or read.plates[0].dim != -1:
            return None
        p = read.plates[0]
        fitting = [
            s
            for s in seen
            if s.categories == p.drawn and s.family == "categorical" and set(s.plates) <= here and s != read
        ]
        fitting = [s for s in fitting if all(other.dim == -1 for other in s.plates)]
        whole = "whole" in self.flavours
        if not whole:
            fitting = [s for s in fitting if s.plates]
        if not fitting or p.subsampled or self.chance(0.3):
            return None
        return Gather(p, self.draw(read), self.pick(fitting).name, whole)

    def _wrapped(self, x: Term, site: Site, seen: list[Site], scalar: bool, smooth: bool) -> Term:
        if "opaque" in self.flavours and len(self.opaques) < 3 and self.chance(0.4):
            return self._opaque(x)
        if not smooth and self.chance(0.15):
            return More(x, float(self.pick([0.5, 1.5])))
        if not smooth and self.chance(0.15):
            python = scalar and "python" in self.flavours
            other = self.pick(seen)
            inside = set(other.plates) <= set(site.plates)
            yes: Term = self.draw(other) if inside else self.param()
            return Choose(More(x, 0.5), Times(self.param(), yes), Sum((self.param(), Const(0.3))), python)
        return Smooth(self.pick(["tanh", "sin", "square"]), x) if self.chance(0.2) else x

    def _opaque(self, x: Term) -> Opaque:
        """Return a function of its own; a second one differs from the first in its numbers alone."""
        if self.opaques:
            first = self.opaques[0]
            numbers = tuple(np.round(np.array(first.numbers) + self.rng.normal(size=3), 2).tolist())
            made = replace(first, numbers=numbers, x=x)
        else:
            made = Opaque(self.pick(OPAQUE_WAYS), tuple(self.rng.normal(size=3).round(2).tolist()), x)
        self.opaques.append(made)
        return made


def _detourable(site: Site) -> bool:
    """Return whether a site's draw is one number, 0 or 1."""
    return not site.plates and site.family == "bernoulli"
