"""Baselines of several sites that are evaluated at once, beside the same one after the other: a program and baselines for both libraries."""

import numpy as np

from pplgrad import DecayingAverage, LeaveOneOut, NeuralBaseline
from pplgrad.core.baseline import Baseline, Evaluation

BASELINES = {
    "average": (DecayingAverage(0.8), 1),
    "neural": (NeuralBaseline(hidden=(3, 2)), 1),
    "average+neural": (DecayingAverage(0.8) + NeuralBaseline(hidden=(3,)), 2),
    "shared": (DecayingAverage(0.8) + NeuralBaseline(hidden=(3,), share="loop"), 2),
    "others+neural": (LeaveOneOut() + NeuralBaseline(hidden=(3,)), 3),
    "normalised": (DecayingAverage(0.8) + NeuralBaseline(hidden=(3,), normalize_variance=True), 2),
    "per element": (DecayingAverage(0.8, per_element=True) + NeuralBaseline(hidden=(3,)), 1),
}
"""Baselines, and the particles that they are tried with."""
X = np.array([[0.3, -1.0], [1.2, 0.4], [0.2, 0.7]])


def program(h, data=True):
    """Return three sites in a loop without a plate and two in a plate; networks get the data, or are one number each."""

    def chain(logit, p, x):
        before, rows = 0.0 * p[0], h.array(X) if x is None else x
        for i in range(3):
            before = h.sample(f"z{i}", h.dist.Bernoulli(logits=p[i] + logit * before))
        with h.plate("rows", 3):
            for i in range(2):
                h.sample(f"w{i}", h.dist.Bernoulli(logits=p[i] * rows[..., i] + logit * before))

    def model(x=None):
        chain(h.array(0.7), h.array([0.1, -0.2, 0.3]), x)
        z = h.array(0.4)
        h.sample("y", h.dist.Normal(z, 1.0), obs=h.array(1.3))

    def guide(x=None):
        p = h.param("p", h.array([0.4, 0.9, -0.5]))
        chain(h.param("b", h.array(0.6)), p, x)

    return model, guide, (X,) if data else ()


class MissingAxis(Baseline):
    """Says that it takes several sites at once, and returns one number for each site without the axes of particles and plates."""

    per_site = True
    takes_sites = True

    def __repr__(self):
        return "MissingAxis()"

    def state_shapes(self, plates):
        return {"mean": ()}

    def evaluate(self, terms):
        return Evaluation(terms.state["mean"], None, {"mean": terms.state["mean"]})


def one_by_one(patch):
    """Evaluate every baseline at one site after the other."""
    for kind in (DecayingAverage, NeuralBaseline):
        patch.setattr(kind, "takes_sites", False)


MUTANTS = {}


def mutant(apply):
    MUTANTS[apply.__name__] = apply
    return apply


@mutant
def one_average_for_all_sites(patch):
    from pplgrad.baselines import average

    plain = average.update_averages

    def update(terms, values, decay, per_element):
        mean = {name: 0 * value + terms.ops.xp.mean(value) for name, value in values.items()}
        return plain(terms, mean, decay, per_element)

    patch.setattr(average, "update_averages", update)


@mutant
def shared_networks_that_know_no_number(patch):
    patch.setattr(NeuralBaseline, "numbers", lambda self, site: [0.0] if self.share == "loop" else [])


@mutant
def predictions_of_another_site(patch):
    from pplgrad.engine.baseline_evaluation import Costs

    plain = Costs._predictions

    def predictions(self, key, part, signal):
        return self.ops.xp.flip(plain(self, key, part, signal), axis=1)

    patch.setattr(Costs, "_predictions", predictions)
