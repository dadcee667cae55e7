"""The plates whose elements have importance weights of their own, under an objective that combines particles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pplgrad.core.plates import Plate, Read
from pplgrad.core.sites import CostSpec, SiteSpec
from pplgrad.errors import ConfigurationError, ProgramError

if TYPE_CHECKING:
    from pplgrad.core.objectives import MultiSample


def weight_plates(
    sites: Sequence[SiteSpec], costs: Sequence[CostSpec], depends: Sequence[dict[str, Read]], objective: MultiSample
) -> tuple[Plate, ...]:
    """Return the plates that all latent sites share, or those of them that the objective names; refuse what is ambiguous."""
    shared = _shared(sites)
    if objective.plates is None:
        chosen = shared
        for site in sites if not shared else ():
            for plate in site.plates:
                if not plate.time:
                    outside = next(other.name for other in sites if plate not in other.plates)
                    raise ProgramError(
                        f"Site '{outside}' is shared by the elements of plate '{plate.name}', in which site '{site.name}' "
                        f"stands, so that no element has an importance weight of its own under {objective!r}; pass "
                        "plates=() to weigh the program as a whole, or use the ELBO."
                    )
    else:
        chosen = tuple(plate for plate in shared if plate.name in objective.plates)
        for name in objective.plates:
            if all(plate.name != name for plate in chosen):
                known = ", ".join(f"'{plate.name}'" for plate in shared) or "none"
                raise ConfigurationError(
                    f"{objective!r} names plate '{name}', which not all latent sites share; the plates that they share: {known}."
                )
    for cost, reads in zip(costs, depends, strict=True):
        for plate in chosen:
            if reads and plate not in cost.plates:
                raise ProgramError(
                    f"Site '{cost.name}' stands outside of plate '{plate.name}' and depends on its elements, so that these have "
                    f"no importance weights of their own under {objective!r}; pass plates=() to weigh the program as a whole."
                )
            mixed = next((name for name, read in reads.items() if read.mixes(plate)), None)
            if mixed is not None:
                raise ProgramError(
                    f"An element of site '{cost.name}' in plate '{plate.name}' depends on other elements of site '{mixed}' than its "
                    f"own, so that they have no importance weights of their own under {objective!r}; pass plates=() to weigh the "
                    "program as a whole."
                )
    return chosen


def _shared(sites: Sequence[SiteSpec]) -> tuple[Plate, ...]:
    if not sites:
        return ()
    return tuple(p for p in sites[0].plates if not p.time and all(p in other.plates for other in sites))
