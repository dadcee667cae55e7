"""Objectives: what the estimates are the gradient of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pplgrad.errors import ConfigurationError


class CostWeights(NamedTuple):
    """How the log densities count: of observed model sites (factors too), of latent model sites, of guide sites."""

    observed: Any
    prior: Any
    guide: Any


class Objective(ABC):
    """Base class of objectives."""

    @abstractmethod
    def weights(self, args: tuple, kwargs: Mapping[str, Any]) -> CostWeights:
        """Return the weights of the log densities, given the program's arguments."""


def _number(value: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return value(*args, **kwargs) if callable(value) else value


def _check(owner: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not value >= 0:
        raise ConfigurationError(f"{owner}={value}): a weight is at least 0.")


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
