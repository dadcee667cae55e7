"""What is compared with the plain way while a step is watched: a particle by itself, a branch by itself, a second run.

Particles run together, and branches beside them, in a plate to the left of all others. That is right for a program that broadcasts,
and adds them up without an error in one that reduces a whole value (`z.sum()` where a plate's dimension was meant). Branches run the
program's Python again, which is right as long as that computes the same from the same draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample

from pplgrad.engine.layout import Layout
from pplgrad.errors import ProgramError
from pplgrad.pyro._tracing.host_checks import PARTICLES
from pplgrad.pyro._tracing.provenance import Provenance

_AT_MOST = 8


class ParticlesInteract(Exception):
    """Particles or branches that run together meet in the density of a site."""

    def __init__(self, site: str, size_read: str | None = None) -> None:
        super().__init__(site)
        self.site = site
        self.size_read = size_read

    @property
    def message(self) -> str:
        """The text of the warning."""
        if self.size_read is not None:
            return (
                f"The program reads the size of a draw at {self.size_read} (len(z), z.shape, z.numel()), which counts the particles too under "
                "vectorize_particles=True, and draws random numbers outside of its sample sites, so that a particle by itself cannot be "
                "compared. Particles run one by one from here on, which is right and slower; take the size from the plate or the data."
            )
        return (
            f"The log density of site '{self.site}' mixes particles (or branches) that run together under vectorize_particles=True: "
            "something reduces a whole value, such as z.sum() where z.sum(-1) over the plate's own dimension would do. They run one by "
            "one from here on, which is right and slower; name the dimensions, or use vectorize_particles=False."
        )


def unproved(layout: Layout, costs: Sequence[torch.Tensor], provenance: Provenance) -> list[tuple[str, str]]:
    """Return pairs of a cost's site and a draw's whose particles are not known to stay apart on the way from one to the other."""
    found = []
    for spec, x in zip(layout.costs, costs, strict=True):
        for name in provenance.names(provenance.of(x)):
            if provenance.mixed(x, name, [(PARTICLES, -x.dim())]):
                found.append((spec.name, name))
    return found


def refuse_interaction(
    layout: Layout,
    costs: Sequence[torch.Tensor],
    provenance: Provenance,
    alone: Callable[[int], Sequence[torch.Tensor] | None],
) -> None:
    """Raise `ParticlesInteract` where particles, or rows of branches, that run together depend on each other.

    `costs` have shape (rows, *batch). What the operations of the program show to stay apart needs no comparison; what they show to mix
    is refused; where they show nothing, rows are compared with what `alone` computes of one by itself.
    """
    pairs = unproved(layout, costs, provenance)
    for cost, site in pairs:
        if not provenance.is_unsure(site, PARTICLES):
            raise ParticlesInteract(cost)
    rows: Iterable[int] | None = None
    if not (pairs or provenance.escaped_ever):
        # A size that Python reads (`z.numel()`) shows in no operation. What is drawn outside of sites would not be the same again.
        rows = {0, len(costs[0]) - 1} if costs and not provenance.hidden_draws else ()
    if provenance.hidden_draws and provenance.size_read and costs:
        raise ParticlesInteract(layout.costs[0].name, provenance.size_read)
    compare_rows(layout, costs, alone, rows)


def compare_rows(
    layout: Layout,
    costs: Sequence[torch.Tensor],
    alone: Callable[[int], Sequence[torch.Tensor] | None],
    rows: Iterable[int] | None = None,
) -> None:
    """Raise `ParticlesInteract` where one of some rows has other costs than by itself."""
    if rows is None:
        rows = _some(len(costs[0])) if costs else ()
    for row in rows:
        found = alone(row)
        for spec, x, own in zip(layout.costs, costs, found or [], strict=False):
            if not agree(x[row], own):
                raise ParticlesInteract(spec.name)


def _some(count: int) -> Iterable[int]:
    """Return numbers of rows to look at: all, or some from both ends."""
    return range(count) if count <= _AT_MOST else [*range(_AT_MOST // 2), *range(count - _AT_MOST // 2, count)]


def refuse_another_run(
    layout: Layout, before: Sequence[torch.Tensor], again: Sequence[torch.Tensor], chosen: str
) -> None:
    """Refuse a program that computes another density when it runs again on the same draws: its branches would be of another program."""
    for spec, x, y in zip(layout.costs, before, again, strict=True):
        if not agree(x, y):
            raise ProgramError(
                f"Site '{spec.name}' has another density when the program runs again on the same draws: a counter, a cache or random "
                f"numbers of another library move on in its Python code, so that the branches of site '{chosen}' would be those of "
                "another program. Pass what changes as an argument, or use ScoreFunction() there."
            )


def same_branches(
    layout: Layout, chosen: str, followed: Sequence[torch.Tensor], run: Sequence[torch.Tensor], rounding: float
) -> bool:
    """Return whether branches that were followed from the draw are those that were run; warn if they are others.

    `rounding` is that of the coarsest type on the way: a network of single precision may stand before densities of double.
    """
    for spec, x, y in zip(layout.costs, followed, run, strict=True):
        if not agree(x, y, rounding):
            warnings.warn(
                f"Branches of site '{chosen}' that change one element each were followed from the draw, and the density of site '{spec.name}' "
                "is another one where they are run. The program computes something that pplgrad does not see. The branches are run from here on, "
                "which is right and slower; reuse_structure=False does so without this warning.",
                stacklevel=2,
            )
            return False
    return True


def agree(x: torch.Tensor, y: torch.Tensor, rounding: float = 0.0) -> bool:
    """Return whether two densities are the same but for rounding, their own or a coarser one; shapes may differ by dimensions that hold nothing."""
    x, y = x.detach().squeeze(), y.detach().squeeze()
    if x.shape != y.shape:
        try:
            x, y = torch.broadcast_tensors(x, y)
        except RuntimeError:
            x, y = x.sum(), y.sum()
    scale = max(torch.finfo(x.dtype).eps, rounding) ** 0.5 if x.dtype.is_floating_point else 0.0
    size = x.abs()[torch.isfinite(x)]
    within = scale * (1.0 + (float(size.max()) if size.numel() else 0.0))
    return torch.allclose(x, y.to(x.dtype), rtol=scale, atol=within, equal_nan=True)


def values_at(trace: Any, row: int, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Return the values of one row of the draws (of some, by name) of a run in a plate of particles."""
    return {
        name: node["value"][row].detach()
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
        if names is None or name in names
    }
