"""Objectives whose draws come from any program: distances of guide and posterior that are zero where both agree."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pplgrad.core.objectives import MultiSample
from pplgrad.errors import ConfigurationError

if TYPE_CHECKING:
    from pplgrad.core.array_ops import Array


class OffPolicy(MultiSample):
    """Base class of distances between guide and posterior, at draws of a proposal that are constants.

    A subclass is a frozen dataclass with the field `proposal`, and says with `discrepancy` what is minimised.

    Example:
        >>> issubclass(LogVariance, OffPolicy)
        True
    """

    proposal: Callable[..., Any] | None

    @property
    def draws_are_constant(self) -> bool:
        """True: no gradient flows through draws, and sites have no estimator."""
        return True

    @property
    def parameter(self) -> str | None:
        """The name of the learned log normaliser, None where there is none."""
        return None

    @abstractmethod
    def discrepancy(self, xp: Any, log_weights: Array, axis: int, log_normalizer: Array | None) -> Array:
        """Return what is minimised, by reducing log p − log q over the axis of the particles."""

    def _check_proposal(self) -> None:
        if self.proposal is not None and not callable(self.proposal):
            raise ConfigurationError(
                f"{type(self).__name__}(proposal={self.proposal!r}): give a program with the sites of the guide, which is called with the "
                "program's arguments, or None to draw from the guide."
            )


@dataclass(frozen=True)
class LogVariance(OffPolicy):
    r"""Half the variance of log q − log p, over draws of a proposal (log-variance divergence, VarGrad).

    Minimises Σ_i ½ Var_r[log q(z_i) − log p(x_i, z_i)], with the sample variance over K particles (denominator K − 1), which is unbiased. It
    is zero exactly where the guide is the posterior on the support of r, and needs no normaliser. The sum runs over the elements i of
    the plates that all latent sites share. The draws are constants: the gradient goes through log q at these draws, whatever r is,
    so that discrete and continuous sites are treated alike and no site has an estimator. The density of r is not used.

    Without a proposal r is the guide itself. Then the gradient of the guide's parameters is that of `ELBO()` under
    `ScoreFunction(LeaveOneOut())` with the whole cost of an element, on the same draws (where no latent site is scaled).
    A proposal that draws more widely than the guide, such as a tempered guide or the uniform distribution, also fits
    modes that the guide misses.

    log p is held: the parameters of the model get no gradient. The variance says how far the guide is from the model's posterior, and a
    model that followed it would fit the guide and not the data. To learn a model as well, alternate with steps of another objective,
    such as `ELBO()` or `IWAE()`, with the model's parameters.

    Args:
        proposal: r, a program that draws the sites of the guide and is called with the program's arguments. It may have further sites
            and read the guide's parameters, which get no gradient through it. None (the default) draws from the guide.
        samples: K, the number of particles in one variance, at least 2. None (the default) takes all particles of the ELBO.
        plates: names of the plates whose elements have a variance each, as in `IWAE`. `()` takes one variance of the whole program.

    Shapes:
        A proposal's values have the shapes of the guide's. The variances have the shape of the shared plates. The loss is in nats².

    Assumptions:
        Guide and model give each draw of r a positive density. The support of r holds all values that are to be fitted.

    Raises:
        ConfigurationError: `proposal` is not callable, fewer than 2 particles, `higher_order=True`, or as in `IWAE`.
        EstimatorError: a site names an estimator.
        ProgramError: the proposal does not draw a site of the guide, or draws it in another shape; a variance would mix the elements of a
            subsampled plate; a site is drawn by the model alone; or as in `IWAE`.

    Example:
        >>> def tempered():  # The guide at three times its temperature.
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits") / 3))
        >>> LogVariance(proposal=tempered).combined(4)
        4

    References:
        Richter, Boustati, Nüsken, Ruiz and Akyildiz (2020), definition 3.1 and proposition 3.1.
        Nüsken and Richter (2021), for other proposals.
    """

    proposal: Callable[..., Any] | None = None
    samples: int | None = None
    plates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check()
        self._check_proposal()

    def combined(self, particles: int) -> int:
        """Return the number of particles of one variance, as `MultiSample` does, and refuse one."""
        count = super().combined(particles)
        if count < 2:
            raise ConfigurationError(
                f"{self!r} is a variance over particles, and one particle has none; pass num_particles=2 or more, and samples=2 or more."
            )
        return count

    def discrepancy(self, xp: Any, log_weights: Array, axis: int, log_normalizer: Array | None) -> Array:
        """Return half the sample variance."""
        apart = log_weights - xp.mean(log_weights, axis=axis, keepdims=True)
        return 0.5 * xp.sum(apart * apart, axis=axis) / (log_weights.shape[axis] - 1)


@dataclass(frozen=True)
class TrajectoryBalance(OffPolicy):
    r"""The squared imbalance of guide and model at draws of a proposal, with a learned log normaliser (trajectory balance).

    Minimises E_r[(log Z + log q(z) − log p(x, z))²], averaged over the particles, over the guide and the number log Z. It is zero
    exactly where the guide is the posterior on the support of r, and then log Z is the log evidence. The draws are constants, the density
    of r is not used, and log p is held, all as in `LogVariance`. At the best log Z of an infinite number of particles it is
    twice `LogVariance`, which needs no log Z, but several particles.

    log Z is one parameter of the program. In Pyro it is in the param store, made at first use with the value 0. In NumPyro the guide
    registers it, so that `SVI` keeps it: `numpyro.param("log_normalizer", 0.0)`. Pyro's guide may do the same with another
    start. It belongs to one set of data: a subsampled plate is rejected.

    Args:
        proposal: r, as in `LogVariance`. None (the default) draws from the guide.
        log_normalizer: the name of the parameter log Z. Default: "log_normalizer".

    Shapes:
        log Z is one number, in nats. There is one imbalance of the whole program for each particle. The loss is in nats².

    Assumptions:
        As in `LogVariance`.

    Raises:
        ConfigurationError: `proposal` is not callable, `log_normalizer` is no name, no guide registers it (NumPyro), it is not one
            number, or `higher_order=True`.
        EstimatorError: a site names an estimator.
        ProgramError: the proposal does not draw a site of the guide, or draws it in another shape; a plate is subsampled; or a site is
            drawn by the model alone.

    Example:
        >>> def replayed():  # A draw from a buffer of good values; its own density has no part in the objective.
        ...     pyro.sample("z", dist.Delta(random.choice(buffer)))
        >>> TrajectoryBalance(proposal=replayed).combined(4)
        1

    References:
        Malkin, Jain, Bengio, Sun and Bengio (2022), equation 14.
        Malkin et al. (2023), for the gradient on the guide's own draws.
    """

    proposal: Callable[..., Any] | None = None
    log_normalizer: str = "log_normalizer"

    # Particles are averaged, and the program is weighed as a whole.
    samples = 1
    plates = ()

    def __post_init__(self) -> None:
        self._check_proposal()
        if not isinstance(self.log_normalizer, str) or not self.log_normalizer:
            raise ConfigurationError(
                f"TrajectoryBalance(log_normalizer={self.log_normalizer!r}): give the name of the parameter, such as 'log_normalizer'."
            )

    @property
    def parameter(self) -> str:
        """The name of the parameter log Z."""
        return self.log_normalizer

    def discrepancy(self, xp: Any, log_weights: Array, axis: int, log_normalizer: Array | None) -> Array:
        """Return the mean square of the imbalance."""
        apart = log_normalizer - log_weights  # type: ignore[operator]
        return xp.mean(apart * apart, axis=axis)
