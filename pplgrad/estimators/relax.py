"""The score function with a learned network as its control variate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pplgrad.core.array_ops import Array
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.control_variates import REBAR
from pplgrad.estimators.site_requirements import require_finite, require_steps


@dataclass(frozen=True)
class RELAX(REBAR):
    r"""The RELAX estimator: REBAR with a learned network added to its control variate, or with the network alone.

    Estimates ∇θ E_q[f(b)] = E[(f(b) − c(s̃)) ∇θ log q(b) + c′(s)·∇θ s − c′(s̃)·∇θ s̃] with the control variate c = η f + r. s and s̃ are
    the relaxed draws of `REBAR`, at temperature τ. r is a network with one hidden layer of `hidden` tanh units. Its input is
    the weights of the elements of one event, and its output is summed over all other elements that are charged jointly. With
    `through_cost=False` the control variate is r alone, and the cost needs no derivative: the site may then be any with finitely many
    values, or a `PlackettLuce`, whose ranking is the order of the perturbed logits z. r takes softmax(z / τ) there, and z̃ is z with noise
    given the ranking (Gadetsky et al. 2020).

    The network, τ and η are trained to minimise the single-sample variance of the gradient with respect to the site's logits. This
    loss is averaged over all elements. r is initialised to zero.

    Args:
        temperature: the initial value of τ, above 0; no unit. Default: 0.5.
        scale: the initial value of η; no unit. It must be 1.0 with `through_cost=False`. Default: 1.0.
        learn: must be True. Default: True.
        through_cost: whether the control variate contains the relaxed cost η f. Default: True.
        hidden: the number of hidden units of the network, at least 1. Default: 32.

    Shapes:
        Any plates and any event shape. One evaluation of the program, with its derivative; none with `through_cost=False`. Costs are
        in nats.

    Assumptions:
        The identity holds for every network r. With `through_cost=True` the relaxed cost is continuous, and the derivative along the
        weights is that of the relaxed cost. Categories of probability 0 have weight 0, and the derivative along them is not used.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot nor a `PermutationMatrix` (with `through_cost=False`: neither finite
            nor a ranking), or that is drawn inside a `scan` in the body of another one; with `through_cost=True` also if the program
            compares, rounds or indexes with the value of the site or of a downstream discrete site, or reads it without its derivative.
        ConfigurationError: if the temperature is not above 0, `learn` is False, `hidden` is below 1, or `scale` is set with
            `through_cost=False`.
        BaselineError: in NumPyro, if the guide is not wrapped by `config_estimators`.

    Example:
        >>> RELAX(hidden=8).learned(3, 2)["in"].shape
        (8, 6)

    References:
        Grathwohl, Choi, Wu, Roeder and Duvenaud (2018), equation 8 and section 3.
        Gadetsky, Struminsky, Robinson, Quadrianto and Vetrov (2020), for rankings.
    """

    through_cost: bool = True  # type: ignore[assignment]
    hidden: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learn:
            raise ConfigurationError(
                "RELAX(learn=False): a network that never learns is no control variate; use REBAR()."
            )
        if not isinstance(self.hidden, int) or self.hidden < 1:
            raise ConfigurationError(f"RELAX(hidden={self.hidden!r}): give the number of hidden units, 1 or more.")
        if not self.through_cost and self.scale != 1.0:
            raise ConfigurationError(
                f"RELAX(scale={self.scale!r}, through_cost=False): the scale multiplies the cost's part of the control variate, "
                "which through_cost=False leaves out; drop one of the two."
            )

    @property
    def declaration(self) -> Declaration:  # type: ignore[override]
        """The declaration; without the cost in its control variate, the cost needs no derivative."""
        return Declaration(
            unbiased=True,
            supports="Bernoulli, one-hot, PermutationMatrix"
            if self.through_cost
            else "finite, PlackettLuce, PermutationMatrix",
            evaluations="1, or 0 without the cost",
            differentiable_costs=self.through_cost,
            derivatives=1,
            source="Grathwohl et al. 2018",
        )

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is neither Bernoulli nor one-hot; without the cost, one that is neither finite nor a ranking."""
        if self.through_cost:
            super().check(site)
        elif site.distribution in ("PlackettLuce", "PermutationMatrix"):
            require_steps(self, site)
        else:
            require_finite(self, site)

    @property
    def uses_slopes(self) -> bool:  # type: ignore[override]
        """Whether the control variate contains the relaxed cost."""
        return self.through_cost

    def learned(self, elements: int, categories: int) -> Mapping[str, Any]:
        """Return the temperature, the scale, and the network's layers."""
        numbers = super().learned(elements, categories)
        if not self.through_cost:
            numbers = {"log_temperature": numbers["log_temperature"]}
        return {**numbers, **_first_layers(self.hidden, elements, categories)}

    def control(self, terms: BranchTerms, weights: Array, known: Mapping[str, Any]) -> tuple[Array, Array]:
        """Return η f + r at the weights, and its derivative."""
        value, slopes = _network(terms.draw, weights, known)
        if not self.through_cost:
            return value, slopes
        relaxed, along = super().control(terms, weights, known)
        return relaxed + value, along + slopes


def _network(draw: Draw, weights: Array, known: Mapping[str, Any]) -> tuple[Array, Array]:
    """Return r, (particles, *plates), and its derivative with respect to the weights (particles, *plates, elements, categories)."""
    xp, (categories, count) = draw.ops.xp, (weights.shape[-1], draw.event_elements)
    events = xp.reshape(weights, (*weights.shape[:-2], -1, count * categories))
    active = xp.tanh(xp.matmul(events, xp.permute_dims(known["in"], (1, 0))) + known["shift"])
    value = xp.sum(active * known["out"], axis=(-2, -1))
    slopes = xp.matmul((1 - active**2) * known["out"], known["in"])
    return value, xp.reshape(slopes, weights.shape)


@lru_cache
def _first_layers(hidden: int, elements: int, categories: int) -> Mapping[str, np.ndarray]:
    """Return the layers of a network that is zero, the same everywhere."""
    rng = np.random.default_rng(0)
    return {
        "in": rng.normal(size=(hidden, elements * categories)) / np.sqrt(elements),
        "shift": np.zeros(hidden),
        "out": np.zeros(hidden),
    }
