"""What stands around a run of a branch: values in the place of draws, and what follows them drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pplgrad.core.alternatives import Values
from pplgrad.core.estimator import Estimator
from pplgrad.errors import EstimatorError
from pplgrad.estimators.mixtures import MixturePath
from pplgrad.estimators.relaxed import Relaxation
from pplgrad.pyro._distributions import family, is_matrix, is_relaxable
from pplgrad.pyro._tracing.handlers import axes_of, moved
from pplgrad.pyro._tracing.provenance import Provenance
from pplgrad.pyro._tracing.relaxations import Extended, relaxed, softened, unchecked


@dataclass(frozen=True)
class Branch:
    """One site's part of the branches: rows `start` to `stop` of each particle take its alternatives.

    Its costs are `differentiated` along the parameters if that is asked for: what does not follow the site then has its gradient too.
    """

    site: str
    values: Values
    start: int
    stop: int
    differentiated: bool = False

    def between(self, first: int, last: int) -> Branch:
        """Return the part of the branch in a chunk of all rows, its place in the chunk and its alternatives there."""
        start, stop = (min(max(at, first), last) for at in (self.start, self.stop))
        values = self.values.between(start - self.start, stop - self.start)
        return replace(self, values=values, start=start - first, stop=stop - first)


Fresh = Callable[[Branch], torch.Tensor]
"""From a branch to the value that a site drew there: as it was drawn, or relaxed as the branch's estimator asks."""


Replace = Callable[[str, Fresh, Any], torch.Tensor]
"""From a site's name, its draw and its distribution to the value that it takes."""


class Intervention(Messenger):
    """Puts alternatives in the place of draws, keeps the primary draw of what does not follow, and shares the minibatch.

    Values are replaced after the draw, so that the generator goes on as in the primary run. With `temperatures` (by the branch's site)
    discrete sites are relaxed, and their densities extended to weights.
    """

    def __init__(
        self,
        primary: Any,
        replace: Replace | None = None,
        estimators: Mapping[str, Estimator] | None = None,
        temperatures: Mapping[str, Any] | None = None,
        arguments: tuple[tuple, Mapping[str, Any]] = ((), {}),
        provenance: Provenance | None = None,
    ) -> None:
        super().__init__()
        self._arguments = arguments
        self._provenance = provenance
        self._primary = primary
        self._replace = replace
        self._estimators = estimators or {}
        self._temperatures = temperatures

    def _pyro_sample(self, msg: Any) -> None:
        if self._provenance is not None:
            self._provenance.drawing = True
        if site_is_subsample(msg) and not msg["done"] and msg["name"] in self._primary.nodes:
            msg["value"], msg["done"] = self._primary.nodes[msg["name"]]["value"], True
            if self._provenance is not None:
                self._provenance.give(msg["value"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._provenance is not None:
            self._provenance.drawing = False
        if self._replace is None or site_is_subsample(msg) or msg["is_observed"]:
            return
        name, fn, drawn = msg["name"], msg["fn"], msg["value"]
        estimator = self._estimators.get(name)
        fresh: Fresh = lambda branch: drawn  # noqa: E731
        if isinstance(estimator, Relaxation):
            drawn, msg["fn"] = relaxed(name, fn, drawn, estimator.at(*self._arguments))
        elif isinstance(estimator, MixturePath) and torch.is_grad_enabled() and self._temperatures is None:
            along = moved(fn, drawn, estimator)
            fresh = lambda branch: along  # noqa: E731
        elif self._temperatures is not None and is_relaxable(fn):
            temperatures = self._temperatures
            fresh = lambda branch: softened(name, fn, drawn, temperatures[branch.site])  # noqa: E731
            msg["fn"] = Extended(fn)
        elif self._temperatures is not None and not fn.has_rsample:
            if is_matrix(fn):
                msg["fn"] = unchecked(fn)
            fresh = lambda branch: _unrelaxable(name, fn, branch)  # noqa: E731
        msg["value"] = self._replace(name, fresh, fn)
        if self._provenance is not None:
            plates = axes_of(msg["cond_indep_stack"], fn.event_dim)
            msg["value"] = self._provenance.tag(name, msg["value"], plates)


def deep(value: torch.Tensor, event: int, depth: int) -> torch.Tensor:
    """Bring (particles, m, *B, *E) to as many batch dimensions as the particle plate asks for."""
    batch, shape = value.dim() - 2 - event, tuple(value.shape)
    return value.reshape(*shape[:2], *(1,) * (depth - 1 - batch), *shape[2:])


def joined(parts: Sequence[torch.Tensor], particles: int) -> torch.Tensor:
    """Join values of rows, (particles, m, *batch), as those of one plate: (rows, *batch)."""
    shape = torch.broadcast_shapes(*(part.shape[2:] for part in parts))
    return torch.cat([part.expand(particles, -1, *shape) for part in parts], 1).reshape(-1, *shape)


def _unrelaxable(name: str, fn: Any, branch: Branch) -> torch.Tensor:
    raise EstimatorError(
        f"Site '{name}' follows site '{branch.site}', whose estimator relaxes what follows, and {family(fn)} cannot be "
        f"relaxed; use ScoreFunction() or LocalExpectation() at '{branch.site}'."
    )
