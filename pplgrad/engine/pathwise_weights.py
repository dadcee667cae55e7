"""The score in the importance weights, reparameterized: what doubly reparameterized sites add to the surrogate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.shapes import to_shape
from pplgrad.core.sites import Run
from pplgrad.engine.layout import Layout
from pplgrad.engine.signals import Bounds
from pplgrad.errors import EstimatorError


class PathHost(Protocol):
    """The part of a plug-in that differentiates a program with respect to its draws."""

    def path_slopes(
        self, run: Run, sites: Sequence[str], weigh: Callable[[list[Array], list[Array]], Array]
    ) -> list[tuple[Array, Array]]:
        """Return the values of sites with their gradient, and the derivative with respect to them of `weigh(costs, scores)`."""


def path_terms(ops: Ops, layout: Layout, run: Run, bounds: Bounds, number: int, host: PathHost) -> Array | None:
    """Return −Σ (∂w̃/∂z) z over the sites of a run that ask for it, with ∂w̃/∂z as a constant, or None if none does.

    Where discrete sites follow, w̃ stands for its mean over them, whose derivative holds their score as well.
    """
    names = [site.name for site in layout.sites if site.estimator.reweights_path]
    if not names:
        return None
    for site in layout.sites:
        above = [name for name in names if name in layout.ancestors.get(site.name, {})]
        if above and site.estimator.uses_branches and not site.estimator.uses_score:
            raise EstimatorError(
                f"Site '{site.name}' follows site '{above[0]}', whose DReG() differentiates the mean over what follows, and {site.estimator!r} "
                f"has no score that this mean could be differentiated with; use ScoreFunction() at '{site.name}', or Reparam() at '{above[0]}'."
            )
    shares, rates = bounds.share_rates(number)

    def weigh(costs: list[Array], scores: list[Array]) -> Array:
        total = ops.xp.sum(rates * bounds.log_weights(number, costs))
        for site, score in zip(layout.sites, scores, strict=True):
            if site.estimator.uses_score:
                total = total + ops.xp.sum(shares * to_shape(ops, score, layout.weight_shape))
        return total

    found = host.path_slopes(run, names, weigh)
    terms = [ops.xp.sum(ops.stop_gradient(slope) * value) for value, slope in found]
    return -sum(terms[1:], terms[0])
