"""The score function at a draw and at its mirror image: the estimator of evolution strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import EstimatorError
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.site_requirements import require_steps


@dataclass(frozen=True)
class Mirrored(Estimator):
    r"""Mirrored sampling, as in evolution strategies: the mean of two score-function gradients, at a draw and at its mirror image.

    Estimates ∇θ E_q[f(x)] = E_q[½ f(x) ∇θ log q(x) + ½ f(x') ∇θ log q(x')]. x' = 2μ − x is the mirror image of x about the mean, and
    has the same distribution as x. For the mean μ of a normal site the estimate is ½ (f(x) − f(x')) (x − μ)/σ². Every component
    of the cost that is even about μ, including a constant, cancels there. For the scale nothing cancels, so the cost should be
    centred.

    Shapes:
        A Normal of any batch and event shape. Entries of an event, and of batch dimensions that no plate declares, are mirrored
        together, at one further evaluation of the program. Elements of a plate are credited individually. Costs are in nats.

    Assumptions:
        The site is Normal, so that its density is symmetric about the mean. The cost is finite at the mirror image as well, and has
        a finite second moment.

    Raises:
        EstimatorError: on a site of another family, or that is drawn inside a `scan` in the body of another one.

    Example:
        >>> Mirrored().declaration.evaluations
        1

    References:
        Salimans, Ho, Chen, Sidor and Sutskever (2017), section 2.1.
        Brockhoff, Auger, Hansen, Arnold and Hohm (2010).
    """

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="Normal",
        evaluations=1,
        differentiable_costs=False,
        derivatives=1,
        source="Salimans et al. 2017",
    )
    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True

    def check(self, site: SiteInfo) -> None:
        """Refuse a family that is not symmetric about a known mean."""
        require_steps(self, site)
        if site.distribution != "Normal":
            raise EstimatorError(
                f"Mirrored() cannot be used at site '{site.name}': {site.distribution} is not Normal; {remedy(site)}"
            )

    def alternatives(self, draw: Draw) -> Alternatives:
        """Return the mirror image of the draw."""
        image = 2 * draw.ops.stop_gradient(draw.parameters["loc"]) - draw.value
        return Alternatives(draw.place(image[:, None]), kept=image)

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return ½ f(x) log q(x) + ½ f(x') log q(x')."""
        ops, xp, draw = terms.ops, terms.ops.xp, terms.draw
        loc, scale = draw.parameters["loc"], draw.parameters["scale"]
        image = ops.stop_gradient(terms.alternatives.kept)
        score = -xp.sum(0.5 * ((image - loc) / scale) ** 2 + xp.log(scale), axis=-1)
        return 0.5 * xp.sum(draw.score * terms.downstream + score * terms.costs[:, 0])
