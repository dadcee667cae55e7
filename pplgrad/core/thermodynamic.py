"""The thermodynamic variational objective: the evidence as an integral over tempered posteriors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from pplgrad.core.objectives import DensityShares, MultiSample, log_sum_exp
from pplgrad.errors import ConfigurationError

if TYPE_CHECKING:
    from pplgrad.core.array_ops import Array


@dataclass(frozen=True)
class TVO(MultiSample):
    r"""The thermodynamic variational objective (TVO) of each data point: a Riemann sum of the thermodynamic integral.

    The log evidence is ∫₀¹ E_β[log w] dβ, with w = p(x, z) / q(z) and the expectation under π_β ∝ q^(1 − β) p^β. The integrand grows with β.
    The objective is Σ_i Σ_k (β_{k+1} − β_k) E_{β_k}[log w_i], a lower bound; with `upper` each interval takes its right end, β_{k+1}, an
    upper bound. The sum over i runs over the elements of the plates that all latent sites share. One partition is the ELBO.

    The expectations are averages over S particles of the guide with the weights w̃_s ∝ w_s^β. The gradient is that of the covariance form,
    ∇ E_β[f] = E_β[∇ f] + Cov_β[∇ log π̃_β, f], with f = log w and log π̃_β = log q + β f = (1 − β) log q + β log p. The covariance is
    multiplied by S / (S − 1). A mask or a scale of a latent site changes f, and not the q that draws. The draws are constants: discrete and continuous sites are treated alike, and no site has an estimator. The
    model's and the guide's parameters follow the same objective.

    Args:
        partitions: K, the number of intervals, whose ends are 0 and K numbers from `first` to 1 with equal ratios; or the ends, from 0 to 1.
            Default: 5. No unit.
        first: the end of the first interval, between 0 and 1, for a number of two or more partitions. Default: 0.025. No unit.
        upper: True takes the right Riemann sum. Default: False.
        samples: S, the number of particles in one average, at least 2. None (the default) takes all particles of the ELBO.
        plates: names of the plates whose elements have weights of their own, as in `IWAE`.

    Shapes:
        Those of `IWAE`. The objective is in nats.

    Assumptions:
        The estimates of value and gradient are biased for finite S, because the weights are self-normalised. They are consistent. At
        β = 0 nothing is normalised: with one partition the gradient is unbiased, that of `ELBO()` with `ScoreFunction(LeaveOneOut())` and the
        whole cost of an element, on the same draws.

    Raises:
        ConfigurationError: `partitions` is neither a positive integer nor increasing numbers from 0 to 1, `first` is not between 0 and 1,
            fewer than 2 particles, `higher_order=True`, or as in `IWAE`.
        EstimatorError: a site names an estimator.
        ProgramError: a site is drawn by the model alone, or as in `IWAE`.

    Example:
        >>> TVO(partitions=3, first=0.01).ends
        (0.0, 0.01, 0.1, 1.0)
        >>> TVO((0.0, 0.3, 1.0)).ends
        (0.0, 0.3, 1.0)

    References:
        Masrani, Le and Wood (2019), for both Riemann sums and the covariance form.
    """

    partitions: int | tuple[float, ...] = 5
    first: float = 0.025
    upper: bool = False
    samples: int | None = None
    plates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check()
        given = self.partitions
        if isinstance(given, bool) or not isinstance(given, (int, Sequence)) or isinstance(given, str):
            raise ConfigurationError(
                f"TVO(partitions={given!r}): give a number of intervals, or their ends: (0.0, 0.1, 1.0)."
            )
        if isinstance(given, Sequence):
            object.__setattr__(self, "partitions", tuple(given))
            if not _increasing(given) or given[0] != 0 or given[-1] != 1:
                raise ConfigurationError(
                    f"TVO(partitions={given!r}): the ends of the intervals increase, from 0 to 1: (0.0, 0.1, 1.0)."
                )
        elif given < 1:
            raise ConfigurationError(f"TVO(partitions={given}): give 1 interval or more.")
        if not isinstance(self.first, Real) or not 0 < self.first < 1:
            raise ConfigurationError(f"TVO(first={self.first!r}): give a number between 0 and 1, such as 0.025.")

    @property
    def ends(self) -> tuple[float, ...]:
        """The ends of the intervals, 0 and 1 included."""
        if isinstance(self.partitions, tuple):
            return tuple(float(end) for end in self.partitions)
        last = self.partitions - 1
        return (0.0, *(math.pow(self.first, (last - k) / last) for k in range(last)), 1.0)

    @property
    def draws_are_constant(self) -> bool:
        """True: no gradient flows through draws, and sites have no estimator."""
        return True

    def combined(self, particles: int) -> int:
        """Return the number of particles of one average, as `MultiSample` does, and refuse one."""
        count = super().combined(particles)
        if count < 2:
            raise ConfigurationError(
                f"{self!r} takes covariances over particles, and one particle has none; pass num_particles=2 or more, and samples=2 or more."
            )
        return count

    def bound(self, xp: Any, log_weights: Array, axis: int) -> Array:
        """Return the Riemann sum."""
        parts = [
            size * xp.sum(_weighted(xp, self._at(xp, log_weights, axis, end), log_weights), axis=axis)
            for size, end in self._terms
        ]
        return sum(parts[1:], parts[0])

    def density_shares(self, xp: Any, log_weights: Array, axis: int) -> DensityShares:
        """Return the factors of the covariance form, in which log π̃_β = log q + β f: here q is the density of the draws themselves.

        f has the densities as they count. What scales or masks a latent site does not change what is drawn there.
        """
        count = log_weights.shape[axis]
        of_f, at_prior, of_draws = xp.zeros_like(log_weights), xp.zeros_like(log_weights), xp.zeros_like(log_weights)
        for size, end in self._terms:
            weights = self._at(xp, log_weights, axis, end)
            mean = xp.sum(_weighted(xp, weights, log_weights), axis=axis, keepdims=True)
            apart = _weighted(xp, weights, log_weights - mean) * (count / (count - 1))
            of_draws = of_draws + size * apart
            # E_q[∇ log q] = 0 needs no estimate.
            at_prior = at_prior + (size * weights if end == 0 else 0.0)
            of_f = of_f + (0.0 if end == 0 else size * (weights + end * apart))
        return DensityShares(of_f + at_prior, -of_f, -at_prior, of_draws)

    @property
    def _terms(self) -> list[tuple[float, float]]:
        """The size of each interval, and the end at which it takes the integrand."""
        ends = self.ends
        return [(right - left, right if self.upper else left) for left, right in zip(ends, ends[1:], strict=False)]

    @staticmethod
    def _at(xp: Any, log_weights: Array, axis: int, end: float) -> Array:
        """Return the self-normalised weights w^β."""
        if end == 0:
            return xp.full_like(log_weights, 1 / log_weights.shape[axis])
        scaled = end * log_weights
        return xp.exp(scaled - xp.expand_dims(log_sum_exp(xp, scaled, axis), axis=axis))


def _weighted(xp: Any, weights: Array, x: Array) -> Array:
    """Return the product, which is 0 where a weight is: log w is −∞ there."""
    return weights * xp.where(weights > 0, x, xp.zeros_like(x))


def _increasing(numbers: Sequence[float]) -> bool:
    real = all(isinstance(number, Real) for number in numbers)
    return real and len(numbers) > 1 and all(left < right for left, right in zip(numbers, numbers[1:], strict=False))
