"""The information about a latent site that is known when an estimator or a baseline is bound to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pplgrad.core.objectives import ELBO, MultiSample, Objective


@dataclass(frozen=True)
class SiteInfo:
    """The information about a latent site that is known when an estimator or a baseline is bound to it.

    Attributes:
        name: the name of the site.
        distribution: the name of the distribution's family.
        has_rsample: whether the distribution has a reparameterized sampler.
        is_discrete: whether the distribution is discrete.
        particles: the number of particles.
        categories: the number of values of each element if it is finite, else None.
        scanned: whether the site is one step of a loop that the host compiles, or drawn in a branch that it compiles.
        relaxable: whether the site is Bernoulli or one-hot.
        elements: the number of independent elements that share their downstream cost, as far as the host knows.
        objective: the objective whose gradient is estimated.
        reach: the largest number of elements that can share a downstream cost: the elements together with those of all plates.
        higher_order: whether derivatives of every order are estimated.
        nested: whether that loop is itself a step of another one.
        is_count: whether each element is one whole number, 0 or more, of a distribution that is not a choice among categories.
        components: of a mixture whose components have locations and scales, their number, else None.
        conditionals: whether the entries of such a component are independent, so that conditional distribution functions are known.
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
    nested: bool = False
    is_count: bool = False
    components: int | None = None
    conditionals: bool = False

    @property
    def combined(self) -> int:
        """The number of particles whose importance weights one value of the objective combines; 0 for a sum of costs."""
        return self.objective.combined(self.particles) if isinstance(self.objective, MultiSample) else 0
