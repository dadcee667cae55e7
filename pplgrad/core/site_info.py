"""What is known of a latent site when an estimator or a baseline is bound to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pplgrad.core.objectives import ELBO, MultiSample, Objective


@dataclass(frozen=True)
class SiteInfo:
    """What is known of a latent site when an estimator is bound to it.

    `categories` is the number of values of each element where they are finitely many, else None; `scanned` says
    whether the site is one step of a loop that the host compiles, `relaxable` whether it is Bernoulli or one-hot;
    `elements` is the number of independent elements that share their downstream cost, as far as the host knows;
    `objective` is what the estimates are the gradient of, by derivatives of every order with `higher_order`; `reach` is the number
    of elements with those of all plates, which share a downstream cost at most.
    """

    name: str
    distribution: str
    has_rsample: bool
    is_discrete: bool
    particles: int
    categories: int | None = None
    scanned: bool = False
    relaxable: bool = False
    elements: int = 1
    objective: Objective = field(default_factory=ELBO)
    reach: int = 1
    higher_order: bool = False

    @property
    def combined(self) -> int:
        """The number of particles whose importance weights one value of the objective combines; 0 for a sum of costs."""
        return self.objective.combined(self.particles) if isinstance(self.objective, MultiSample) else 0
