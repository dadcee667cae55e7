"""Objectives: the quantities whose gradients are estimated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pplgrad.errors import ConfigurationError

if TYPE_CHECKING:
    from pplgrad.core.array_ops import Array


class CostWeights(NamedTuple):
    """Weights of the log densities in an objective.

    Args:
        observed: weight of the model's observed sites, factors included.
        prior: weight of the model's latent sites.
        guide: weight of the guide's sites, which are subtracted.

    Example:
        >>> CostWeights(observed=1.0, prior=0.5, guide=0.5).prior
        0.5
    """

    observed: Any
    prior: Any
    guide: Any


class DensityShares(NamedTuple):
    """The factors of each particle's gradients in an estimate that is no derivative of a bound.

    Args:
        model: the factor of ∇ log p, scaled and masked.
        guide: the factor of ∇ log q, scaled and masked.
        weight: the factor of ∇ log q where q is held and only its scale moves, which may be learned; None for none.
        draws: the factor of ∇ log q of the draws themselves, which is neither scaled nor masked; None for none.

    Example:
        >>> DensityShares(0.3, 0.3).draws is None
        True
    """

    model: Any
    guide: Any
    weight: Any = None
    draws: Any = None


class Objective(ABC):
    """Base class of objectives.

    Unless it is a `MultiSample` objective, an objective is a weighted sum of log densities, averaged over particles:
    E_q[w_o Σ log p(x | z) + w_p Σ log p(z) − w_g Σ log q(z)], where `weights` returns (w_o, w_p, w_g) = (observed, prior, guide).

    Example:
        >>> issubclass(ELBO, Objective)
        True
    """

    @abstractmethod
    def weights(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CostWeights:
        """Return the weights of the log densities.

        Args:
            args: positional arguments of the program.
            kwargs: keyword arguments of the program.

        Returns:
            The `CostWeights`: observed sites, latent sites of the model, sites of the guide.
        """


def _number(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if not callable(value):
        return value
    found = value(*args, **kwargs)
    if (
        found is None
        or isinstance(found, (str, bytes, list, tuple, dict))
        or getattr(found, "shape", ()) not in ((), (1,))
    ):
        raise ConfigurationError(
            f"A weight's function returned {found!r}; it must return one number that is at least 0."
        )
    _check("A weight's function returned (", found)
    return found


def _check(owner: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not 0 <= value < math.inf:
        raise ConfigurationError(f"{owner}={value}): a weight is at least 0, and finite.")


@dataclass(frozen=True)
class ELBO(Objective):
    r"""The evidence lower bound (ELBO), with a weight on its divergence term.

    The objective is E_q[Σ log p(x | z)] − w E_q[Σ log q(z) − Σ log p(z)], where w is `kl_weight`. It is the ELBO for w = 1, and
    another trade-off for other w (β-VAE, annealing). Observed sites and factors have weight 1. Latent sites of model and guide
    have weight w.

    Args:
        kl_weight: w, a number or a function of the program's arguments that returns one, such as a schedule over a step that is one
            of the arguments. Default: 1. No unit.

    Shapes:
        w is one number. The objective is in nats.

    Raises:
        ConfigurationError: the weight is negative or not finite, or the function does not return one number.

    Example:
        >>> ELBO(kl_weight=lambda x, step: min(1.0, step / 1000)).weights((None, 250), {})
        CostWeights(observed=1.0, prior=0.25, guide=0.25)

    References:
        Higgins et al. (2017), equation 4.
        Bowman et al. (2016), section 3.1 (annealing).
    """

    kl_weight: float | Callable[..., Any] = 1.0

    def __post_init__(self) -> None:
        _check("ELBO(kl_weight", self.kl_weight)

    def weights(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CostWeights:
        """Return weight 1 for observed sites, and `kl_weight` for latent sites of model and guide."""
        weight = _number(self.kl_weight, args, kwargs)
        return CostWeights(1.0, weight, weight)


@dataclass(frozen=True)
class Expectation(Objective):
    r"""The expectation of the model's factors alone, with an optional entropy bonus.

    The objective is E_q[Σ factors] − c E_q[Σ log q(z)], where c is `entropy`. It covers policy gradients, experiment design and any
    program whose reward is a `factor` or the log density of an observed site. Latent sites of the model have weight 0: they only
    take the guide's values.

    Args:
        entropy: c, a number or a function of the program's arguments that returns one. Default: 0. In units of reward per nat.

    Shapes:
        c is one number. The objective is in units of reward.

    Raises:
        ConfigurationError: the weight is negative or not finite, or the function does not return one number.

    Example:
        >>> Expectation(entropy=0.1).weights((), {})
        CostWeights(observed=1.0, prior=0.0, guide=0.1)

    References:
        Williams (1992).
        Williams and Peng (1991), for the entropy bonus.
    """

    entropy: float | Callable[..., Any] = 0.0

    def __post_init__(self) -> None:
        _check("Expectation(entropy", self.entropy)

    def weights(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CostWeights:
        """Return weight 1 for observed sites, 0 for the model's latent sites, and `entropy` for the guide."""
        return CostWeights(1.0, 0.0, _number(self.entropy, args, kwargs))


class MultiSample(Objective):
    """Base class of objectives that combine the importance weights of several particles, element by element.

    With p = `power`, the bound of K log weights l_k is log(1/K Σ_k exp(p l_k)) / p. A subclass is a frozen dataclass with the fields
    `samples` and `plates` and a property `power`.

    Example:
        >>> import numpy as np
        >>> round(float(np.exp(IWAE().bound(np, np.log(np.array([1.0, 3.0])), axis=0))), 4)
        2.0
    """

    samples: int | None
    plates: tuple[str, ...] | None

    @property
    def power(self) -> float:
        """The exponent p of the importance weights: 1 for the importance-weighted bound."""
        return 1.0

    @property
    def draws_are_constant(self) -> bool:
        """Whether no gradient flows through draws, so that sites have no estimator."""
        return False

    def weights(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CostWeights:
        """Return weight 1 for every log density."""
        return CostWeights(1.0, 1.0, 1.0)

    def combined(self, particles: int) -> int:
        """Return the number of particles that one bound combines.

        Args:
            particles: the number of particles of the ELBO.

        Raises:
            ConfigurationError: `particles` is not a multiple of `samples`.
        """
        return combined_particles(self, self.samples, particles)

    def bound(self, xp: Any, log_weights: Array, axis: int) -> Array:
        """Return the bound, by reducing the log weights over the axis of the particles."""
        scaled = log_weights if self.power == 1 else self.power * log_weights
        total = log_sum_exp(xp, scaled, axis) - math.log(log_weights.shape[axis])
        return total if self.power == 1 else total / self.power

    def shares(self, xp: Any, log_weights: Array, axis: int) -> Array:
        """Return the derivative of the bound with respect to each log weight: the normalised importance weights."""
        scaled = log_weights if self.power == 1 else self.power * log_weights
        return xp.exp(scaled - xp.expand_dims(log_sum_exp(xp, scaled, axis), axis=axis))

    def density_shares(self, xp: Any, log_weights: Array, axis: int) -> DensityShares | None:
        """Return the factors of each particle's gradients, where the estimate is no derivative of the bound.

        None (the default): the estimate is the derivative of the bound with respect to the log weights.
        """
        return None

    def _check(self) -> None:
        if self.samples is not None and (
            isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1
        ):
            raise ConfigurationError(
                f"{type(self).__name__}(samples={self.samples!r}): give the number of particles to combine, 1 or more, or "
                "None for all of them."
            )
        if self.plates is not None and (
            isinstance(self.plates, str) or not all(isinstance(name, str) for name in self.plates)
        ):
            raise ConfigurationError(
                f'{type(self).__name__}(plates={self.plates!r}): give a tuple of names of plates, such as ("data",), or () '
                "for one weight of the whole program."
            )


def combined_particles(objective: Objective, samples: int | None, particles: int) -> int:
    """Return how many particles an objective combines, all if `samples` is None, or refuse what is no multiple of it."""
    if samples is None:
        return particles
    if particles % samples:
        raise ConfigurationError(
            f"{objective!r} combines {samples} particles, and the ELBO has num_particles={particles}; pass a multiple of "
            f"{samples} (such as num_particles={samples}), or leave out samples to combine all of them."
        )
    return samples


def log_sum_exp(xp: Any, x: Array, axis: int) -> Array:
    """Return log Σ exp(x) along an axis, which may hold −inf."""
    top = xp.max(x, axis=axis, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    return xp.log(xp.sum(xp.exp(x - top), axis=axis)) + xp.squeeze(top, axis=axis)


@dataclass(frozen=True)
class IWAE(MultiSample):
    r"""The importance-weighted bound (IWAE) of each data point.

    The objective is Σ_i E[log 1/K Σ_k w_ik] with w_ik = p(x_i, z_ik) / q(z_ik). The sum runs over the elements i of the plates that
    all latent sites share. Each term is the log of the mean weight of K particles. The scale of a subsampled plate multiplies the
    logarithm, not the weights. The ELBO combines K = `samples` of its `num_particles` in one bound, and averages the bounds.

    Every estimator of a site uses the bound of the site's element as its cost. Discrete sites have `VIMCO()` by default, with `OVIS()`
    as an alternative. Continuous sites have `Reparam()` by default, with `DReG()` as an alternative.

    Args:
        samples: K, the number of particles in one bound. None (the default) combines all particles of the ELBO.
        plates: names of the plates whose elements have a weight each. None (the default) takes the plates that all latent sites share.
            Names are needed where a latent site outside of a plate makes the weights ambiguous. `()` asks for one weight of the whole
            program.

    Shapes:
        The weights have the shape of the shared plates. The bound is in nats.

    Raises:
        ConfigurationError: `samples` is not a positive integer, `plates` is not a tuple of names, the number of particles is not a
            multiple of `samples`, or `plates` names a plate that not all latent sites share.
        ProgramError: the weights of the program do not factorise over the plates.

    Example:
        >>> IWAE(samples=5).combined(10)
        5

    References:
        Burda, Grosse and Salakhutdinov (2016), equation 8.
        Mnih and Rezende (2016), equation 5, for the gradient.
    """

    samples: int | None = None
    plates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check()


@dataclass(frozen=True)
class Renyi(MultiSample):
    r"""The variational Rényi bound of each data point, from K particles.

    The objective is Σ_i E[1/(1 − α) log 1/K Σ_k w_ik^(1 − α)], with the weights w_ik of `IWAE`. It equals `IWAE` at α = 0, and approaches
    the ELBO as α → 1. For α < 0 it is above the log evidence in the limit of many particles. The gradient is exact for this
    expectation over K particles, with discrete sites as well.

    Args:
        alpha: α, a finite number other than 1. Default: 0.5. No unit.
        samples: K, as in `IWAE`.
        plates: names of plates, as in `IWAE`.

    Shapes:
        Those of `IWAE`. The bound is in nats.

    Raises:
        ConfigurationError: `alpha` is 1 or not finite, or as in `IWAE`.
        ProgramError: as in `IWAE`.

    Example:
        >>> Renyi(alpha=0.5).power
        0.5

    References:
        Li and Turner (2016), equations 8 and 9.
    """

    alpha: float = 0.5
    samples: int | None = None
    plates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check()
        if not math.isfinite(self.alpha) or self.alpha == 1:
            raise ConfigurationError(
                f"Renyi(alpha={self.alpha}): alpha is a finite number other than 1; at 1 the bound is ELBO()."
            )

    @property
    def power(self) -> float:
        """The exponent 1 − α of the importance weights."""
        return 1.0 - self.alpha


@dataclass(frozen=True)
class ReweightedWakeSleep(MultiSample):
    r"""Reweighted wake-sleep: the model maximises the importance-weighted bound, and the guide is fitted to the posterior.

    Estimates Σ_i Σ_k w̃_ik ∇ [log p(x_i, z_ik) + c log q(z_ik; x_i)] + (1 − c) E_p(z, x)[∇ log q(z; x)], where w̃ are the normalised
    weights and c is `insomnia`. This is not the gradient of one objective. The model's parameters ascend the bound of `IWAE`. The
    guide's parameters descend KL(p ‖ q), with weighted particles (wake phase) and with latents and data drawn from the model (sleep
    phase). The value of the objective is the bound. No gradient flows through a draw: discrete and continuous sites are treated alike,
    and no site needs an estimator.

    Args:
        insomnia: c, the weight of the wake phase for the guide, from 0 to 1. Default: 1.
        samples: the number of particles in one bound, as in `IWAE`.
        plates: names of plates, as in `IWAE`.
        dream: function that is called with a mapping from the names of the observed sites to the data that the model drew, and with the
            program's arguments. It returns the tuple of arguments with which the guide sees these data. Required for `insomnia` below 1.
        dreams: the number of model draws over which the sleep phase is averaged. Default: 1.

    Shapes:
        Those of `IWAE`. The bound is in nats.

    Assumptions:
        The estimate is biased for finite K, because the weights are self-normalised.

    Raises:
        ConfigurationError: `insomnia` is outside [0, 1], `insomnia` is below 1 without `dream`, `dreams` is not a positive integer, or as
            in `IWAE`.
        EstimatorError: a site names an estimator.
        ProgramError: as in `IWAE`.

    Example:
        >>> ReweightedWakeSleep(insomnia=0.5, dream=lambda drawn, x: (drawn["x"],)).draws_are_constant
        True

    References:
        Bornschein and Bengio (2015), section 2.2.
        Le, Kosiorek, Siddharth, Teh and Wood (2019), equation 8 (wake-wake).
    """

    insomnia: float = 1.0
    samples: int | None = None
    plates: tuple[str, ...] | None = None
    dream: Callable[..., tuple] | None = None
    dreams: int = 1

    def __post_init__(self) -> None:
        self._check()
        if not 0 <= self.insomnia <= 1:
            raise ConfigurationError(f"ReweightedWakeSleep(insomnia={self.insomnia}): give a number from 0 to 1.")
        if self.insomnia < 1 and not callable(self.dream):
            raise ConfigurationError(
                f"ReweightedWakeSleep(insomnia={self.insomnia}) sleeps, and needs a function that hands the model's data to the "
                'guide: dream=lambda drawn, x: (drawn["x"],), for a guide of x and an observed site "x".'
            )
        if not isinstance(self.dreams, int) or self.dreams < 1:
            raise ConfigurationError(f"ReweightedWakeSleep(dreams={self.dreams!r}): give a number of draws, 1 or more.")

    @property
    def draws_are_constant(self) -> bool:
        """True: no gradient flows through draws, and sites have no estimator."""
        return True

    def density_shares(self, xp: Any, log_weights: Array, axis: int) -> DensityShares:
        """Return the normalised weights for the model, and c times them for the guide."""
        shares = self.shares(xp, log_weights, axis)
        return DensityShares(shares, self.insomnia * shares)

    @property
    def sleeps(self) -> bool:
        """Whether there is a sleep phase: the guide also learns from latents and data that the model draws."""
        return self.insomnia < 1
