"""The costs differentiated at every draw that an estimator evaluates, where each has the law of the program's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.core.sites import Run
from pplgrad.engine.layout import Layout
from pplgrad.errors import EstimatorError, ProgramError


def at_every_draw(ops: Ops, layout: Layout, run: Run, found: Mapping[str, Sequence[Array]]) -> Array:
    """Return Σ_b F_b/(1 + M) − M/(1 + M) F, summed over particles: added to F it is the mean of the costs at all draws.

    F is the sum of all costs of the run, F_b that of branch b, M the number of branches of a particle. A branch takes another draw of a site,
    with the law of the program's own given what comes before, and what follows is drawn again: all draws of a branch together have the
    law of the guide, and ∇F_b the mean of ∇F. `found` holds the costs of the branches by site, with their gradient.
    """
    scored = {site.name for site in layout.sites if site.estimator.uses_score}
    # E[∇ log q] = 0 for a draw that is scored. What is held here is differentiated at the program's own draw alone, in F.
    held = [cost.sign < 0 and not cost.closed and cost.name in scored for cost in layout.costs]

    def total(costs: Sequence[Array]) -> Array:
        parts = [
            spec.sign * ops.xp.sum(ops.stop_gradient(x) if constant else x)
            for spec, x, constant in zip(layout.costs, costs, held, strict=True)
        ]
        return sum(parts[1:], parts[0])

    others = sum(costs[0].shape[0] for costs in found.values()) // run.particles
    return (sum(total(costs) for costs in found.values()) - others * total(run.costs)) / (1 + others)


def refuse_other_sites(layout: Layout, site: str, names: Iterable[str]) -> None:
    """Refuse a branch of a site whose costs are differentiated, if there are sites that the branch alone has or lacks."""
    for name in sorted(names):
        estimator = next(spec.estimator for spec in layout.sites if spec.name == site)
        raise ProgramError(
            f"Site '{name}' exists or not depending on the value of site '{site}', where {estimator!r} differentiates the costs at other draws "
            f"too; use differentiate='own' at '{site}'."
        )


def refuse_differentiated(layout: Layout, objective: Objective | None) -> None:
    """Refuse to differentiate at all draws under an objective that is no sum of costs, or beside sites that are summed over."""
    for site in layout.sites:
        if not site.estimator.differentiates_all:
            continue
        if isinstance(objective, MultiSample):
            reason = (
                f"{objective!r} combines several particles, and its derivative at another draw is not one of its own"
            )
        elif layout.joint_sums:
            summed = next(other.name for other in layout.sites if other.estimator.enumerates)
            reason = f"site '{summed}' is under Enumerate(), which averages the costs at the program's own draw alone"
        else:
            continue
        raise EstimatorError(
            f"{site.estimator!r} at site '{site.name}' asks for the derivative of the costs at all draws, but {reason}; use "
            f"differentiate='own' at '{site.name}'."
        )
