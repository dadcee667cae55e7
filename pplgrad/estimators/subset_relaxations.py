"""Relaxations of subsets of k items: biased, with the hard draw in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.estimator import Declaration
from pplgrad.core.noise import Noise
from pplgrad.core.site_info import SiteInfo
from pplgrad.core.structures import largest, perturbed_to, subset_marginals
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.relaxed import Relaxation
from pplgrad.estimators.site_requirements import require_unscanned


@dataclass(frozen=True)
class HardSubset:
    """A subset that was drawn, as a binary vector (..., n) with k ones, and the logits (..., n) that it was drawn with."""

    ops: Ops
    logits: Array
    k: int
    value: Array
    noise: Noise


class SubsetRelaxation(Relaxation):
    """Base class of estimators that give the draw of a `Subset` a gradient; `weights` takes a `HardSubset`."""

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is no `Subset`, or drawn inside a scan."""
        if site.distribution != "Subset":
            raise EstimatorError(
                f"{self!r} cannot be used at site '{site.name}': {site.distribution} is no Subset(k, logits); {remedy(site)}"
            )
        require_unscanned(self, site)


def _declared(source: str) -> Declaration:
    return Declaration(
        unbiased=False, supports="Subset", evaluations=0, differentiable_costs=True, derivatives=1, source=source
    )


@dataclass(frozen=True)
class SIMPLE(SubsetRelaxation):
    r"""The SIMPLE estimator: the subset that was drawn in the forward pass, and its exact marginals in the backward pass.

    Uses f(z) with ∂z/∂θ replaced by ∂μ/∂θ. z is the binary vector with k ones that was drawn, and μ = E[z] are the exact
    probabilities of the items under `Subset(k, θ)`; ∂μ/∂θ is the covariance of z. The gradient is exact where f is linear in the
    draw, and biased elsewhere.

    Shapes:
        Any batch and event shape. Particles and plates are ordinary batch dimensions. The marginals take O(n k) operations.

    Assumptions:
        The cost has a derivative at the hard values, and this derivative describes how the cost changes from one subset to another.
        The cost is not evaluated between the hard values. An item whose logit is −inf is never chosen and has no gradient.

    Raises:
        EstimatorError: on a site that is no `Subset`, or that is drawn inside a `scan` or `cond`; if the program compares, rounds or
            indexes with the value of the site.

    Example:
        >>> SIMPLE().declaration.unbiased
        False

    References:
        Ahmed, Zeng, Niepert and Van den Broeck (2023), section 4.
    """

    declaration: ClassVar[Declaration] = _declared("Ahmed et al. 2023")

    def weights(self, draw: HardSubset) -> Array:
        """Return the draw with the gradient of its marginals."""
        marginals = subset_marginals(draw.ops, draw.logits, draw.k)
        return draw.ops.stop_gradient(draw.value - marginals) + marginals


@dataclass(frozen=True)
class IMLE(SubsetRelaxation):
    r"""The implicit maximum likelihood estimator: the difference of two most probable subsets, at perturbed logits.

    Uses f(z) with (z − MAP(θ + ε − λ g))/λ in place of the gradient with respect to θ. z is the subset that was drawn, MAP returns the k
    largest, and g is the derivative of the loss with respect to z (of the mean over particles, as the gradient of the loss has it). The
    noise ε is Gumbel, conditional on the draw: MAP(θ + ε) = z. Its authors draw z as MAP(θ + ε); here z is an exact draw from
    `Subset(k, θ)`, the law whose density the costs have, and the noise follows.

    Args:
        lam: λ, the length of the step against the gradient, above 0, in logits per unit of g. A small λ has more variance and less bias.
            Default: 10.0.

    Shapes:
        Any batch and event shape. Particles and plates are ordinary batch dimensions. Two sorts of n numbers.

    Assumptions:
        The cost has a derivative at the hard values, and this derivative describes how the cost changes from one subset to another.
        The cost is not evaluated between the hard values. An item whose logit is −inf is never chosen and has no gradient.

    Raises:
        EstimatorError: on a site that is no `Subset`, or that is drawn inside a `scan` or `cond`; if the program compares, rounds or
            indexes with the value of the site.
        ConfigurationError: if λ is not above 0.

    Example:
        >>> IMLE(lam=2.0).lam
        2.0

    References:
        Niepert, Minervini and Franceschi (2021), algorithm 1 and equation 13.
    """

    lam: float = 10.0
    declaration: ClassVar[Declaration] = _declared("Niepert et al. 2021")

    def __post_init__(self) -> None:
        if isinstance(self.lam, bool) or not isinstance(self.lam, (int, float)) or not self.lam > 0:
            raise ConfigurationError(f"IMLE(lam={self.lam!r}): the step is a number above 0.")

    def weights(self, draw: HardSubset) -> Array:
        """Return the draw, whose gradient is that to the most probable subset of moved logits."""
        perturbed = perturbed_to(draw.ops, draw.noise, draw.logits, draw.value)
        lam, k, ops = float(self.lam), draw.k, draw.ops

        def slope(gradient: Array, perturbed: Array, value: Array) -> Array:
            return (value - largest(ops, perturbed - lam * gradient, k)) / lam

        return ops.with_slope(draw.logits, draw.value, slope, perturbed)
