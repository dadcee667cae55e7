"""Score-function estimators whose control variates use the derivative of the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.array_ops import Array, sum_over_categories, sum_over_draws
from pplgrad.core.draw import Draw
from pplgrad.core.estimator import BranchTerms, Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError
from pplgrad.estimators.every_draw import WithDrawsAlike
from pplgrad.estimators.perturbed import perturbed
from pplgrad.estimators.site_requirements import require_relaxable, require_steps, require_unscanned


class WithSlopes(Estimator):
    """What the estimators of this family share."""

    uses_score: ClassVar[bool] = True
    uses_branches: ClassVar[bool] = True
    uses_slopes: ClassVar[bool] = True

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is neither Bernoulli nor one-hot, and one inside a scan."""
        require_steps(self, site)
        require_relaxable(self, site)


def _dot(xp: Any, slopes: Array, weights: Array) -> Array:
    """Return Σ slopes · weights over elements and categories."""
    return xp.sum(slopes * weights, axis=(-2, -1))


@dataclass(frozen=True)
class MuProp(WithSlopes):
    r"""The MuProp estimator: the score function minus a first-order Taylor expansion of the cost around the mean.

    Estimates ∇θ E_q[f(z)] = E[(f(z) − f(μ) − f′(μ)·(z − μ)) ∇θ log q(z)] + f′(μ)·∇θ μ. μ are the probabilities of the
    categories. The last term adds the gradient of the expansion back. In the evaluation at μ, downstream discrete sites are
    replaced by their probabilities as well (a mean-field pass).

    Shapes:
        Any plates and any event shape. One evaluation of the program, with its derivative. Costs are in nats.

    Assumptions:
        The cost has a finite derivative with respect to the weights at which it is evaluated. The mean of the estimate does not
        depend on the value of that derivative. Categories of probability 0 have weight 0, and the derivative along them is not
        used.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot nor a `PermutationMatrix`, or that is drawn inside a `scan` in the body of
            another one; if the program compares, rounds or indexes with the value of the site or of a downstream discrete site.

    Example:
        >>> MuProp().declaration.differentiable_costs
        True

    References:
        Gu, Levine, Sutskever and Mnih (2016), equation 3.
    """

    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="Bernoulli, one-hot",
        evaluations=1,
        differentiable_costs=True,
        derivatives=1,
        source="Gu et al. 2016",
    )

    def alternatives(self, draw: Draw) -> Alternatives:
        """Ask for the cost and its derivative at the probabilities."""
        probs = draw.ops.xp.exp(draw.ops.stop_gradient(draw.log_probs))
        return Alternatives(weights=probs[:, None])

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return (f(z) − expansion at z) log q(z) + f′(μ)·μ."""
        draw, ops, xp = terms.draw, terms.ops, terms.ops.xp
        probs, slopes = xp.exp(draw.log_probs), ops.stop_gradient(terms.slopes[:, 0])
        step = draw.one_hot(draw.index) - ops.stop_gradient(probs)
        left = terms.downstream - ops.stop_gradient(terms.soft_costs[:, 0]) - _dot(xp, slopes, step)
        return xp.sum(draw.score * left) + xp.sum(slopes * probs)


@dataclass(frozen=True)
class DoubleCV(WithDrawsAlike, WithSlopes):
    r"""The double control variate estimator: leave-one-out with two control variates from derivatives of the cost.

    Estimates ∇θ E_q[f(z)] = E[1/k Σ_i (f(z_i) − c_i(z_i) − b_i) ∇θ log q(z_i) + ḡ_i·∇θ μ] over k draws of the site. μ are the
    probabilities of the categories. ḡ_i = α/(k − 1) Σ_{j≠i} f′(z_j) is computed from the other draws only. The first control
    variate is c_i(z) = ḡ_i·(z − μ). The second is part of the baseline b_i = 1/(k − 1) Σ_{j≠i} [f(z_j) − c_j(z_j)] over the other
    draws, which has the mean of f. In the derivatives, downstream discrete sites are replaced by their probabilities.

    With `learn=True` α is trained to minimise the single-sample variance of the gradient with respect to the site's logits. This
    loss is averaged over all elements.

    Args:
        samples: the number k of draws of the site, including the program's own; at least 2. Default: 2.
        scale: α, or its initial value if it is learned; no unit. Default: 0.0.
        learn: whether α is learned. Default: True.
        differentiate: the draws at which the costs are differentiated along the parameters that they contain, such as a decoder's: "own" is the
            program's own draw, "all" are all draws that the estimator evaluates, with equal weights. Both have the same mean; "all" has the
            smaller variance, and takes longer. Default: "own".

    Shapes:
        Any plates and any event shape. k − 1 evaluations of the program, and k evaluations with their derivative. Costs are in
        nats.

    Assumptions:
        The cost has a finite derivative with respect to the weights at which it is evaluated. The mean of the estimate does not
        depend on the value of that derivative. Categories of probability 0 have weight 0, and the derivative along them is not
        used.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot, or that is drawn inside a `scan` in the body of another one; if the program
            compares, rounds or indexes with the value of the site or of a downstream discrete site.
        ConfigurationError: if `samples` is below 2.
        BaselineError: in NumPyro, if `learn=True` and the guide is not wrapped by `config_estimators`.
        EstimatorError: with `differentiate="all"` under an objective that combines particles, or beside a site under `Enumerate`.

    Example:
        >>> DoubleCV(samples=2).learned(1, 2)
        {'scale': 0.0}

    References:
        Titsias and Shi (2022), section 3, with one α for both control variates.
    """

    samples: int = 2
    scale: float = 0.0
    learn: bool = True
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="Bernoulli, one-hot",
        evaluations="2 samples − 1",
        differentiable_costs=True,
        derivatives=1,
        source="Titsias and Shi 2022",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.samples, int) or self.samples < 2:
            raise ConfigurationError(f"DoubleCV(samples={self.samples!r}): give the number of draws, 2 or more.")

    def learned(self, elements: int, categories: int) -> Mapping[str, Any]:
        """Return the scale."""
        return {"scale": self.scale} if self.learn else {}

    def alternatives(self, draw: Draw) -> Alternatives:
        """Draw the site again, and ask for the derivative at all draws."""
        return again_with_slopes(draw, self.samples, draw.learned.get("scale", self.scale))

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return 1/k Σ_i (f_i − c_i(z_i) − b_i) log q(z_i) + ḡ_i·μ."""
        draw, ops, xp, k = terms.draw, terms.ops, terms.ops.xp, self.samples
        index, _ = terms.alternatives.kept
        left, others = (ops.stop_gradient(x) for x in terms.once("signals", self._signals))
        log_q = xp.sum(draw.log_q(index), axis=-1)
        return (xp.sum(log_q * left) + xp.sum(sum_over_draws(xp, others) * xp.exp(draw.log_probs))) / k

    def loss_of(self, terms: BranchTerms) -> Array | None:
        """Return the squared gradient with respect to the logits, with gradient to the scale alone."""
        if not self.learn:
            return None
        draw, ops, xp = terms.draw, terms.ops, terms.ops.xp
        _, scale = terms.alternatives.kept
        left, others = terms.once("signals", self._signals)
        probs = xp.exp(ops.stop_gradient(draw.log_probs))[:, None]
        scores = left[..., None, None] * (ops.stop_gradient(terms.alternatives.weights) - probs)
        paths = probs * (others - sum_over_categories(xp, others * probs))
        gradient = sum_over_draws(xp, scores + paths) / self.samples
        return ops.only(xp.mean(xp.sum(gradient**2, axis=-1)), [scale])

    @staticmethod
    def _signals(terms: BranchTerms) -> tuple[Array, Array]:
        """Return what multiplies each score, (particles, k, *plates), and ḡ_i."""
        ops, xp, (_, scale) = terms.ops, terms.ops.xp, terms.alternatives.kept
        probs = xp.exp(ops.stop_gradient(terms.draw.log_probs))[:, None]
        others = scale * _others(xp, ops.stop_gradient(terms.slopes))
        costs = xp.concat([terms.downstream[:, None], terms.costs], axis=1)
        held = costs - _dot(xp, others, ops.stop_gradient(terms.alternatives.weights) - probs)
        return held - _others(xp, held), others


def again_with_slopes(draw: Draw, count: int, kept: Any) -> Alternatives:
    """Return count − 1 more draws, and the draws as weights to ask for the derivative at all of them."""
    xp = draw.ops.xp
    more = draw.again_index(count - 1)
    index = xp.concat([draw.index[:, None], more], axis=1)
    return Alternatives(draw.embed(more), (index, kept), weights=draw.one_hot(index))


def _others(xp: Any, x: Array) -> Array:
    """Return, for each draw on axis 1, the mean of the others."""
    return (sum_over_draws(xp, x)[:, None] - x) / (x.shape[1] - 1)


@dataclass(frozen=True)
class REBAR(WithSlopes):
    r"""The REBAR estimator: the score function with a reparameterized concrete (Gumbel-softmax) relaxation as control variate.

    Estimates ∇θ E_q[f(b)] = E[(f(b) − η f(s̃)) ∇θ log q(b) + η f′(s)·∇θ s − η f′(s̃)·∇θ s̃]. s is the softmax, at temperature τ, of
    the log probabilities perturbed by Gumbel noise whose argmax is the draw b. s̃ has the same value as s, but is a function of
    noise conditional on b (common random numbers), so that s and s̃ differ only in their gradients. Downstream discrete sites are
    relaxed too. At a `PermutationMatrix` the perturbed logits are ordered, s is their NeuralSort, and s̃ has noise given the order (Gadetsky
    et al. 2020).

    With `learn=True` τ and η are trained to minimise the single-sample variance of the gradient with respect to the site's logits.
    This loss is averaged over all elements.

    Args:
        temperature: τ, above 0, or its initial value if it is learned; no unit. Default: 0.5.
        scale: η, or its initial value if it is learned; no unit. Default: 1.0.
        learn: whether τ and η are learned. Default: True.

    Shapes:
        Any plates and any event shape. One evaluation of the program, with its derivative. Costs are in nats.

    Assumptions:
        The relaxed cost is continuous, and the derivative along the weights is that of the relaxed cost. At a jump, or behind
        `detach`, the last two terms do not restore what the control variate removes from the score term, and the estimate is
        biased. A cost that reads the value without its derivative is refused. Categories of probability 0 have weight 0, and the
        derivative along them is not used.

    Raises:
        EstimatorError: on a site that is neither Bernoulli nor one-hot, or that is drawn inside a `scan` in the body of another one; if the program
            compares, rounds or indexes with the value of the site or of a downstream discrete site; if a cost reads such a value
            without its derivative (`detach`, `stop_gradient`, a comparison of a quantity computed from it).
        ConfigurationError: if the temperature is not above 0.
        BaselineError: in NumPyro, if `learn=True` and the guide is not wrapped by `config_estimators`.

    Example:
        >>> REBAR(temperature=1.0).learned(1, 2)
        {'log_temperature': 0.0, 'scale': 1.0}

    References:
        Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein (2017), equation 9, sections 3.2 and 3.4.
        Gadetsky, Struminsky, Robinson, Quadrianto and Vetrov (2020), and Grover, Wang, Zweig and Ermon (2019), for permutations.
    """

    temperature: float = 0.5
    scale: float = 1.0
    learn: bool = True
    declaration: ClassVar[Declaration] = Declaration(
        unbiased=True,
        supports="Bernoulli, one-hot, PermutationMatrix",
        evaluations=1,
        differentiable_costs=True,
        derivatives=1,
        source="Tucker et al. 2017",
    )

    def check(self, site: SiteInfo) -> None:
        """Refuse a site that is neither Bernoulli nor one-hot nor a permutation matrix."""
        if site.distribution == "PermutationMatrix":
            require_unscanned(self, site)
        else:
            super().check(site)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigurationError(f"REBAR(temperature={self.temperature}): the temperature must be above 0.")

    @property
    def needs_exact_slopes(self) -> bool:
        """Whether the control variate contains the relaxed cost, whose derivative must then be exact."""
        return self.uses_slopes

    def learned(self, elements: int, categories: int) -> Mapping[str, Any]:
        """Return the logarithm of the temperature, and the scale."""
        return {"log_temperature": math.log(self.temperature), "scale": self.scale} if self.learn else {}

    def alternatives(self, draw: Draw) -> Alternatives:
        """Ask for the cost and its derivative at the relaxed draw."""
        ops, xp = draw.ops, draw.ops.xp
        known = draw.learned
        temperature = xp.exp(known["log_temperature"]) if self.learn else self.temperature
        drawn = perturbed(draw)
        weights = drawn.weights(temperature)[:, None]
        return Alternatives(
            kept=(drawn, weights, temperature, known),
            weights=weights if self.through_cost else None,
            temperature=ops.stop_gradient(temperature) if self.learn else temperature,
        )

    @property
    def through_cost(self) -> bool:
        """Whether the control variate contains the relaxed cost."""
        return True

    def control(self, terms: BranchTerms, weights: Array, known: Mapping[str, Any]) -> tuple[Array, Array]:
        """Return the control variate at the weights, (particles, *plates), and its derivative with respect to them.

        The cost moves with the weights along its slope, and what is in `known` keeps its gradient.
        """
        ops, xp = terms.ops, terms.ops.xp
        slopes, scale = terms.slopes[:, 0], known.get("scale", self.scale)
        moved = _dot(xp, ops.stop_gradient(slopes), weights - ops.stop_gradient(weights))
        return scale * (ops.stop_gradient(terms.soft_costs[:, 0]) + moved), scale * slopes

    def branch_surrogate(self, terms: BranchTerms) -> Array:
        """Return (f(b) − c(s̃)) log q(b) + (c′(s)·∇θ s − c′(s̃)·∇θ s̃) θ."""
        draw, ops, xp = terms.draw, terms.ops, terms.ops.xp
        drawn = terms.alternatives.kept[0]
        value, path = (ops.stop_gradient(x) for x in terms.once("control", self._value_and_path))
        return xp.sum(draw.score * (terms.downstream - value)) + xp.sum(path * drawn.log_weights)

    def _value_and_path(self, terms: BranchTerms) -> tuple[Array, Array]:
        """Return the control variate at the keys given the draw, and how it moves with θ along the keys less along those given the draw."""
        drawn, weights, temperature, known = terms.alternatives.kept
        value, slopes = self.control(terms, weights[:, 0], known)
        along = drawn.along_keys(slopes, weights[:, 0], temperature)
        return value, along - drawn.given(along)

    def loss_of(self, terms: BranchTerms) -> Array | None:
        """Return the squared gradient with respect to the logits, with gradient to what is learned alone."""
        if not self.learn:
            return None
        ops, xp = terms.ops, terms.ops.xp
        drawn, _, _, known = terms.alternatives.kept
        value, path = terms.once("control", self._value_and_path)
        gradient = drawn.at_elements(terms.downstream - value) * drawn.score() + drawn.to_logits(path)
        return ops.only(xp.mean(drawn.squared(gradient)), list(known.values()))
