"""The bound of a particle filter, whose particles are resampled from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pplgrad.core.objectives import CostWeights, Objective, combined_particles
from pplgrad.errors import ConfigurationError

RESAMPLING = ("multinomial", "systematic")
RESAMPLING_GRADIENTS = ("score", "drop", "stop-gradient")


@dataclass(frozen=True, repr=False)
class FIVO(Objective):
    r"""The filtering variational objective (FIVO, VSMC, AESMC): the log of a particle filter's estimate of the evidence.

    The objective is E[log Ẑ] with Ẑ = Π_t Σ_k v_{t−1}^k w_t^k, a lower bound of the log evidence, since E[Ẑ] is the evidence. K particles
    run through the steps t of guide and model; w_t is the ratio of the model's densities in step t and the guide's, given the particle's
    own past. v are the normalised weights that the particles carry: 1/K after they were resampled, in proportion to v w, and v w / Σ v w where they
    were not. The program is weighed as a whole: elements of plates are resampled together. The ELBO averages its `num_particles` / K filters.

    The steps are those of one `scan` in NumPyro, of one `pyro.markov` loop in Pyro, of the same length in guide and model. What stands before
    the loop belongs to its first step; sites after it are rejected. NumPyro runs guide and model step by step. Pyro cannot pause a program: each of T
    steps is a run of the program as far as that step, in which the earlier sites take the values of the particle's ancestors.

    Sites have `Reparam()` or `ScoreFunction()`, without a baseline of their own. The cost of a draw in step t is Σ_{s ≥ t} log Ẑ_s, less
    the bound of step t without the particle. From costs the mean of the other filters is subtracted, or, where there is one filter, what the mean
    of the steps before makes of the steps to come. The first is by far the better. The gradient of the ancestors' choice:

    - "score": the same with the log probability of the ancestors, at costs from the following step on. Unbiased for E[log Ẑ], with a large
      variance (with systematic resampling and continuous weights it has no finite one).
    - "drop": none. Biased; usual with reparameterized sites, because its variance is smaller.
    - "stop-gradient": a resampled particle carries the weight W / ⊥(W) / K, where ⊥ is a constant, and the density of a draw without a path
      is ⊥(q) in its weights. The gradient of Ẑ is unbiased for that of the evidence. That of log Ẑ is biased for E[log Ẑ], and converges to
      the gradient of the log evidence with K. A guide's own parameters get a gradient through reparameterized sites alone.

    Args:
        samples: K, the number of particles of one filter. None (the default) takes all particles of the ELBO.
        resampling: "multinomial" (independent ancestors), or "systematic" (one uniform number for all K). Default: "multinomial".
        threshold: particles are resampled before a step where their effective sample size, 1 / Σ v², is below this fraction of K. None
            (the default) resamples before every step, 0 never, which is `IWAE(plates=())`. With continuous sites a number between 0 and 1 biases
            the gradient, because it ignores that the decision moves with the parameters.
        resampling_gradient: "score" (the default), "drop" or "stop-gradient".

    Shapes:
        The weights have the shape (filters, K). The objective is in nats.

    Assumptions:
        The program has the same steps for each particle. Run again at the same values, it computes the same (Pyro).

    Raises:
        ConfigurationError: a setting is none of those above, the number of particles is not a multiple of `samples`, `higher_order=True`,
            or another option of the ELBO that a filter does not have.
        EstimatorError: a site names another estimator.
        ProgramError: guide and model have no loop over time, or loops of several lengths; a site stands after the loop; a plate is
            subsampled; a site is in one of the two programs alone.

    Example:
        >>> FIVO(samples=8, resampling="systematic").combined(16)
        8
        >>> FIVO(resampling_gradient="drop").unbiased
        False

    References:
        Maddison, Lawson, Tucker, Heess, Norouzi, Mnih, Doucet and Teh (2017), with a threshold.
        Naesseth, Linderman, Ranganath and Blei (2018), and Le, Igl, Rainforth, Jin and Wood (2018), without one.
        Ścibior and Wood (2021), for "stop-gradient".
    """

    samples: int | None = None
    resampling: str = "multinomial"
    threshold: float | None = None
    resampling_gradient: str = "score"

    def __post_init__(self) -> None:
        if self.samples is not None and (
            isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1
        ):
            raise ConfigurationError(
                f"FIVO(samples={self.samples!r}): give the number of particles of one filter, 1 or more, or None for all of them."
            )
        for name, known in (("resampling", RESAMPLING), ("resampling_gradient", RESAMPLING_GRADIENTS)):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"FIVO({name}={getattr(self, name)!r}): write one of {', '.join(map(repr, known))}."
                )
        if self.threshold is not None and not (
            isinstance(self.threshold, (int, float)) and 0 <= self.threshold <= 1 and self.threshold is not True
        ):
            raise ConfigurationError(
                f"FIVO(threshold={self.threshold!r}): give a fraction of the particles from 0 to 1, such as 0.5, or None to resample "
                "before every step."
            )

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"FIVO({', '.join(given)})"

    @property
    def unbiased(self) -> bool:
        """Whether the gradient is unbiased for E[log Ẑ] where all draws are discrete."""
        return self.resampling_gradient == "score" or self.threshold == 0

    def is_unbiased_at(self, is_discrete: bool) -> bool:
        """Return whether the gradient is unbiased with a discrete or a continuous site: a decision by a threshold jumps along a continuous draw."""
        return self.unbiased and (is_discrete or self.threshold in (None, 0, 1))

    def weights(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CostWeights:
        """Return weight 1 for every log density."""
        return CostWeights(1.0, 1.0, 1.0)

    def combined(self, particles: int) -> int:
        """Return K.

        Args:
            particles: the number of particles of the ELBO.

        Raises:
            ConfigurationError: `particles` is not a multiple of `samples`.
        """
        return combined_particles(self, self.samples, particles)
