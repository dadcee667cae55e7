"""Programs whose training is interrupted and goes on, for both libraries, and the estimators that they have."""

import numpy as np

from pplgrad import (
    REBAR,
    RELAX,
    DecayingAverage,
    DisARM,
    LocalExpectation,
    NeuralBaseline,
    OptimalConstant,
    Reparam,
    ScoreFunction,
)

DATA = np.random.default_rng(0).normal(size=(12, 3))

CHOICES = {
    "default": {},
    "average": ScoreFunction(DecayingAverage(0.8)),
    "average per element": ScoreFunction(DecayingAverage(0.8, per_element=True)),
    "optimal constant": ScoreFunction(OptimalConstant(decay=0.7)),
    "networks": ScoreFunction(NeuralBaseline(hidden=(4,))),
    "one network": ScoreFunction(NeuralBaseline(hidden=(4,), share="loop")),
    "normalized": ScoreFunction(NeuralBaseline(hidden=(4,), normalize_variance=True)),
    "average + network": ScoreFunction(DecayingAverage() + NeuralBaseline(hidden=(4,))),
    "average + network per element": ScoreFunction(DecayingAverage(per_element=True) + NeuralBaseline(hidden=(4,))),
    "REBAR": REBAR(),
    "RELAX": RELAX(),
    "DisARM": DisARM(),
    "every value": LocalExpectation(),
}


def chosen(name):
    """Return the estimators of the program's sites under one of the choices."""
    found = CHOICES[name]
    return found if isinstance(found, dict) else {"z_*": found, "w": Reparam()}


def program(ppl, dist, array, exp, rows=4):
    """Return model and guide: a global weight, and two bits for each row, whose second reads the first; rows are subsampled."""

    def model(x):
        w = ppl.sample("w", dist.Normal(array(np.zeros(3)), 1.0).to_event(1))
        with ppl.plate("data", len(x), subsample_size=rows) as index:
            a = ppl.sample("z_1", dist.Bernoulli(array(0.3)))
            b = ppl.sample("z_2", dist.Bernoulli(0.2 + 0.5 * a))
            mean = (x[index] * w).sum(-1)
            ppl.sample("y", dist.Normal(mean + a - 0.5 * b, 1.0), obs=x[index][..., 0] ** 2)

    def guide(x):
        loc, scale = ppl.param("loc", array(np.zeros(3))), ppl.param("log_scale", array(np.zeros(3)))
        tables = ppl.param("logits", array(np.linspace(-1, 1, 24).reshape(12, 2)))
        ppl.sample("w", dist.Normal(loc, exp(scale)).to_event(1))
        with ppl.plate("data", len(x), subsample_size=rows) as index:
            logits = tables[index]
            a = ppl.sample("z_1", dist.Bernoulli(logits=logits[..., 0]))
            ppl.sample("z_2", dist.Bernoulli(logits=logits[..., 1] + 0.3 * a))

    return model, guide
