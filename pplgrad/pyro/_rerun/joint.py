"""The program run again at joint values of several sites, with the gradient of everything in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pplgrad.core.alternatives import Values
from pplgrad.core.array_ops import bounded, is_possible
from pplgrad.engine.branches import chunks
from pplgrad.engine.joint_sums import JointRows, Request, another_number, places_of
from pplgrad.pyro._array_ops import OPS, placed
from pplgrad.pyro._distributions import counted_parts, every_log_prob, is_vector, unmasked, values_of
from pplgrad.pyro._recording import moved_generators
from pplgrad.pyro._rerun.branches import PyroBranches
from pplgrad.pyro._rerun.interventions import Fresh, Replace, deep, joined
from pplgrad.pyro._tracing.host_checks import at_other_values


@dataclass(frozen=True)
class _Part:
    """The rows `start` to `stop` of each particle, in which the sites of the sum of this number take joint values."""

    number: int
    values: Mapping[str, Values]
    start: int
    stop: int

    def between(self, first: int, last: int) -> _Part:
        """Return the part of these rows in a chunk of all rows, and its place in the chunk."""
        start, stop = (min(max(at, first), last) for at in (self.start, self.stop))
        skipped = start - self.start

        def shifted(values: Values) -> Values:
            return Values(stop - start, lambda numbers: values.at(numbers + skipped))

        moved = {name: shifted(values) for name, values in self.values.items()}
        return _Part(self.number, moved, start - first, stop - first)


_Scores = dict[tuple[int, str], torch.Tensor]
"""log q of a site in the rows of a sum, by the sum's number and the site."""


class PyroReruns(PyroBranches):
    """`pplgrad.engine.surrogate.Rerun` for one run of a program: its branches, and rows of joint values."""

    def joint_rows(self, requests: Sequence[Request]) -> list[JointRows]:
        """Run the program at the joint values of each sum."""
        places = places_of(requests)
        parts = [_Part(number, requests[number], *rows) for number, rows in enumerate(places)]
        label = next(iter(requests[0]))
        if not self._compared:
            self._compare_second_run(label)
        self._refuse_hidden_draws(label)
        if self._depth is None:
            return [self._each(part) for part in parts]
        return self._together(parts, places[-1][1], self._depth)

    def _each(self, part: _Part) -> JointRows:
        """Run the rows of a sum one after the other, each from the state of the generator in which the primary run began."""
        label = next(iter(part.values))
        costs, scores = [], []
        with moved_generators(), torch.random.fork_rng(devices=self._traces.rng_devices()):
            for row in range(part.stop - part.start):
                with moved_generators():
                    self._traces.restore_rng()
                own: _Scores = {}
                with at_other_values(label, self._traces.estimators[label]):
                    traces = self._run(self._in_one(part, row, own), None, 1, None)
                    costs.append(self._costs(*traces, label))
                scores.append(own)
        every = [torch.cat(column)[None] for column in zip(*costs, strict=True)]
        names = part.values
        return JointRows(every, {n: torch.cat([row[part.number, n] for row in scores])[None] for n in names})

    def _in_one(self, part: _Part, row: int, scores: _Scores) -> Replace:
        nodes = self._traces.guide.nodes

        def replace(name: str, fresh: Fresh, fn: Any) -> torch.Tensor:
            drawn = self._drawn(name, fresh)
            if name in part.values:
                numbers = part.values[name].at(placed([row], None, drawn.device))[0]
                value, log_q = self._at(name, fn, numbers, drawn[None])
                scores[part.number, name] = log_q
                return value[0]
            return drawn if self._follows_any(name, part) else nodes[name]["value"]

        return replace

    def _together(self, parts: Sequence[_Part], count: int, depth: int) -> list[JointRows]:
        """Run the rows of all sums in one plate, chunk by chunk."""
        costs, scores = [], []
        with moved_generators():
            for first, last in chunks(count, self._at_most):
                mine = [part.between(first, last) for part in parts]
                own: _Scores = {}
                replace = self._in_rows([part for part in mine if part.start < part.stop], last - first, depth, own)
                costs.append(self._costs_of_rows(replace, None, last - first, depth, next(iter(parts[0].values))))
                scores.append(own)
        every = [torch.cat(column, 1) for column in zip(*costs, strict=True)]
        return [
            JointRows(
                [x[:, part.start : part.stop] for x in every],
                {
                    name: torch.cat([own[part.number, name] for own in scores if (part.number, name) in own], 1)
                    for name in part.values
                },
            )
            for part in parts
        ]

    def _in_rows(self, parts: Sequence[_Part], count: int, depth: int, scores: _Scores) -> Replace:
        def replace(name: str, fresh: Fresh, fn: Any) -> torch.Tensor:
            drawn = self._drawn(name, fresh)
            drawn = drawn.reshape(self._particles, count, *drawn.shape[1:])
            kept = self._kept(name, fn.event_dim, depth)
            pieces = []
            for part in parts:
                rows = slice(part.start, part.stop)
                piece = drawn[:, rows]
                if name in part.values:
                    values = part.values[name]
                    numbers = deep(values.at(torch.arange(values.count, device=kept.device)), _counted(fn), depth)
                    piece, scores[part.number, name] = self._at(name, fn, numbers, piece, (count, rows))
                elif not self._follows_any(name, part):
                    piece = kept
                pieces.append(piece.expand(-1, part.stop - part.start, *piece.shape[2:]))
            return joined(pieces, self._particles)

        return replace

    def _drawn(self, name: str, fresh: Fresh) -> torch.Tensor:
        """Return what a site drew in the rows, a constant where its estimator asks for that."""
        return self._constant_if_scored(name, fresh(None))  # type: ignore[arg-type]

    def _follows_any(self, site: str, part: _Part) -> bool:
        return any(self._follows(site, chosen) for chosen in part.values)

    def _at(
        self, name: str, fn: Any, numbers: torch.Tensor, drawn: torch.Tensor, among: tuple[int, slice] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values with these category numbers, (particles, rows, *batch, *N), and log q of them, (particles, rows, *batch).

        An impossible value keeps what was drawn in its row, so that the program never runs at it; `bounded` makes its probability 0.
        `among` says which of how many rows these are, where the distribution is that of all.
        """
        found = counted_parts(unmasked(fn))
        known = self.draw(name)._counted
        if found is None or known is None or len(found[1]) != len(known[1]):
            raise another_number(name)
        base, support = found
        vector = is_vector(base)
        log_probs = every_log_prob(base, support)
        if among is None:
            log_probs = log_probs[None]
        else:
            count, rows = among
            log_probs = log_probs.expand(self._particles * count, *log_probs.shape[1:])
            log_probs = log_probs.reshape(self._particles, count, *log_probs.shape[1:])[:, rows]
        log_probs = bounded(OPS.xp, log_probs)
        shape = drawn.shape[:-1] if vector else drawn.shape
        numbers = numbers.expand(shape)
        log_q = log_probs.expand(*shape, -1).gather(-1, numbers[..., None])[..., 0]
        can = is_possible(OPS.xp, log_q)
        value = values_of(base, support, numbers, drawn)
        value = torch.where(can[..., None] if vector else can, value, drawn)
        events = _counted(fn)
        return value, log_q.sum(tuple(range(-events, 0))) if events else log_q


def _counted(fn: Any) -> int:
    """Return how many event dimensions hold elements: all, but for a vector that is one value."""
    found = counted_parts(unmasked(fn))
    return fn.event_dim - (1 if found is not None and is_vector(found[0]) else 0)
