"""Every estimator at every kind of site: what a refusal recommends is accepted at that very site, in both libraries."""

import re
from functools import cache, partial

from pplgrad import PplgradError, estimators
from pplgrad.estimators.registry import every_estimator

SITES = {
    "bernoulli": lambda h: h.dist.Bernoulli(probs=h.array(0.3)),
    "bernoulli-event": lambda h: h.dist.Bernoulli(probs=h.array([0.3, 0.6])).to_event(1),
    "bernoulli-many": lambda h: h.dist.Bernoulli(probs=h.array([0.3] * 13)).to_event(1),
    "categorical-2": lambda h: h.dist.Categorical(probs=h.array([0.3, 0.7])),
    "categorical-3": lambda h: h.dist.Categorical(probs=h.array([0.3, 0.2, 0.5])),
    # More than any estimator lists at once, which is 4,096.
    "categorical-4100": lambda h: h.dist.Categorical(logits=h.array([0.0] * 4100)),
    "categorical-1": lambda h: h.dist.Categorical(probs=h.array([1.0])),
    "categorical-event": lambda h: h.dist.Categorical(logits=h.array([[0.0, 1.0, 0.4]] * 2)).to_event(1),
    "one-hot": lambda h: h.one_hot(h.array([0.1, 0.4, 0.2])),
    "poisson": lambda h: h.dist.Poisson(h.array(2.0)),
    "geometric": lambda h: h.dist.Geometric(probs=h.array(0.4)),
    "normal": lambda h: h.dist.Normal(h.array(0.0), h.array(1.0)),
    "gamma": lambda h: h.dist.Gamma(h.array(2.0), h.array(1.0)),
    "binomial": lambda h: h.dist.Binomial(total_count=3, probs=h.array(0.4)),
    "multinomial": lambda h: h.dist.Multinomial(total_count=3, probs=h.array([0.4, 0.6])),
    "multivariate": lambda h: h.dist.MultivariateNormal(
        h.array([0.0, 1.0]), scale_tril=h.array([[1.0, 0.0], [0.2, 1.0]])
    ),
}


def mixture(h, components):
    """Return a mixture of so many numbers."""
    where = h.array([0.5 * k for k in range(components)])
    return h.dist.MixtureSameFamily(h.dist.Categorical(logits=where), h.dist.Normal(where, 1.0))


SITES |= {f"mixture-{components}": partial(mixture, components=components) for components in (1, 3)}
NAMES = {type(estimator).__name__ for estimator in every_estimator()}


def program(h, site):
    """Return a program of one site, the same in guide and model."""
    return lambda: h.sample("z", SITES[site](h))


def advice(message):
    """Return the names of the estimators that a refusal recommends."""
    return [name for name in re.findall(r"(\w+)\(\)", message.rsplit("use ", 1)[-1]) if name in NAMES]


def wrong_advice(refusal):
    """Return the estimators that a refusal recommends and that are refused too; `refusal(estimator)` is its text or None."""
    recommended: dict[str, str] = {}
    refusal = cache(refusal)  # Many of those that are recommended have been tried before.
    for estimator in every_estimator():
        message = refusal(estimator)
        if message is None:
            continue
        assert "'z'" in message, message
        names = advice(message)
        assert names, message
        recommended |= dict.fromkeys(names, message)
    return {
        name: (told, why)
        for name, why in recommended.items()
        if (told := refusal(getattr(estimators, name)())) is not None
    }


def text_of(step):
    """Return what a step refuses with, or None."""
    try:
        step()
    except PplgradError as error:
        return str(error)
    return None
