"""The exact sum over all values of a site, and over all joint values of sites that meet in a cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pplgrad.core.estimator import Declaration, Estimator
from pplgrad.core.objectives import MultiSample
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.site_requirements import require_finite


@dataclass(frozen=True)
class Enumerate(Estimator):
    r"""The exact sum over the values of all sites that have it, given the draws of the other sites.

    Computes Σ_z ∇[q(z) f(z)], with q(z) = Π_i q_i(z_i | what z_i reads), for each log density f by itself: over the joint values of those
    `Enumerate()` sites that f depends on. The value of the objective is Σ_z q(z) f(z). Both have no variance where every site of the
    guide has it. `LocalExpectation` sums over the values of one site, at the draws of the others. Guide sites with the hosts'
    `infer={"enumerate": "parallel"}` or `"sequential"` have `Enumerate()` if nothing else is named.

    A site that follows one of these is drawn again at each joint value (in NumPyro, and in Pyro without `vectorize_particles`, with the
    noise of its draw). A site that does not keeps its draw. The score term of a site in front of them gets the summed cost; that of a
    site that follows them gets the cost of the draw.

    Args:
        limit: the maximal number of joint values of one sum. Default: 4096.

    Shapes:
        Elements are the entries of `to_event`, of batch dimensions that no plate declares, and of plates that a downstream cost does not
        have, or along which it mixes. A site has categories^elements values. All elements of the other plates change at once. A sum over
        m joint values needs m − 1 evaluations of the program, and costs that depend on the same sites share it. Sums are added up, they
        do not multiply: two sites that meet in no cost have two sums. Costs are in nats.

    Assumptions:
        The cost is finite at every joint value of positive probability. At values of probability 0 the program is never run. The number
        of values does not depend on other sites.

    Raises:
        ConfigurationError: `limit` is not a positive number.
        EstimatorError: on a site without finitely many values, or that is drawn inside a `scan` or `cond`; under an objective that combines
            particles; under `higher_order=True` where a site with a score term follows; a sum has more joint values than `limit`.

    Example:
        >>> Enumerate().declaration.unbiased
        True

    References:
        Obermeyer et al. (2019), for tensor variable elimination in Pyro.
        Titsias and Lázaro-Gredilla (2015), for one site.
    """

    limit: int = 4096
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="finitely many values",
        evaluations="joint values − 1",
        differentiable_costs=False,
        derivatives=None,
        source="Obermeyer et al. 2019",
    )
    uses_score: ClassVar[bool] = True
    enumerates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.limit, int) or isinstance(self.limit, bool) or self.limit < 1:
            raise ConfigurationError(f"Enumerate(limit={self.limit!r}): give a number of joint values, 1 or more.")

    def check(self, site: SiteInfo) -> None:
        """Refuse a site without finitely many values, and an objective that is no sum of costs."""
        require_finite(self, site)
        if isinstance(site.objective, MultiSample):
            raise EstimatorError(
                f"{self!r} cannot be used at site '{site.name}' under {site.objective!r}, which combines the weights of particles, so that its "
                f"exact sum would be over the joint values of all of them; {remedy(site, 'LocalExpectation')}"
            )
