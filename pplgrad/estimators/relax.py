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
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.control_variates import REBAR


@dataclass(frozen=True)
class RELAX(REBAR):
    r"""REBAR with a learned network added to its control variate, or with the network alone.

    Estimates ∇θ E_q[f(b)] = E[(f(b) − c(s̃)) ∇θ log q(b) + c′(s)·∇θ s − c′(s̃)·∇θ s̃] with c = η f + r: s and s̃ are the relaxed draws
    of `REBAR`, and r is a network with one hidden layer of `hidden` tanh units, of the weights of an event's elements, summed
    over what else is charged jointly. With `through_cost=False` c is r alone, and the cost needs no derivative. The
    network, τ and η follow the gradient of the single-sample variance of the gradient with respect to the site's logits,
    of the mean cost of all elements; r starts at zero.

    Shapes: any plates and event; one evaluation, with its derivative (none without the cost). Costs in nats.

    Right whatever the network says, and where the relaxed cost (if its part is not left out) is continuous and its derivative its own.
    Categories of probability 0 have weight 0, and the slope along them no part.

    Raises `EstimatorError` on a site that is neither Bernoulli nor one-hot, or (through the cost) whose value (or that of a
    discrete site that follows) the program compares, rounds, uses as an index, or reads without its derivative; `ConfigurationError` if the temperature
    is not above 0, `learn` is False, or a `scale` is set and the cost left out; in NumPyro `BaselineError` if the guide is not wrapped by `config_estimators`.

    >>> RELAX(hidden=8).learned(3, 2)["in"].shape
    (8, 6)

    Source: Grathwohl, Choi, Wu, Roeder and Duvenaud (2018), equation 8 and section 3.
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
        """What the estimator promises: without the cost in its control variate, that needs no derivative."""
        return Declaration(
            unbiased=True,
            supports="Bernoulli, one-hot",
            evaluations="1, or 0 without the cost",
            differentiable_costs=self.through_cost,
            derivatives=1,
            source="Grathwohl et al. 2018",
        )

    @property
    def uses_slopes(self) -> bool:  # type: ignore[override]
        """Whether the control variate holds the relaxed cost."""
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
