"""What is left of the costs of a group of sites after their baseline, one part after the other.

The parts that keep something for each site are evaluated site by site, unless they say that they take all sites of the group at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.baseline import Baseline, BaselineTerms, parts_of
from pplgrad.core.data_parallel import DataParallel
from pplgrad.core.estimator import BaselineHost, BaselineValue
from pplgrad.core.plates import Plate
from pplgrad.engine.baseline_outputs import fitted
from pplgrad.engine.records import Record
from pplgrad.errors import BaselineError

Square = Callable[[], Array] | None
States = dict[tuple[str, str], Mapping[str, Array]]


@dataclass
class Costs:
    """The costs of a group of sites, (particles, sites, *plates), and what their baseline's parts need; `states` are those after the draw."""

    ops: Ops
    names: tuple[str, ...]
    plates: tuple[Plate, ...]
    indices: Mapping[str, Array]
    squares: Sequence[Square]
    host: BaselineHost | None
    peers: DataParallel | None
    record: Record | None
    states: States = field(default_factory=dict)

    def without(self, baseline: Baseline, costs: Array) -> BaselineValue:
        """Subtract a baseline's parts one after the other, each from what those before it left."""
        signal, total = costs, None
        for number, part in enumerate(parts_of(baseline)):
            if not part.per_site:
                signal, loss = self._at_once(part, signal)
            elif part.takes_sites and len(self.names) > 1:
                signal, loss = self._stacked(str(number), part, signal)
            else:
                signal, loss = self._one_by_one(str(number), part, signal)
            if loss is not None:
                total = loss if total is None else total + loss
        return BaselineValue(signal, total)

    def _at_once(self, part: Baseline, signal: Array) -> tuple[Array, Array | None]:
        """Subtract a part that keeps nothing."""
        terms = self._terms(self.names[0], signal, _stacked_squares(self.ops, self.squares))
        found = part.evaluate(terms)
        value = fitted(self.ops, part, self.names[0], found.value, tuple(signal.shape), self.plates)
        return self._subtracted(part, terms, value), found.loss

    def _stacked(self, key: str, part: Baseline, signal: Array) -> tuple[Array, Array | None]:
        """Subtract a part that keeps something for each site, at all sites together."""
        xp = self.ops.xp
        kept = [self._state(name, key, part) for name in self.names]
        terms = self._terms(
            self.names[0],
            signal,
            _stacked_squares(self.ops, self.squares),
            state={entry: xp.stack([state[entry] for state in kept], axis=0) for entry in kept[0]},
            predict=partial(self._predictions, key, part, signal),
            sites=len(self.names),
        )
        found = part.evaluate(terms)
        fitting = fitted(self.ops, part, self.names[0], found.value, tuple(signal.shape), self.plates)
        if part.calls_function and self.host is not None:
            value = xp.broadcast_to(fitting, tuple(signal.shape))
            for name, one in zip(self.names, xp.unstack(value, axis=1), strict=True):
                self.host.check_finite(name, part, one)
        if found.state:
            entries = {entry: xp.unstack(x, axis=0) for entry, x in found.state.items()}
            for i, name in enumerate(self.names):
                self.states[name, key] = {entry: parts[i] for entry, parts in entries.items()}
        return self._subtracted(part, terms, fitting), found.loss

    def _one_by_one(self, key: str, part: Baseline, signal: Array) -> tuple[Array, Array | None]:
        """Subtract a part that keeps something for each site, at one site after the other."""
        signals, total = [], None
        for i, name in enumerate(self.names):
            own = signal[:, i]
            terms = self._terms(
                name,
                own,
                _one_square(self.squares[i]),
                state=self._state(name, key, part),
                predict=partial(self._predicted, name, key, part, own),
            )
            found = part.evaluate(terms)
            if part.calls_function and self.host is not None:
                self.host.check_finite(name, part, found.value)
            if found.state:
                self.states[name, key] = found.state
            value = fitted(self.ops, part, name, found.value, tuple(own.shape), self.plates)
            signals.append(self._subtracted(part, terms, value, name))
            if found.loss is not None:
                total = found.loss if total is None else total + found.loss
        return self.ops.xp.stack(signals, axis=1), total

    def _terms(
        self,
        site: str,
        cost: Array,
        squares: Callable[[], Array],
        state: Mapping[str, Array] | None = None,
        predict: Callable[[], Array] | None = None,
        sites: int = 0,
    ) -> BaselineTerms:
        nothing = self.host is None or predict is None
        return BaselineTerms(
            site=site,
            ops=self.ops,
            cost=cost,
            plates=self.plates,
            indices=self.indices,
            state=state or {},
            score_squared=squares,
            predict=_nothing_to_predict if nothing else predict,  # type: ignore[arg-type]
            peers=self.peers,
            sites=sites,
        )

    def _subtracted(self, part: Baseline, terms: BaselineTerms, value: Array, site: str | None = None) -> Array:
        """Return what a part leaves of the signal in `terms`: that of all sites, or of one."""
        before, shape = terms.cost, tuple(terms.cost.shape)
        value = self.ops.xp.broadcast_to(value, shape) if tuple(value.shape) != shape else value
        signal = before - self.ops.stop_gradient(value)
        if self.record is not None:
            pairs = [(before, signal)] if site else [(before[:, i], signal[:, i]) for i in range(len(self.names))]
            for name, pair in zip([site] if site else self.names, pairs, strict=True):
                self.record.signals.setdefault(name, []).append(pair)
        return part.rescale(terms, signal)

    def _state(self, site: str, key: str, part: Baseline) -> Mapping[str, Array]:
        return self.host.state(site, key) if self.host is not None and part.state_shapes(self.plates) else {}

    def _predicted(self, site: str, key: str, part: Baseline, signal: Array) -> Array:
        """Return the output of a baseline's network or function, which fits the site's costs."""
        assert self.host is not None
        return fitted(self.ops, part, site, self.host.predict(site, key, part), tuple(signal.shape), self.plates)

    def _predictions(self, key: str, part: Baseline, signal: Array) -> Array:
        """Return the outputs of the networks or functions of all sites, which broadcast to (particles, sites, *plates)."""
        assert self.host is not None
        xp, shape = self.ops.xp, tuple(signal.shape)
        together = self.host.predict_all(self.names, key, part)
        one = (shape[0], *shape[2:])
        if together is not None:
            found = (together.shape[0], *(1,) * (len(shape) - len(together.shape)), *together.shape[1:])
            return xp.moveaxis(xp.reshape(together, found), 0, 1)
        values = [self._predicted(name, key, part, signal[:, i]) for i, name in enumerate(self.names)]
        return xp.stack([xp.broadcast_to(value, one) for value in values], axis=1)


def _nothing_to_predict() -> Array:
    raise TypeError("A baseline with a network or a function needs a host that holds it.")


def _one_square(square: Square) -> Callable[[], Array]:
    def compute() -> Array:
        if square is None:
            raise BaselineError("The score's square is not available at this site.")
        return square()

    return compute


def _stacked_squares(ops: Ops, squares: Sequence[Square]) -> Callable[[], Array]:
    return lambda: ops.xp.stack([_one_square(square)() for square in squares], axis=1)
