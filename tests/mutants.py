"""Deliberately broken estimators, the same for both libraries: the exactness checks must catch every one.

Each mutant patches one piece of the mathematics; it names a program, an estimator for its discrete sites and a number of
particles for which the expected gradient is then wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pplgrad import DecayingAverage, LeaveOneOut, OptimalConstant, ScoreFunction
from pplgrad.baselines import average, leave_one_out, optimal
from pplgrad.core.baseline import Evaluation, SumOfBaselines
from pplgrad.engine import dependencies, downstream, layout, signals
from pplgrad.estimators import score


@dataclass(frozen=True)
class Mutant:
    """A broken variant: `apply(monkeypatch)` breaks it, `case` under `estimator` shows it."""

    apply: Callable[[Any], None]
    case: str
    estimator: ScoreFunction = ScoreFunction()
    particles: int = 1
    stateful: bool = False


MUTANTS: dict[str, Mutant] = {}


def mutant(case: str, estimator: ScoreFunction = ScoreFunction(), particles: int = 1, stateful: bool = False):  # type: ignore[no-untyped-def]
    def register(apply):  # type: ignore[no-untyped-def]
        MUTANTS[apply.__name__] = Mutant(apply, case, estimator, particles, stateful)
        return apply

    return register


@mutant("single")
def wrong_sign_of_the_score_term(patch):
    plain = score.ScoreFunction.surrogate
    patch.setattr(score.ScoreFunction, "surrogate", lambda self, terms: (-plain(self, terms)[0], None))


@mutant("single")
def no_score_term(patch):
    plain = score.ScoreFunction.surrogate
    patch.setattr(score.ScoreFunction, "surrogate", lambda self, terms: (0.0 * plain(self, terms)[0], None))


@mutant("hierarchy")
def only_direct_dependencies(patch):
    """A cost is charged to the sites that it reads, and not to those which decide what it reads."""
    patch.setattr(layout, "cost_dependencies", lambda sites, costs, closed: [dict(cost.reads) for cost in costs])


@mutant("hierarchy")
def guide_costs_not_charged(patch):
    """Entropy terms of later sites are left out of the downstream cost."""

    def without_guide(sites, costs, closed):
        found = dependencies.cost_dependencies(sites, costs, closed)
        return [{} if cost.sign < 0 else depends for cost, depends in zip(costs, found, strict=True)]

    patch.setattr(layout, "cost_dependencies", without_guide)


@mutant("nested_plates")
def guide_costs_with_the_wrong_sign(patch):
    plain = layout.Layout.build.__func__

    def build(cls, sites, costs, objective=None):
        from dataclasses import replace

        result = plain(cls, sites, [replace(cost, sign=1.0) for cost in costs])
        return result

    patch.setattr(layout.Layout, "build", classmethod(build))


@mutant("model_only_plate")
def plate_of_the_model_averaged(patch):
    """A plate that the site does not have is averaged instead of summed."""
    plain = downstream._linked

    def linked(ops, stack, link, ndim):
        count = int(np.prod([stack.shape[axis] for axis in link.summed])) if link.summed else 1
        return plain(ops, stack, link, ndim) / count

    patch.setattr(downstream, "_linked", linked)


@mutant("batch_without_plate")
def undeclared_batch_averaged(patch):
    """Elements of a batch dimension that no plate declares are averaged instead of taken jointly."""
    plain = downstream.to_shape

    def shaped(ops, x, shape):
        result = plain(ops, x, shape)
        return result * (int(np.prod(result.shape)) / int(np.prod(x.shape)))

    patch.setattr(downstream, "to_shape", shaped)


@mutant("reparameterized_parent")
def score_blind_to_its_parents(patch):
    """The score term carries no gradient to the parameters of a reparameterized parent (nor to its own)."""
    plain = score.ScoreFunction.surrogate

    def surrogate_(self, terms):
        from dataclasses import replace

        return plain(self, replace(terms, log_prob=terms.ops.stop_gradient(terms.log_prob)))

    patch.setattr(score.ScoreFunction, "surrogate", surrogate_)


@mutant("single", ScoreFunction(LeaveOneOut()), particles=2)
def leave_one_out_with_the_one(patch):
    def evaluate(self, terms):
        return Evaluation(terms.ops.xp.mean(terms.cost, axis=0, keepdims=True), None, {})

    patch.setattr(leave_one_out.LeaveOneOut, "evaluate", evaluate)


@mutant("single", ScoreFunction(OptimalConstant()), particles=2)
def optimal_constant_with_the_one(patch):
    def evaluate(self, terms):
        xp, square = terms.ops.xp, terms.score_squared()
        value = xp.sum(square * terms.cost, axis=0, keepdims=True) / xp.sum(square, axis=0, keepdims=True)
        return Evaluation(terms.ops.stop_gradient(value), None, {})

    patch.setattr(optimal.OptimalConstant, "evaluate", evaluate)


@mutant("single", ScoreFunction(DecayingAverage(0.8)), stateful=True)
def average_with_the_current_draw(patch):
    """DESIGN: shrinks the gradient (0.944 of the truth in a released library)."""
    plain = average.DecayingAverage.evaluate

    def evaluate(self, terms):
        _, loss, state = plain(self, terms)
        return Evaluation(state["mean"] / state["weight"], loss, state)

    patch.setattr(average.DecayingAverage, "evaluate", evaluate)


@mutant("single", particles=2)
def two_leave_one_outs_in_a_row(patch):
    """The sum that pplgrad refuses: the second sees the particle's own cost through the others' residuals."""
    patch.setattr(SumOfBaselines, "__post_init__", lambda self: None)
    plain = score.ScoreFunction.surrogate
    twice = ScoreFunction(LeaveOneOut() + LeaveOneOut())
    patch.setattr(score.ScoreFunction, "surrogate", lambda self, terms: plain(twice, terms))


@mutant("single", particles=3)
def particles_summed_instead_of_averaged(patch):
    plain = score.ScoreFunction.surrogate
    patch.setattr(
        score.ScoreFunction, "surrogate", lambda self, terms: (plain(self, terms)[0] * terms.log_prob.shape[0], None)
    )


@mutant("single")
def score_read_as_the_cost(patch):
    """The downstream cost carries gradient as well: the product rule where the score identity belongs."""
    patch.setattr(signals, "downstream", lambda *args: downstream.downstream(*args) * 1.5)
