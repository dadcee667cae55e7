"""log Σ Π of densities by funsor: sums over variables, products over plates, and a recursion along the steps of scans.

Variables have names. The rolled steps of a scan have a variable `time`; in their factors `_PREV_x` is x one step before, `_PREV__PREV_x`
two steps before. Outside of them these are the last of the steps that the host runs before the rolled ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import funsor
import jax
import jax.numpy as jnp
from funsor.optimizer import apply_optimizer
from funsor.sum_product import sum_product

from pplgrad.errors import ProgramError, first_line, listed
from pplgrad.numpyro._compat import PREVIOUS, root
from pplgrad.numpyro._tracing.marginal_laws import Dims

funsor.set_backend("jax")


def numbered(name: str, size: int) -> Any:
    """Return the numbers of a variable's values, as a function of it."""
    return funsor.Tensor(jnp.arange(size), OrderedDict({name: funsor.Bint[size]}))


def factor(log_density: jax.Array, dims: Dims) -> Any:
    """Return a log density as a function of its variables; the other dimensions have one element."""
    named = [dim for dim in range(-log_density.ndim, 0) if log_density.shape[dim] > 1 or dim in dims.names]
    sizes = [log_density.shape[dim] for dim in named]
    inputs = OrderedDict((dims.names[dim], funsor.Bint[size]) for dim, size in zip(named, sizes, strict=True))
    return funsor.Tensor(log_density.reshape(sizes), inputs)


def contracted(factors: Sequence[Any], dims: Sequence[Dims], kept: Mapping[str, int]) -> jax.Array:
    """Return log Σ Π of some factors, in the plates `kept`, by name, at their dimensions.

    Raises:
        ProgramError: a sum across the elements of a plate, or across the steps of a scan, has no finite order.
    """
    plates = Plates.of(dims, frozenset(kept))
    rest = [f for f, d in zip(factors, dims, strict=True) if d.time is None]
    scans: dict[str, list[Any]] = {}
    for f, d in zip(factors, dims, strict=True):
        if d.time is not None:
            scans.setdefault(d.time, []).append(f)
    while scans:
        time, mine = scans.popitem()
        elsewhere = variables(f for theirs in scans.values() for f in theirs)
        rest = _without_steps(time, mine, rest, elsewhere, plates)
    found = plates.sum_product(rest, variables(rest) - plates.kept)
    return jnp.asarray(funsor.to_data(found, name_to_dim=dict(kept)))


def variables(factors: Iterable[Any]) -> frozenset[str]:
    """Return the names of the variables that factors have, plates and times among them."""
    return frozenset().union(*(f.inputs for f in factors))


@dataclass(frozen=True)
class Plates:
    """The plates of some densities: all of them, those that a sum keeps, and those that each summed variable stands in."""

    names: frozenset[str]
    kept: frozenset[str]
    around: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, dims: Sequence[Dims], kept: frozenset[str]) -> Plates:
        around: dict[str, frozenset[str]] = {}
        for d in dims:
            for name in d.summed:  # The density of its own site has a variable in no other plates than its own.
                around[name] = around.get(name, d.plates) & d.plates
        return cls(frozenset().union(*(d.plates for d in dims)), kept, around)

    def sum_product(self, factors: Sequence[Any], eliminate: frozenset[str]) -> Any:
        """Return the product of some factors, without some of their variables."""
        if not factors:
            return funsor.Number(0.0)
        try:
            with funsor.interpretations.lazy:
                found = sum_product(
                    funsor.ops.logaddexp, funsor.ops.add, list(factors), eliminate, self.names & variables(factors)
                )
            return apply_optimizer(found)
        except (NotImplementedError, ValueError) as error:
            names = sorted(map(root, eliminate - self.names))
            raise ProgramError(
                f"The sites {listed(names)} cannot be summed out together, since a plate stands between them ({first_line(error)}); draw some of "
                "them in the guide."
            ) from error


def _without_steps(
    time: str, steps: Sequence[Any], others: Sequence[Any], elsewhere: frozenset[str], plates: Plates
) -> list[Any]:
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
        return [*others, step.reduce(funsor.ops.add, time)]
    start = plates.sum_product(before, variables(before) - back - left - around)
    return [*after, _recursion(time, step, start, lags)]


def _lags(names: Iterable[str]) -> dict[str, int]:
    """Return how many steps back the steps of a scan read each variable that they pass on."""
    found: dict[str, int] = {}
    for name in names:
        lag = (len(name) - len(root(name))) // len(PREVIOUS)
        if lag:
            found[root(name)] = max(lag, found.get(root(name), 0))
    return dict(sorted(found.items()))


def _connected(factors: Sequence[Any], lags: Mapping[str, int], cut: frozenset[str]) -> tuple[list[Any], list[Any]]:
    """Return the factors of a scan's steps before the rolled ones, with all that variables other than `cut` join to them; and the others."""
    names = {name for name in variables(factors) if name != root(name) and root(name) in lags}
    found: list[Any] = []
    while True:
        new = [f for f in factors if not any(f is x for x in found) and not names.isdisjoint(f.inputs)]
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


def _recursion(time: str, step: Any, start: Any, lags: Mapping[str, int]) -> Any:
    """Return the factor of a scan's last steps, by a recursion forward in time, whose program does not grow with the number of steps."""
    sizes = {name: domain.size for f in (step, start) for name, domain in f.inputs.items()}
    oldest = {_shifted(variable, [lag])[0] for variable, lag in lags.items()}
    back = [name for variable, lag in lags.items() for name in _shifted(variable, range(1, lag + 1))]
    batch = sorted({*step.inputs, *start.inputs} - {time, *back, *lags})
    order = [*batch, *back, *lags]
    steps, first = _laid_out(step, [time, *order], sizes), _laid_out(start, [*batch, *back], sizes)
    gone = tuple(order.index(name) for name in oldest)
    # What is left after a step, by the names that the next one knows it by.
    renamed = [PREVIOUS + name if root(name) in lags else name for name in order if name not in oldest]
    places = [renamed.index(name) for name in (*batch, *back)]

    def advance(message: jax.Array, now: jax.Array) -> tuple[jax.Array, None]:
        joint = message.reshape(*message.shape, *(1,) * len(lags)) + now
        return jax.scipy.special.logsumexp(joint, gone).transpose(places), None

    shape = tuple(sizes[name] for name in (*batch, *back))
    start_of_all = jnp.broadcast_to(first, shape).astype(jnp.result_type(first, steps))
    message, _ = jax.lax.scan(advance, start_of_all, steps)
    # After the last step it is the variables themselves that were one step back for the next.
    names = [*batch, *(name[len(PREVIOUS) :] for name in back)]
    return funsor.Tensor(message, OrderedDict((name, funsor.Bint[n]) for name, n in zip(names, shape, strict=True)))


def _shifted(name: str, lags: Iterable[int]) -> list[str]:
    return [PREVIOUS * lag + name for lag in lags]


def _laid_out(f: Any, order: Sequence[str], sizes: Mapping[str, int]) -> jax.Array:
    """Return the numbers of a factor along some variables, of size 1 along those that it does not have."""
    names = [name for name in order if name in f.inputs]
    data = f.align(tuple(names)).data if names else f.data
    return jnp.asarray(data).reshape([sizes[name] if name in f.inputs else 1 for name in order])
