"""What relaxations are tested on, the same in both libraries."""

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


def expected(short):
    """Return the expected gradient of the loss under a relaxation of `FINITE`, by enumeration."""
    total = np.zeros(2)
    for x in (0, 1):
        for y in (0, 1):
            weight = two(sigmoid(LOGITS[0]))[x] * two(sigmoid(LOGITS[1]))[y]
            dx, dy = slopes(x, y)
            total += weight * np.array([dx * slope_of(short, x, LOGITS[0]), dy * slope_of(short, y, LOGITS[1])])
    return total


def relaxed_objective_gradient(temperature, size=400):
    """Return the gradient of E[cost] under the binary concrete law, by quadrature over both logistic noises."""
    u = (np.arange(size) + 0.5) / size
    noise = np.log(u) - np.log1p(-u)
    x = sigmoid((LOGITS[0] + noise) / temperature)[:, None]
    y = sigmoid((LOGITS[1] + noise) / temperature)[None, :]
    dx, dy = slopes(x, y)
    return np.array([(dx * x * (1 - x)).mean(), (dy * y * (1 - y)).mean()]) / temperature


def exact():
    """Return the gradient of E[cost] itself."""
    p, q = sigmoid(LOGITS)
    first = sum(two(q)[y] * (cost(1, y) - cost(0, y)) for y in (0, 1))
    second = sum(two(p)[x] * (cost(x, 1) - cost(x, 0)) for x in (0, 1))
    return np.array([p * (1 - p) * first, q * (1 - q) * second])
