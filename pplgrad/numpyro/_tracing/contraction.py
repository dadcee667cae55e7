"""log Σ Π of densities: sums over variables, products over plates, and a recursion along the steps of scans.

Variables have names. The rolled steps of a scan have a variable `time`; in their factors `_PREV_x` is x one step before, `_PREV__PREV_x`
two steps before. Outside of them these are the last of the steps that the host runs before the rolled ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pplgrad.errors import ProgramError, first_line, listed
from pplgrad.numpyro._compat import PREVIOUS, root
from pplgrad.numpyro._tracing.factors import Dims, Factor, Ring, sum_product


def factor(log_density: jax.Array, dims: Dims) -> Factor:
    """Return a log density as a function of its variables; the other dimensions have one element."""
    named = [dim for dim in range(-log_density.ndim, 0) if log_density.shape[dim] > 1 or dim in dims.names]
    sizes = [log_density.shape[dim] for dim in named]
    return Factor(log_density.reshape(sizes), tuple(dims.names[dim] for dim in named))


def contracted(factors: Sequence[Factor], dims: Sequence[Dims], kept: Mapping[str, int], ring: Ring) -> jax.Array:
    """Return log Σ Π of some factors, in the plates `kept`, by name, at their dimensions; `ring` says what a sum is.

    Raises:
        ProgramError: a sum across the elements of a plate, or across the steps of a scan, has no finite order.
    """
    plates = Plates.of(dims, frozenset(kept), ring)
    rest = [f for f, d in zip(factors, dims, strict=True) if d.time is None]
    scans: dict[str, list[Factor]] = {}
    for f, d in zip(factors, dims, strict=True):
        if d.time is not None:
            scans.setdefault(d.time, []).append(f)
    while scans:
        time, mine = scans.popitem()
        elsewhere = variables(f for theirs in scans.values() for f in theirs)
        rest = _without_steps(time, mine, rest, elsewhere, plates)
    found = plates.sum_product(rest, variables(rest) - plates.kept)
    deepest = max((-dim for dim in kept.values()), default=0)
    by_dim = {dim: name for name, dim in kept.items()}
    order = [by_dim.get(dim, "") for dim in range(-deepest, 0)]
    return found.laid_out(order)


def variables(factors: Iterable[Factor]) -> frozenset[str]:
    """Return the names of the variables that factors have, plates and times among them."""
    return frozenset(name for f in factors for name in f.names)


@dataclass(frozen=True)
class Plates:
    """The plates of some densities: all of them, those that a sum keeps, and those that each summed variable stands in; and what a sum is."""

    names: frozenset[str]
    kept: frozenset[str]
    around: Mapping[str, frozenset[str]]
    ring: Ring

    @classmethod
    def of(cls, dims: Sequence[Dims], kept: frozenset[str], ring: Ring) -> Plates:
        around: dict[str, frozenset[str]] = {}
        for d in dims:
            for name in d.summed:  # The density of its own site has a variable in no other plates than its own.
                around[name] = around.get(name, d.plates) & d.plates
        return cls(frozenset().union(*(d.plates for d in dims)), kept, around, ring)

    def sum_product(self, factors: Sequence[Factor], eliminate: frozenset[str]) -> Factor:
        """Return the product of some factors, without some of their variables."""
        try:
            return sum_product(factors, eliminate, self.names, self.ring)
        except ValueError as error:
            names = sorted(map(root, eliminate - self.names))
            raise ProgramError(
                f"The sites {listed(names)} cannot be summed out together, since a plate stands between them ({first_line(error)}); draw some of "
                "them in the guide."
            ) from error


def _without_steps(
    time: str, steps: Sequence[Factor], others: Sequence[Factor], elsewhere: frozenset[str], plates: Plates
) -> list[Factor]:
    """Return the other factors, and one in the place of those of a scan's steps; `elsewhere` are variables that other scans read."""
    mine = variables(steps) - plates.names - {time}
    lags = _lags(mine)
    chain = frozenset(name for variable, lag in lags.items() for name in _shifted(variable, range(lag + 1)))
    back = frozenset(name for variable, lag in lags.items() for name in _shifted(variable, range(1, lag + 1)))
    shared = mine & (variables(others) | elsewhere) - chain
    before, after = _connected(others, lags, shared | elsewhere | back | plates.names)
    left = (variables(before) - plates.names) & (shared | elsewhere)
    around = _plates_between(lags, shared | left, plates)
    step = plates.sum_product(steps, mine - chain - shared | plates.names & variables(steps) - around)
    if not lags:
        return [*others, step.multiplied_over([time])]
    start = plates.sum_product(before, variables(before) - back - left - around)
    return [*after, _recursion(time, step, start, lags, plates.ring)]


def _lags(names: Iterable[str]) -> dict[str, int]:
    """Return how many steps back the steps of a scan read each variable that they pass on."""
    found: dict[str, int] = {}
    for name in names:
        lag = (len(name) - len(root(name))) // len(PREVIOUS)
        if lag:
            found[root(name)] = max(lag, found.get(root(name), 0))
    return dict(sorted(found.items()))


def _connected(
    factors: Sequence[Factor], lags: Mapping[str, int], cut: frozenset[str]
) -> tuple[list[Factor], list[Factor]]:
    """Return the factors of a scan's steps before the rolled ones, with all that variables other than `cut` join to them; and the others."""
    names = {name for name in variables(factors) if name != root(name) and root(name) in lags}
    found: list[Factor] = []
    while True:
        new = [f for f in factors if not any(f is x for x in found) and not names.isdisjoint(f.names)]
        if not new:
            return found, [f for f in factors if not any(f is x for x in found)]
        found += new
        names |= variables(new) - cut


def _plates_between(lags: Mapping[str, int], left: Iterable[str], plates: Plates) -> frozenset[str]:
    """Return the plates of what a scan's steps pass on, or of what is left of them, or refuse a sum across plates."""
    passed = {name: plates.around[name] for name in lags}
    if not passed:
        return plates.kept.union(*(plates.around[name] for name in left))
    first = next(iter(passed.values()))
    wrong = [name for name, mine in passed.items() if mine != first]
    wrong += [name for name in sorted(left) if not plates.around[name] <= first]
    if wrong:
        raise ProgramError(
            f"The sites {listed(sorted({next(iter(passed)), *map(root, wrong)}))} stand in different plates, and are summed out together across "
            "the steps of scan, so that the elements of the plates cannot be separated; draw some of them in the guide."
        )
    return first


def _recursion(time: str, step: Factor, start: Factor, lags: Mapping[str, int], ring: Ring) -> Factor:
    """Return the factor of a scan's last steps, by a recursion forward in time, whose program does not grow with the number of steps."""
    sizes = {name: n for f in (step, start) for name, n in f.sizes.items()}
    oldest = {_shifted(variable, [lag])[0] for variable, lag in lags.items()}
    back = [name for variable, lag in lags.items() for name in _shifted(variable, range(1, lag + 1))]
    batch = sorted({*step.names, *start.names} - {time, *back, *lags})
    order = [*batch, *back, *lags]
    steps, first = step.laid_out([time, *order]), start.laid_out([*batch, *back])
    gone = tuple(order.index(name) for name in oldest)
    # What is left after a step, by the names that the next one knows it by.
    renamed = [PREVIOUS + name if root(name) in lags else name for name in order if name not in oldest]
    places = [renamed.index(name) for name in (*batch, *back)]

    def advance(message: jax.Array, row: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, None]:
        now, key = row
        joint = message.reshape(*message.shape, *(1,) * len(lags)) + now
        return ring.reduce(joint, gone, key).transpose(places), None

    shape = tuple(sizes[name] for name in (*batch, *back))
    start_of_all = jnp.broadcast_to(first, shape).astype(jnp.result_type(first, steps))
    message, _ = jax.lax.scan(advance, start_of_all, (steps, ring.keys(len(steps))))
    # After the last step it is the variables themselves that were one step back for the next.
    return Factor(message, (*batch, *(name[len(PREVIOUS) :] for name in back)))


def _shifted(name: str, lags: Iterable[int]) -> list[str]:
    return [PREVIOUS * lag + name for lag in lags]
