"""What is proved of the thermodynamic variational objective, the same in both libraries."""

from dataclasses import replace

import numpy as np

from pplgrad import TVO
from pplgrad.core import thermodynamic
from pplgrad.core.objectives import CostWeights

OBJECTIVES = {
    "left": TVO((0.0, 0.2, 0.6, 1.0)),
    "right": TVO((0.0, 0.2, 0.6, 1.0), upper=True),
    "ratios": TVO(3, first=0.1),
}
ENDS = {"left": (0.0, 0.2, 0.6), "right": (0.2, 0.6, 1.0), "ratios": (0.0, 0.1, 0.1**0.5)}
SIZES = {"left": (0.2, 0.4, 0.4), "right": (0.2, 0.4, 0.4), "ratios": (0.1, 0.1**0.5 - 0.1, 1 - 0.1**0.5)}

OF_MODEL = CostWeights(1.0, 1.0, 0.0)
"""The model's densities alone."""

CASES = {"single": 0, "event_in_plate": 1, "minibatch": 1}
"""Programs with the number of batch dimensions whose elements have weights of their own."""

GUIDE = ("a",)
"""The parameters of the guide; those of the model are the others."""


def followed(short, fixed, of_guide):
    """Return a function of log weights whose gradient, with draws that do not move, is the covariance form of one of the two programs.

    A parameter of the guide enters the log weights by −log q alone, one of the model by log p alone.
    """

    def combine(xp, logs):
        count, total = logs.shape[0], 0.0
        held = fixed(logs)
        for end, size in zip(ENDS[short], SIZES[short], strict=True):
            weights = xp.exp(end * held)
            weights = weights / weights.sum(0)
            apart = count / (count - 1) * weights * (held - (weights * held).sum(0))
            share = ((1 if end else 0) * weights - (1 - end) * apart) if of_guide else weights + end * apart
            total = total + size * (share * logs).sum(0)
        return total

    return combine


def limit(q, p, slopes_q, slopes_p, short):
    """Return the objective over all outcomes and its derivatives, by exact expectations: value, by log q, by log p."""
    value = np.zeros(())
    by_q, by_p = 0.0, 0.0
    f = np.log(p / q)
    for end, size in zip(ENDS[short], SIZES[short], strict=True):
        tempered = q ** (1 - end) * p**end
        tempered /= tempered.sum()
        mean = (tempered * f).sum()
        value = value + size * mean
        apart = tempered * (f - mean)
        by_p = by_p + size * ((tempered + end * apart) @ slopes_p)
        by_q = by_q + size * ((-tempered + (1 - end) * apart) @ slopes_q)
    return value, by_q, by_p


COUNTED = ("masked", "scaled", "minibatch", "subsampled", "hierarchy")
"""Programs weighed as a whole; in the first four a latent draw counts with a mask or a scale, which does not move what is drawn."""


def whole(short):
    """Return the objective with one weight of the whole program."""
    return replace(OBJECTIVES[short], plates=())


def once_each(f, slopes_f, slopes_p, slopes_q, short):
    """Return the gradient of the objective where each of several outcomes is one particle, covariances times S / (S − 1).

    π_β is in proportion to q exp(β f), where q draws and f is what is weighed; the slopes are (outcomes, parameters). At β = 0 the guide's
    density in f has no gradient, because its expectation is zero.
    """
    count, total = len(f), 0.0
    for end, size in zip(ENDS[short], SIZES[short], strict=True):
        tempered = np.exp(end * f) / np.exp(end * f).sum()
        apart = tempered * (f - tempered @ f) * count / (count - 1)
        total = total + size * (tempered @ (slopes_f if end else slopes_p) + apart @ (slopes_q + end * slopes_f))
    return total


MUTANTS = {}


def mutant(apply):
    MUTANTS[apply.__name__] = apply
    return apply


@mutant
def covariance_with_the_denominator_of_all(patch):
    plain = TVO.density_shares

    def density_shares(self, xp, logs, axis):
        count = logs.shape[axis]
        found = plain(self, xp, logs, axis)
        weights = sum(size * self._at(xp, logs, axis, end) for size, end in self._terms)
        model = weights + (found.model - weights) * (count - 1) / count
        return found._replace(model=model, draws=found.draws * (count - 1) / count)

    patch.setattr(TVO, "density_shares", density_shares)


@mutant
def weights_of_the_other_end(patch):
    plain = TVO._terms.fget
    patch.setattr(TVO, "_terms", property(lambda self: [(size, 1 - end) for size, end in plain(self)]))


@mutant
def guide_that_is_held(patch):
    plain = TVO.density_shares

    def density_shares(self, xp, logs, axis):
        return plain(self, xp, logs, axis)._replace(guide=xp.zeros_like(logs))

    patch.setattr(TVO, "density_shares", density_shares)


@mutant
def draws_that_are_held(patch):
    plain = TVO.density_shares
    patch.setattr(TVO, "density_shares", lambda self, xp, logs, axis: plain(self, xp, logs, axis)._replace(draws=None))


@mutant
def not_tempered(patch):
    patch.setattr(TVO, "_at", staticmethod(lambda xp, logs, axis, end: _posterior(xp, logs, axis)))


def _posterior(xp, logs, axis):
    return xp.exp(logs - xp.expand_dims(thermodynamic.log_sum_exp(xp, logs, axis), axis=axis))


def draws_that_count_as_weighed(patch):
    """The covariance form with the scaled, masked density in the place of the draws' own."""
    plain = TVO.density_shares

    def density_shares(self, xp, logs, axis):
        found = plain(self, xp, logs, axis)
        return found._replace(guide=found.guide + found.draws, draws=None)

    patch.setattr(TVO, "density_shares", density_shares)
