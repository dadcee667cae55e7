"""A relaxation of counts: biased, a number between the counts that is differentiable in the parameters of the law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pplgrad.core.array_ops import Array, Ops, bounded
from pplgrad.core.estimator import Declaration
from pplgrad.core.noise import Noise
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.estimators.registry import remedy
from pplgrad.estimators.relaxed import HardDraw, Relaxation, check_temperature, softmax, tempered
from pplgrad.estimators.site_requirements import require_unscanned

SMOOTH = ("Poisson", "NegativeBinomial", "NegativeBinomial2", "GammaPoisson")
"""Laws of counts whose formula of the log density has a derivative between the counts in both hosts (a Binomial's has none in Pyro)."""

_LEAST_MASS = 0.99


@dataclass(frozen=True)
class HardCount:
    """A count that was drawn, (...), and the log probabilities of consecutive counts from `first` (...) on, (..., window)."""

    ops: Ops
    value: Array
    first: Array
    log_probs: Array
    noise: Noise

    @property
    def truncated(self) -> HardDraw:
        """Return the draw among the counts in the window, whose probabilities are normalised; one outside is moved to its end."""
        ops, xp = self.ops, self.ops.xp
        log_probs = bounded(xp, self.log_probs)
        log_probs = log_probs - xp.log(xp.sum(xp.exp(log_probs), axis=-1, keepdims=True))
        place = xp.clip(self.value - self.first, min=0, max=log_probs.shape[-1] - 1)
        return HardDraw(ops, log_probs, xp.astype(place, ops.arange(1, log_probs).dtype), self.noise)

    @property
    def fits(self) -> Array:
        """Return whether the window holds nearly all of the mass, (...): elsewhere the log density of the site is NaN."""
        xp = self.ops.xp
        return xp.sum(xp.exp(self.ops.stop_gradient(bounded(xp, self.log_probs))), axis=-1) > _LEAST_MASS


@dataclass(frozen=True)
class TruncatedGumbelSoftmax(Relaxation):
    r"""The generalized Gumbel-softmax relaxation of a count: the mean of a window of counts under Gumbel-softmax weights.

    Uses z = Σ_k c_k w_k in place of the draw, with w = softmax((log π + g)/τ), and ∇θ E_g[f(z)] as the gradient. c are `window` consecutive counts
    around the mean, π their probabilities, normalised, g is Gumbel noise conditional on the draw and τ is the temperature. This is the
    gradient of a relaxed objective. Its bias vanishes as τ goes to 0 and the window grows, while the variance grows. The log densities of the site
    in guide and model are the hosts' formulas (with gamma functions for factorials) at z. With `hard=True` the value is the draw, and only
    its gradient is that of z.

    Args:
        temperature: τ, above 0; no unit. A number, an array, or a function of the program's arguments that returns one. Default: 0.5.
        window: the number of counts, at least 2. Default: 64.
        hard: whether the value in the forward pass is the draw. Default: False.

    Shapes:
        Any batch and event shape. Particles and plates are ordinary batch dimensions. `window` log densities of each element are computed.

    Assumptions:
        The cost is finite and differentiable at all numbers between the counts. The window holds at least 0.99 of the mass of each element: otherwise
        the log density of the site is NaN. A draw outside of the window is moved to its end.

    Raises:
        EstimatorError: on a site that is not Poisson, negative binomial or GammaPoisson, or that is drawn inside a `scan` or `cond`; if the
            model has another law there, or the program compares, rounds or indexes with the value of the site.
        ImpossibleValueError: the window holds less than 0.99 of the mass (under `jit` the loss is NaN).
        ConfigurationError: if the temperature is not above 0, or the window is below 2.

    Example:
        >>> TruncatedGumbelSoftmax(0.1).declaration.unbiased
        False

    References:
        Joo, Kim, Shin and Moon (2020), section 3.
    """

    temperature: Any = 0.5
    window: int = 64
    hard: bool = False
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=False,
        supports="Poisson, negative binomial",
        evaluations=0,
        differentiable_costs=True,
        derivatives=1,
        source="Joo et al. 2020",
    )

    if_nan: ClassVar[str] = (
        "Either a parameter has diverged, or the window of TruncatedGumbelSoftmax holds less than 0.99 of the mass: pass a larger window."
    )

    def __post_init__(self) -> None:
        check_temperature("TruncatedGumbelSoftmax", self.temperature)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 2:
            raise ConfigurationError(
                f"TruncatedGumbelSoftmax(window={self.window!r}): give a number of counts, 2 or more."
            )

    def check(self, site: SiteInfo) -> None:
        """Refuse a site without a law of counts that is smooth between them."""
        if not (site.is_count and site.distribution in SMOOTH):
            raise EstimatorError(
                f"{self!r} cannot be used at site '{site.name}': the log density of {site.distribution} has no smooth formula between counts, "
                f"as those of Poisson, NegativeBinomial and GammaPoisson have; {remedy(site)}"
            )
        require_unscanned(self, site)

    def weights(self, draw: HardCount) -> Array:
        """Return the relaxed count, or the draw with its gradient."""
        ops, xp, among = draw.ops, draw.ops.xp, draw.truncated
        soft = softmax(xp, tempered(xp, among.perturbed(), self.temperature))
        counts = xp.astype(ops.arange(self.window, soft), soft.dtype)
        value = draw.first + xp.sum(soft * counts, axis=-1)
        if self.hard:
            value = ops.stop_gradient(draw.value - value) + value
        return value
