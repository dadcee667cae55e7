"""A site of the guide's trace, as estimators see it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from pplgrad.core.draw import Finite
from pplgrad.core.mixtures import Mixture
from pplgrad.pyro._distributions import (
    counted_parts,
    counts,
    every_log_prob,
    is_bernoulli,
    is_vector,
    log_odds,
    number_of,
    parameters,
    ranking_logits,
    throws,
    unmasked,
    values_of,
)
from pplgrad.pyro._mixtures import components, mixture


class PyroDraw:
    """`pplgrad.engine.branches.HostDraw`: a site of the guide's trace."""

    def __init__(self, name: str, site: Any, vectorized: bool) -> None:
        self.name = name
        self.event_dim = site["fn"].event_dim
        self._fn = unmasked(site["fn"])
        self._vectorized = vectorized
        self.value = self._with_particles(site["value"].detach())
        self.is_vector = is_vector(self._fn)

    @cached_property
    def _counted(self) -> tuple[Any, torch.Tensor] | None:
        # Listing the values may read how many there are, which a recorded step cannot always do: only where they are needed.
        return counted_parts(self._fn)

    def finite(self) -> Finite | None:
        """Return the numbers drawn, and how probable each was."""
        if self._counted is None:
            return None
        base, support = self._counted
        value = self.value if self._vectorized else self.value[0]
        index = number_of(base, support, value)
        has_odds = is_bernoulli(base)
        return Finite(
            self._with_particles(index),
            len(support),
            lambda: self._with_particles(every_log_prob(base, support).expand(*index.shape, -1)),
            (lambda: self._with_particles(log_odds(base).expand(index.shape))) if has_odds else None,
        )

    def embed(self, index: torch.Tensor) -> torch.Tensor:
        """Return the values that category numbers stand for."""
        assert self._counted is not None
        base, support = self._counted
        return values_of(base, support, index, self.value)

    def again(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return more draws from the same distribution, and their log densities."""
        with torch.no_grad():
            values = self._fn.sample((count,))
        log_q = self._fn.log_prob(values)
        if self._vectorized:
            return values.movedim(0, 1), log_q.movedim(0, 1)
        return values[None], log_q[None]

    def parameters(self) -> dict[str, torch.Tensor] | None:
        """Return the parameters of the site's family, where its draws are independent numbers."""
        found = parameters(self._fn)
        return None if found is None else {name: self._with_particles(x) for name, x in found.items()}

    def ranking(self) -> torch.Tensor | None:
        """Return the logits of a ranking."""
        logits = ranking_logits(self._fn)
        return None if logits is None else self._with_particles(logits)

    def counts(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return consecutive counts around the mean, their log probabilities, and that of the draw."""
        first, log_probs, own = counts(self._fn, self.value if self._vectorized else self.value[0], count)
        return self._with_particles(first), self._with_particles(log_probs), self._with_particles(own)

    def throws(self) -> torch.Tensor | None:
        """Return log p of the categories of a Multinomial, or None."""
        found = throws(self._fn, self.value if self._vectorized else self.value[0])
        return None if found is None else self._with_particles(found)

    def mixture(self) -> Mixture | None:
        """Return the mixture that the value was drawn from, or None."""
        if components(self._fn) is None:
            return None
        found = mixture(self._fn, self.value if self._vectorized else self.value[0])
        return found.mapped(lambda x, behind: self._with_particles(x))

    def _with_particles(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._vectorized else x[None]
