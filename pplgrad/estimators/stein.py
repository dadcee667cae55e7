"""Leave-one-out with control variates from discrete Stein operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, Ops, sum_over_categories, sum_over_draws
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.control_variates import WithSlopes, again_with_slopes
from pplgrad.estimators.every_draw import WithDrawsAlike

_HIDDEN = 32


@dataclass(frozen=True)
class RODEO(WithDrawsAlike, WithSlopes):
    r"""The RODEO estimator: leave-one-out with control variates from a discrete Stein operator, for the scores and the baselines.

    Estimates ∇θ E_q[f(z)] =
    E[1/k Σ_i (f(z_i) − 1/(k − 1) Σ_{j≠i} (f(z_j) + α (A h_j)(z_j))) ∇θ log q(z_i) + β (A h̃_i ∇θ log q)(z_i)] over k draws of the site.
    The Gibbs Stein operator (A h)(z) = 1/D Σ_d Σ_v q_d(v) (h(z with z_d = v) − h(z)) has mean zero for every h.

    The functions h and h̃ are computed from the other draws: h_i(z) = 1/(k − 1) Σ_{j≠i} H(f(z_j), f′(z_j)·(z − z_j)). With `learn=True`
    H is a network with two outputs, one for h and one for h̃. The network, α and β are trained to minimise the single-sample variance
    of the gradient with respect to the site's logits. This loss is averaged over all elements. α and β are initialised to 0. With
    `learn=False` H is the sum of its arguments, and α = β = `scale`. In the derivatives, downstream discrete sites are replaced by
    their probabilities.

    Args:
        samples: the number k of draws of the site, including the program's own; at least 2. Default: 2.
        learn: whether H, α and β are learned. Default: True.
        scale: α and β with `learn=False`; no unit. Default: 1.0.
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any plates and any event shape. k − 1 evaluations of the program, and k evaluations with their derivative. Costs are in nats.

    Assumptions:
        The cost has a finite derivative with respect to the weights at which it is evaluated. The mean of the estimate does not
        depend on the value of that derivative. Categories of probability 0 have weight 0, and the derivative along them is not
        used.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot, or that is drawn inside a `scan` in the body of another one; if the program
            compares, rounds or indexes with the value of the site or of a downstream discrete site.
        ConfigurationError: if `samples` is below 2, or `scale` is set with `learn=True`.
        BaselineError: in NumPyro, if `learn=True` and the guide is not wrapped by `config_estimators`.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.

    Example:
        >>> RODEO(samples=3).declaration.unbiased
        True

    References:
        Shi, Zhou, Hwang, Titsias and Mackey (2022), "Gradient estimation with discrete Stein operators", sections 3 and 4, with the
        Gibbs operator.
    """

    samples: int = 2
    learn: bool = True
    scale: float = 1.0
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="Bernoulli, one-hot",
        evaluations="2 samples − 1",
        differentiable_costs=True,
        derivatives=1,
        source="Shi et al. 2022",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.samples, int) or self.samples < 2:
            raise ConfigurationError(f"RODEO(samples={self.samples!r}): give the number of draws, 2 or more.")
        if self.learn and self.scale != 1.0:
            raise ConfigurationError(
                f"RODEO(scale={self.scale!r}): the scales are learned, from 0; set one with RODEO(learn=False, scale={self.scale!r})."
            )

    def learned(self, elements: int, categories: int) -> Mapping[str, Any]:
        """Return the two scales and the network's layers."""
        return {"alpha": 0.0, "beta": 0.0, **_first_layers()} if self.learn else {}

    def alternatives(self, draw: Draw) -> Alternatives:
        """Draw the site again, and ask for the derivative at all draws."""
        return again_with_slopes(draw, self.samples, draw.learned or {"alpha": self.scale, "beta": self.scale})

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return Σ a · log q over elements and categories, where a are the coefficients."""
        ops, xp = terms.ops, terms.ops.xp
        return xp.sum(ops.stop_gradient(terms.once("coefficients", self._coefficients)) * terms.draw.log_probs)

    def loss_of(self, terms: BranchTerms) -> Array | None:
        """Return the squared gradient with respect to the logits, with gradient to what is learned alone."""
        if not self.learn:
            return None
        ops, xp = terms.ops, terms.ops.xp
        found = terms.once("coefficients", self._coefficients)
        probs = xp.exp(ops.stop_gradient(terms.draw.log_probs))
        gradient = found - probs * sum_over_categories(xp, found)
        return ops.only(xp.mean(xp.sum(gradient**2, axis=-1)), list(terms.alternatives.kept[1].values()))

    def _coefficients(self, terms: BranchTerms) -> Array:
        """Return what multiplies log q of each category, (particles, *plates, elements, categories)."""
        draw, ops, xp, k = terms.draw, terms.ops, terms.ops.xp, self.samples
        index, known = terms.alternatives.kept
        hard = draw.one_hot(index)
        probs = xp.exp(ops.stop_gradient(draw.log_probs))[:, None, ..., None]
        costs = xp.concat([terms.downstream[:, None], terms.costs], axis=1)
        elements = hard.shape[-2]
        # Draw i on axis 1 takes from the other draws, on axis 2.
        slope, theirs, cost = (_of_others(ops, x) for x in (ops.stop_gradient(terms.slopes), hard, costs))
        mine = hard[:, :, None]
        line = xp.sum(slope * (mine - theirs), axis=(-2, -1))
        # What f moves by where one element takes another category.
        step = slope - sum_over_categories(xp, slope * mine)
        here = xp.mean(self._network(xp, known, cost, line), axis=2)
        there = self._there(xp, known, (cost, line, step), hard, here)
        weighted = probs * there
        total = xp.sum(weighted, axis=(-3, -2))
        held = costs + known["alpha"] * (total[..., 0] / elements - here[..., 0])
        others = (sum_over_draws(xp, held)[:, None] - held) / (k - 1)
        weighted, whole = weighted[..., 1], total[..., 1][..., None, None]
        stays = whole - sum_over_categories(xp, weighted)
        extra = (stays * hard + weighted) / elements - here[..., 1][..., None, None] * hard
        return sum_over_draws(xp, (costs - others)[..., None, None] * hard + known["beta"] * extra) / k

    def _there(self, xp: Any, known: Mapping[str, Any], at: tuple[Array, ...], hard: Array, here: Array) -> Array:
        """Return the mean of H over the other draws where one element takes another category, with a category's place before H's two."""
        cost, line, step = at
        if step.shape[-1] > 2:
            moved = line[..., None, None] + step
            return xp.mean(self._network(xp, known, cost[..., None, None], moved), axis=2)
        # Of two categories one stays as it is, and moves nothing.
        moved = line[..., None] + sum_over_categories(xp, step)[..., 0]
        flipped = xp.mean(self._network(xp, known, cost[..., None], moved), axis=2)
        return xp.where(hard[..., None] > 0, here[..., None, None, :], flipped[..., None, :])

    def _network(self, xp: Any, known: Mapping[str, Any], cost: Array, line: Array) -> Array:
        """Return H of a cost and of what a line adds to it: two outputs behind the shape of the line."""
        if not self.learn:
            both = (cost + line)[..., None]
            return xp.concat([both, both], axis=-1)
        # A cost is of fewer dimensions than the line is: the product with its weights is small.
        weights = known["in"]
        active = xp.tanh((cost[..., None] * weights[0] + known["shift"]) + line[..., None] * weights[1])
        return xp.matmul(active, known["out"])


def _of_others(ops: Ops, x: Array) -> Array:
    """Return, for (particles, k, ...), what draw i takes from: (particles, i, k − 1 other draws, ...)."""
    k = x.shape[1]
    rows = [ops.stack([x[:, j] for j in range(k) if j != i], axis=1) for i in range(k)]
    return ops.stack(rows, axis=1)


@lru_cache
def _first_layers() -> Mapping[str, np.ndarray]:
    """Return the layers of a network that has learned nothing, the same everywhere."""
    rng = np.random.default_rng(0)
    return {
        "in": rng.normal(size=(2, _HIDDEN)) / np.sqrt(2),
        "shift": np.zeros(_HIDDEN),
        "out": rng.normal(size=(_HIDDEN, 2)) / np.sqrt(_HIDDEN),
    }
