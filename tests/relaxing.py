"""What relaxations are tested on, the same in both libraries."""

from dataclasses import replace

import numpy as np

from pplgrad import (
    REBAR,
    RELAX,
    RODEO,
    DoubleCV,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    ReinMax,
    StraightThrough,
)
from pplgrad.estimators import relaxed

FINITE = {"straight-through": StraightThrough(), "reinmax": ReinMax(), "gapped": GappedStraightThrough(0.7, 0.4)}
"""Relaxations without noise of their own: their expected gradient, bias included, is a finite sum."""

NOISY = {"gumbel-softmax": GumbelSoftmax(0.5), "hard": GumbelSoftmax(0.5, hard=True), "gumbel-rao": GumbelRao(5, 0.5)}

LOGITS = np.array([0.4, -0.9])


def cost(x, y):
    """Return a cost of two binary draws (or weights of 1) that is not linear in either."""
    return (x - 0.3) ** 2 * (1 + 2 * y**3) + x**3 - y


def slopes(x, y):
    """Return the derivatives of the cost."""
    return 2 * (x - 0.3) * (1 + 2 * y**3) + 3 * x**2, 6 * (x - 0.3) ** 2 * y**2 - 1


def program(h):
    """Return a program whose objective is the cost alone: the densities of guide and model cancel."""

    def draw():
        return h.sample("z", h.dist.Bernoulli(logits=h.param("a", h.array(LOGITS))).to_event(1))

    def model():
        z = draw()
        h.factor("f", -cost(z[..., 0], z[..., 1]))

    return model, draw


def fixed_prior(h):
    """Return a program whose guide alone has the parameter, so that its gradient is that of the site's logits."""

    def model():
        z = h.sample("z", h.dist.Bernoulli(logits=h.array([0.2, -0.1])).to_event(1))
        h.factor("f", -cost(z[..., 0], z[..., 1]))

    def guide():
        h.sample("z", h.dist.Bernoulli(logits=h.param("a", h.array(LOGITS))).to_event(1))

    return model, guide


LEARNING = {
    "rebar": REBAR(0.6, 0.7),
    "double-cv": DoubleCV(3, scale=0.4),
    "rodeo": RODEO(2),
    "relax": RELAX(0.6, 0.7, hidden=3),
    "relax-alone": RELAX(0.6, through_cost=False, hidden=3),
}
"""Estimators that learn."""


def slope_by_differences(squared, values, step=1e-5):
    """Return the derivative of a function of named arrays by central differences, along a direction, and that direction."""
    rng = np.random.default_rng(1)
    unit = {name: rng.normal(size=np.shape(value)) for name, value in values.items()}

    def at(t):
        return squared({name: value + t * unit[name] for name, value in values.items()})

    return (at(step) - at(-step)) / (2 * step), unit


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def two(weight_of_one):
    """Return weights of the categories 0 and 1."""
    return np.array([1 - weight_of_one, weight_of_one])


def slope_of(short, draw, logit):
    """Return, by its formula, the derivative with respect to the logit of the weight of 1, given the draw."""
    p = sigmoid(logit)
    if short == "straight-through":
        return p * (1 - p)
    if short == "reinmax":
        middle = (draw + p) / 2
        return 2 * middle * (1 - middle) - 0.5 * p * (1 - p)
    log_probs = np.log(two(p))
    other = 1 - draw
    shifted = log_probs.copy()
    shifted[draw] = log_probs.max()
    shifted[other] -= max(0.0, log_probs[other] + 0.4 - log_probs.max())
    w = sigmoid((shifted[1] - shifted[0]) / 0.7)
    return w * (1 - w) / 0.7


def over_draws(slope):
    """Return the expected gradient of the loss, by enumeration, where `slope(element, draw)` is that of an element's weight of 1 given its draw."""
    total = np.zeros(2)
    for x in (0, 1):
        for y in (0, 1):
            weight = two(sigmoid(LOGITS[0]))[x] * two(sigmoid(LOGITS[1]))[y]
            dx, dy = slopes(x, y)
            total += weight * np.array([dx * slope(0, x), dy * slope(1, y)])
    return total


def expected(short):
    """Return the expected gradient of the loss under a relaxation of `FINITE`."""
    return over_draws(lambda element, draw: slope_of(short, draw, LOGITS[element]))


def relaxed_objective_gradient(temperature, size=400):
    """Return the gradient of E[cost] under the binary concrete law, by quadrature over both logistic noises."""
    u = (np.arange(size) + 0.5) / size
    noise = np.log(u) - np.log1p(-u)
    x = sigmoid((LOGITS[0] + noise) / temperature)[:, None]
    y = sigmoid((LOGITS[1] + noise) / temperature)[None, :]
    dx, dy = slopes(x, y)
    return np.array([(dx * x * (1 - x)).mean(), (dy * y * (1 - y)).mean()]) / temperature


def hard_gradient(temperature, size=20_000):
    """Return the expected gradient of the loss where the draws are hard and their slopes those of the concrete weights, by quadrature."""
    u = (np.arange(size) + 0.5) / size
    keys = LOGITS[:, None] + np.log(u) - np.log1p(-u)
    soft = sigmoid(keys / temperature)
    slope = soft * (1 - soft) / temperature
    return over_draws(lambda element, draw: slope[element, (keys[element] > 0) == draw].mean())


THREE = np.array([0.5, -0.6, 0.1])
_ALONG = np.array([0.2, 1.3, -0.7])


def one_of_three(h):
    """Return a program of one site of three categories, whose objective is a cost alone that is not linear in its weights."""

    def draw():
        return h.sample("z", h.one_hot(h.param("a", h.array(THREE))))

    def model():
        z = draw()
        h.factor("f", -((z @ h.array(_ALONG)) ** 3 + z[..., 0] * z[..., 2]))

    return model, draw


def hard_slopes_of_three(temperature, draws=400_000):
    """Return gradients of the loss where draws are hard and their slopes those of the concrete weights, one a row."""
    keys = THREE + np.random.default_rng(0).gumbel(size=(draws, 3))
    hard = np.eye(3)[keys.argmax(-1)]
    soft = np.exp(keys / temperature) / np.exp(keys / temperature).sum(-1, keepdims=True)
    slope = 3 * (hard @ _ALONG)[:, None] ** 2 * _ALONG + hard[:, [2, 0, 0]] * np.array([1, 0, 1])
    return soft * (slope - (soft * slope).sum(-1, keepdims=True)) / temperature


def noise_that_forgets_the_draw(pair, count=None):
    """Return keys whose noise is not conditional on the draw."""
    fixed = pair.ops.stop_gradient(pair.odds)
    u = pair.noise.uniform(tuple(fixed.shape) if count is None else (count, *fixed.shape), fixed)
    return fixed + pair.ops.xp.log(u) - pair.ops.xp.log1p(-u)


_WEIGHT = GumbelRao.weight_of_second


def gumbel_rao_that_sums(self, pair):
    """Return the weight of 1 with the sum of the slopes of all noises, not their mean."""
    return pair.through(self.k * _WEIGHT(self, pair))


def gumbel_rao_without_its_temperature(self, pair):
    """Return the weight of 1 with slopes at temperature 1."""
    return _WEIGHT(replace(self, temperature=1.0), pair)


MUTANTS = {
    "forgets": (relaxed.HardPair, "keys", noise_that_forgets_the_draw),
    "sums": (GumbelRao, "weight_of_second", gumbel_rao_that_sums),
    "temperature": (GumbelRao, "weight_of_second", gumbel_rao_without_its_temperature),
}
"""Broken variants of `GumbelRao`: whose attribute each replaces, its name, and by what."""


HARD = {"hard": GumbelSoftmax(0.5, hard=True), "rao": GumbelRao(5, 0.5), "rao at 1": GumbelRao(2, 1.0)}
"""Relaxations whose draws are hard, with the slopes of concrete weights."""


def exact():
    """Return the gradient of E[cost] itself."""
    p, q = sigmoid(LOGITS)
    first = sum(two(q)[y] * (cost(1, y) - cost(0, y)) for y in (0, 1))
    second = sum(two(p)[x] * (cost(x, 1) - cost(x, 0)) for x in (0, 1))
    return np.array([p * (1 - p) * first, q * (1 - q) * second])
