"""Objectives: what the estimates are the gradient of."""

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
    """How the log densities count: of observed model sites (factors too), of latent model sites, of guide sites."""

    observed: Any
    prior: Any
    guide: Any


class Objective(ABC):
    """Base class of objectives.

    Unless it is a `MultiSample` one, an objective is a weighted sum of log densities, averaged over particles.
    """

    @abstractmethod
    def weights(self, args: tuple, kwargs: Mapping[str, Any]) -> CostWeights:
        """Return the weights of the log densities, given the program's arguments."""


def _number(value: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
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
    r"""The evidence lower bound, with a weight on its divergence term.

    The objective is E_q[Σ log p(x | z)] − w E_q[Σ log q(z) − Σ log p(z)]: the bound for w = 1, another trade-off (β-VAE,
    annealing) else. Observed sites and factors count fully, latent sites of model and guide with `kl_weight`.

    Shapes: a number, or a function of the program's arguments that returns one, such as a schedule of a step that is
    among them. No unit.

    Raises `ConfigurationError` if the weight is negative.

    >>> ELBO(kl_weight=lambda x, step: min(1.0, step / 1000)).weights((None, 250), {})
    CostWeights(observed=1.0, prior=0.25, guide=0.25)

    Source: Higgins et al. (2017), equation 4; Bowman et al. (2016), section 3.1 (annealing).
    """

    kl_weight: float | Callable[..., Any] = 1.0

    def __post_init__(self) -> None:
        _check("ELBO(kl_weight", self.kl_weight)

    def weights(self, args: tuple, kwargs: Mapping[str, Any]) -> CostWeights:
        """Return 1 for observed sites, and the weight for latent ones."""
        weight = _number(self.kl_weight, args, kwargs)
        return CostWeights(1.0, weight, weight)


@dataclass(frozen=True)
class Expectation(Objective):
    r"""The expectation of the model's factors alone, with an optional entropy bonus.

    The objective is E_q[Σ factors] − c E_q[Σ log q(z)]: policy gradients, experiment design, any program whose reward is
    `factor` (or the log density of an observed site). Latent sites of the model count for nothing, and only take the
    guide's values.

    Shapes: `entropy`, the c above, is a number or a function of the program's arguments that returns one; in units of
    reward per nat.

    Raises `ConfigurationError` if the weight is negative.

    >>> Expectation(entropy=0.1).weights((), {})
    CostWeights(observed=1.0, prior=0.0, guide=0.1)

    Source: Williams (1992); Williams and Peng (1991) for the entropy bonus.
    """

    entropy: float | Callable[..., Any] = 0.0

    def __post_init__(self) -> None:
        _check("Expectation(entropy", self.entropy)

    def weights(self, args: tuple, kwargs: Mapping[str, Any]) -> CostWeights:
        """Return 1 for observed sites, 0 for the prior, and the entropy's weight for the guide."""
        return CostWeights(1.0, 0.0, _number(self.entropy, args, kwargs))


class MultiSample(Objective):
    """Base class of objectives that combine the importance weights of several particles, element by element.

    A subclass is a frozen dataclass with the fields `samples` and `plates`, and a `power`: with p = `power` the
    bound of K log weights l is log(1/K Σ_k exp(p l_k)) / p.
    """

    samples: int | None
    plates: tuple[str, ...] | None

    @property
    def power(self) -> float:
        """The power of the weights: 1 for the importance-weighted bound."""
        return 1.0

    @property
    def draws_are_constant(self) -> bool:
        """Whether no gradient goes through draws, so that sites have no estimator."""
        return False

    def weights(self, args: tuple, kwargs: Mapping[str, Any]) -> CostWeights:
        """Return 1 for every log density."""
        return CostWeights(1.0, 1.0, 1.0)

    def combined(self, particles: int) -> int:
        """Return how many of an ELBO's particles one bound combines, or refuse their number."""
        if self.samples is None:
            return particles
        if particles % self.samples:
            raise ConfigurationError(
                f"{self!r} combines {self.samples} particles, and the ELBO has num_particles={particles}; pass a multiple of "
                f"{self.samples} (such as num_particles={self.samples}), or leave out samples to combine all of them."
            )
        return self.samples

    def bound(self, xp: Any, log_weights: Array, axis: int) -> Array:
        """Return the bound from the log weights of the particles along an axis, which it drops."""
        scaled = log_weights if self.power == 1 else self.power * log_weights
        total = log_sum_exp(xp, scaled, axis) - math.log(log_weights.shape[axis])
        return total if self.power == 1 else total / self.power

    def shares(self, xp: Any, log_weights: Array, axis: int) -> Array:
        """Return the derivative of the bound with respect to each log weight: the normalised weights."""
        scaled = log_weights if self.power == 1 else self.power * log_weights
        return xp.exp(scaled - xp.expand_dims(log_sum_exp(xp, scaled, axis), axis=axis))

    def _check(self) -> None:
        if self.samples is not None and (not isinstance(self.samples, int) or self.samples < 1):
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


def log_sum_exp(xp: Any, x: Array, axis: int) -> Array:
    """Return log Σ exp(x) along an axis, which may hold −inf."""
    top = xp.max(x, axis=axis, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    return xp.log(xp.sum(xp.exp(x - top), axis=axis)) + xp.squeeze(top, axis=axis)


@dataclass(frozen=True)
class IWAE(MultiSample):
    r"""The importance-weighted bound of each data point.

    The objective is Σ_i E[log 1/K Σ_k w_ik] with w_ik = p(x_i, z_ik) / q(z_ik): the sum over the elements i of the plates
    that all latent sites share, of the log mean weight of K particles. A subsampled plate's scale counts
    outside of the logarithm. The ELBO's `num_particles` are combined K = `samples` at a time (None: all
    of them), and further ones averaged.

    Shapes: the weights have the shape of the shared plates; `plates` names them where a latent site outside of a
    plate makes them ambiguous, and `plates=()` asks for one weight of the whole program. In nats.

    Every estimator of a site sees the bound of its element as its cost. Discrete sites have `VIMCO()` by default (also
    `OVIS()`), continuous ones `Reparam()` (also `DReG()`).

    Raises `ConfigurationError` if the number of particles is not a multiple of `samples`, and `ProgramError` for a
    program whose weights do not factorise over the plates.

    >>> IWAE(samples=5).combined(10)
    5

    Source: Burda, Grosse and Salakhutdinov (2016), equation 8; Mnih and Rezende (2016), equation 5, for the gradient.
    """

    samples: int | None = None
    plates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check()


@dataclass(frozen=True)
class Renyi(MultiSample):
    r"""The variational Rényi bound of each data point, from K particles.

    The objective is Σ_i E[1/(1 − α) log 1/K Σ_k w_ik^(1 − α)]: `IWAE` at α = 0, towards the evidence lower bound at α → 1,
    above the evidence in the limit for α < 0. With discrete sites too its gradient is exact for this expectation.

    Shapes, `samples` and `plates`: those of `IWAE`. `alpha` is a number other than 1, without unit; the bound is in nats.

    Raises what `IWAE` raises, and `ConfigurationError` if `alpha` is 1 or not finite.

    >>> Renyi(alpha=0.5).power
    0.5

    Source: Li and Turner (2016), equations 8 and 9.
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
        """1 − α."""
        return 1.0 - self.alpha


@dataclass(frozen=True)
class ReweightedWakeSleep(MultiSample):
    r"""Reweighted wake-sleep: the model follows the importance-weighted bound, the guide the posterior.

    Not the gradient of one objective: Σ_i Σ_k w̃_ik ∇ [log p(x_i, z_ik) + c log q(z_ik; x_i)] + (1 − c) E_p(z, x)[∇ log q(z; x)], where w̃ are
    the normalised weights and c is `insomnia`. The model's parameters climb the bound of `IWAE`; the guide's descend KL(p ‖ q), by
    weighted particles (wake) and by draws of latents and data from the model (sleep). No gradient goes through a draw, so that
    every site, discrete or continuous, is treated alike and needs no estimator. The value is the bound.

    Shapes, `samples` and `plates`: those of `IWAE`. `dream` is called with a mapping from the observed sites' names to the data that the
    model drew, and with the program's arguments, and returns the tuple of arguments with which the guide sees that data; it is
    needed where `insomnia` is below 1, and `dreams` draws are averaged. Biased for a finite K, as self-normalised weights are.

    Raises what `IWAE` raises, `EstimatorError` if a site names an estimator, `ConfigurationError` if `insomnia` is outside [0, 1], or
    below 1 without `dream`.

    >>> ReweightedWakeSleep(insomnia=0.5, dream=lambda drawn, x: (drawn["x"],)).draws_are_constant
    True

    Source: Bornschein and Bengio (2015), section 2.2; Le, Kosiorek, Siddharth, Teh and Wood (2019), equation 8 (wake-wake).
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
        """True."""
        return True

    @property
    def sleeps(self) -> bool:
        """Whether the guide learns from what the model draws."""
        return self.insomnia < 1
