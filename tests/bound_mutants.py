"""Deliberately broken objectives and multi-sample estimators; the exactness checks must catch every one."""

import math
from dataclasses import dataclass
from typing import Any

from pplgrad import IWAE, OVIS, VIMCO, DisARM, LocalExpectation, ScoreFunction
from pplgrad.engine import signals
from pplgrad.estimators import multi_sample


@dataclass(frozen=True)
class Mutant:
    case: str
    estimator: Any
    apply: Any


MUTANTS: dict[str, Mutant] = {}


def mutant(case, estimator):
    def register(apply):
        MUTANTS[apply.__name__] = Mutant(case, estimator, apply)
        return apply

    return register


@mutant("single", VIMCO())
def own_density_without_gradient(patch):
    """What is only noise in a sum of costs, and is not here: the score in the weights."""
    plain = signals._own_density_held
    patch.setattr(signals, "_own_density_held", lambda ops, layout, run, scores_too: plain(ops, layout, run, True))


@mutant("single", VIMCO())
def vimco_with_the_one(patch):
    """The mean over all particles, the own one too."""

    def surrogate(self, terms):
        weights, xp = terms.weights, terms.ops.xp
        own = xp.mean(weights.logs, axis=1, keepdims=True) + 0.0 * weights.logs
        return multi_sample._against(terms, weights.bound_with(own)), None

    patch.setattr(VIMCO, "surrogate", surrogate)


@mutant("single", VIMCO())
def vimco_with_the_wrong_sign(patch):
    plain = VIMCO.surrogate
    patch.setattr(VIMCO, "surrogate", lambda self, terms: (-plain(self, terms)[0], None))


@mutant("single", OVIS())
def ovis_with_the_own_share(patch):
    """What gamma = 1 does: biased, and labelled so."""
    plain = OVIS.surrogate
    patch.setattr(OVIS, "surrogate", lambda self, terms: plain(OVIS(gamma=1.0), terms))


@mutant("single", OVIS(samples=1))
def ovis_against_the_draw_itself(patch):
    """The control variate from the draw it is for."""

    def branch_surrogate(self, terms):
        xp = terms.ops.xp
        control = xp.mean(terms.costs, axis=1) + 0.5 * terms.downstream
        return xp.sum(terms.draw.score * (terms.downstream - control))

    patch.setattr(OVIS, "branch_surrogate", branch_surrogate)


@mutant("event_in_plate", ScoreFunction())
def one_weight_for_the_program(patch):
    """The elements' weights joined into one."""
    plain = signals.Bounds.__init__

    def joined(self, ops, runs, *rest):
        for layout, _ in runs:
            layout.weight_plates = ()
        plain(self, ops, runs, *rest)

    patch.setattr(signals.Bounds, "__init__", joined)


@mutant("minibatch", VIMCO())
def scale_inside_the_logarithm(patch):
    patch.setattr(signals, "_scale_outside", lambda layout: 1.0)


@mutant("single", LocalExpectation())
def branches_replace_every_weight(patch):
    patch.setattr(signals.Bounds, "_set_in", lambda self, others, found, run: found[:, None] + 0.0 * others[:, :, None])


@mutant("single", DisARM())
def bounds_summed_instead_of_averaged(patch):
    patch.setattr(IWAE, "bound", lambda self, xp, x, axis: 2.0 * plain_bound(self, xp, x, axis))


plain_bound = IWAE.bound


@mutant("hierarchy", ScoreFunction())
def bound_of_another_power(patch):
    def bound(self, xp, logs, axis):
        from pplgrad.core.objectives import log_sum_exp

        return log_sum_exp(xp, 0.5 * logs, axis) / 0.5 - math.log(2)

    patch.setattr(IWAE, "bound", bound)
