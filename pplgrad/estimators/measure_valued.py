"""Measure-valued derivatives: the derivative of a density as the difference of two densities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import EstimatorError
from pplgrad.estimators.local_expectation import LocalExpectation
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.site_requirements import require_steps

_FAMILIES = ("Poisson", "Normal", "Gamma")


@dataclass(frozen=True)
class MeasureValued(Estimator):
    r"""The measure-valued (weak) derivative: a constant times the difference of expected costs under two other distributions.

    Estimates ∂/∂λ E_q[f(x)] = c_λ (E_{q+}[f(x)] − E_{q−}[f(x)]) for each element and each parameter λ, with coupled draws of q+
    and q−:

    - Poisson rate: c = 1, with x + 1 against x.
    - Normal mean: c = 1/(σ√(2π)), with μ + σw against μ − σw, where w ~ Rayleigh(1).
    - Normal standard deviation: c = 1/σ, with μ + σm against μ + σmu, where m is double-sided Maxwell and u is uniform.
    - Gamma rate β: c = α/β, with x against x + e/β, where e ~ Exponential(1). The concentration α has no such pair in closed form
      and uses the score function.
    - Finitely many values: one value against the draw, which is `LocalExpectation`.

    Shapes:
        Elements are the entries of `to_event`, of batch dimensions that no plate declares, and of plates that a downstream cost
        does not have. Evaluations of the program for each element: Poisson 1, Normal 4, Gamma 1. Costs are in nats.

    Assumptions:
        The cost is finite at both coupled draws, and the difference of the two costs has a finite second moment. One of the coupled draws
        may lie outside the support of the site (1 for a Poisson of rate 0). The cost may be discontinuous. At a site with finitely
        many values, values of probability 0 contribute zero.

    Raises:
        EstimatorError: on a site of another family, or that is drawn inside a `scan` in the body of another one.

    Example:
        >>> MeasureValued().declaration.differentiable_costs
        False

    References:
        Mohamed, Rosca, Figurnov and Mnih (2020), section 6, table 1 and section 6.3 (coupling).
    """

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="finitely many values, Poisson, Normal, Gamma",
        evaluations="elements × 1 to 4",
        differentiable_costs=False,
        derivatives=1,
        source="Mohamed et al. 2020",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def check(self, site: SiteInfo) -> None:
        """Refuse a family without a known pair of distributions."""
        require_steps(self, site)
        if site.categories is None and site.distribution not in _FAMILIES:
            raise EstimatorError(
                f"MeasureValued() cannot be used at site '{site.name}': {site.distribution} is not among Poisson, Normal, "
                f"Gamma and the distributions with finitely many values; {remedy(site)}"
            )

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the coupled draws of each element's pairs of distributions, the other elements as they are."""
        if draw.is_finite:
            return LocalExpectation().alternatives(draw)
        ops, names = draw.ops, draw.parameters
        fixed = {name: ops.stop_gradient(x) for name, x in names.items()}
        if "loc" in names:
            others = _normal(draw, fixed["loc"], fixed["scale"])
        elif "concentration" in names:
            others = [draw.value - ops.xp.log(_uniform(draw)) / fixed["rate"]]
        else:
            others = [draw.value + 1]
        return Alternatives(draw.changed_one_by_one(ops.xp.stack(others, axis=1)))

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ_d Σ_λ λ_d c_λ (f(x+) − f(x−))."""
        draw, ops, xp = terms.draw, terms.ops, terms.ops.xp
        if draw.is_finite:
            return LocalExpectation().branch_surrogate(terms)
        names, elements = draw.parameters, draw.value.shape[-1]
        # (particles, alternatives of an element, *plates, elements)
        costs = xp.reshape(terms.costs, (terms.costs.shape[0], elements, -1, *terms.costs.shape[2:]))
        costs = xp.moveaxis(costs, 1, -1)
        own = terms.downstream[..., None]
        if "loc" in names:
            scale = ops.stop_gradient(names["scale"])
            mean = (costs[:, 0] - costs[:, 1]) / (scale * (2 * xp.pi) ** 0.5)
            return xp.sum(names["loc"] * mean + names["scale"] * (costs[:, 2] - costs[:, 3]) / scale)
        if "concentration" in names:
            shape, rate = ops.stop_gradient(names["concentration"]), ops.stop_gradient(names["rate"])
            # What the score has for the rate is taken out again: the pair gives that part.
            by_score = names["rate"] * (shape / rate - draw.value) * own
            return xp.sum(draw.score * terms.downstream) + xp.sum(
                names["rate"] * (shape / rate) * (own - costs[:, 0]) - by_score
            )
        return xp.sum(names["rate"] * (costs[:, 0] - own))


def _normal(draw: Draw, loc: Array, scale: Array) -> list[Array]:
    """Return the four coupled draws of a Normal: Rayleigh steps up and down, Maxwell, and Maxwell times a uniform."""
    xp = draw.ops.xp
    step = scale * xp.sqrt(-2 * xp.log(_uniform(draw)))
    normal = xp.sqrt(-2 * xp.log(_uniform(draw))) * xp.cos(2 * xp.pi * _uniform(draw))
    maxwell = xp.sqrt(-2 * xp.log(_uniform(draw)) + normal**2)
    maxwell = scale * xp.where(_uniform(draw) < 0.5, maxwell, -maxwell)
    return [loc + step, loc - step, loc + maxwell, loc + maxwell * _uniform(draw)]


def _uniform(draw: Draw) -> Array:
    return draw.noise.uniform(tuple(draw.value.shape), draw.score)
