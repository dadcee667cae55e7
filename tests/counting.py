"""What is proved of estimators of counts, the same in both libraries."""

import inspect
import textwrap

import numpy as np
import pytest

from pplgrad import CountDifference
from pplgrad.estimators import count_difference
from pplgrad.testing.counting import COUNTING

FEW = CountDifference(3)
"""A window that most of these laws leave, so that the score term has its part."""

QUICK = ["poisson", "counts_inflated", "counts_totals", "counts_between"]


def exact_cases():
    """Return every estimator and program whose expectation is computed; those that take seconds run with all cases."""
    cases = [(CountDifference(), name) for name in COUNTING]
    cases += [(FEW, name) for name in ("counts_inflated", "counts_gap", "counts_masked", "counts_chain", "two_modes")]
    return [
        pytest.param(
            estimator, name, id=f"{name}-{estimator.window}", marks=() if name in QUICK else pytest.mark.exhaustive
        )
        for estimator, name in cases
    ]


CLOSED = {
    "poisson": lambda h, a: h.dist.Poisson(h.xp.exp(a)),
    "geometric_probs": lambda h, a: h.dist.Geometric(h.xp.exp(a - 1.2)),
    "geometric_logits": lambda h, a: h.dist.Geometric(logits=a),
    "binomial_probs": lambda h, a: h.dist.Binomial(9, h.xp.exp(a - 1.2)),
    "binomial_logits": lambda h, a: h.dist.Binomial(9, logits=a),
    "negative_binomial_probs": lambda h, a: h.dist.NegativeBinomial(2.5, h.xp.exp(a - 1.2)),
    "negative_binomial_logits": lambda h, a: h.dist.NegativeBinomial(2.5, logits=a - 0.7),
    "gamma_poisson": lambda h, a: h.dist.GammaPoisson(2.5, h.xp.exp(a)),
}
"""Laws whose weights are known in closed form."""

AT = np.arange(10)
"""The counts at which the weights are compared with sums over a window that leaves 1e-13 of the probability out."""

WIDE = CountDifference(256)


def at_every_count(h, law):
    """Return a program with a plate of draws that a test puts at `AT`: each element's derivative is that of one weight."""

    def site():
        return h.sample("n", law(h, h.param("a", h.array(np.full(len(AT), 0.4)))))

    def model():
        with h.plate("p", len(AT), dim=-1):
            n = site()
            h.factor("f", h.xp.cos(1.0 * n))

    def guide():
        with h.plate("p", len(AT), dim=-1):
            site()

    return model, guide


def rewritten(patch, name, old, new):
    """Put a function of `count_difference` there in which a piece of code is another."""
    source = textwrap.dedent(inspect.getsource(getattr(count_difference, name)))
    assert source.count(old) == 1, old
    scope = dict(vars(count_difference))
    exec(source.replace(old, new), scope)
    patch.setattr(count_difference, name, scope[name])


ALL = CountDifference()
SOME = CountDifference(5)

MUTANTS = {
    "k_below_z": ("counts_inflated", ALL, "_by_sums", "numbers <= near", "numbers < near"),
    "k_from_z_on": (
        "counts_inflated",
        ALL,
        "_by_sums",
        "numbers > near[..., None])\n    d",
        "numbers >= near[..., None])\n    d",
    ),
    "without_one_over_q": ("counts_inflated", ALL, "_by_sums", "fixed - ops.stop_gradient(own)[..., None]", "fixed"),
    "one_sign_for_both_sides": ("counts_inflated", ALL, "_by_sums", "-summed, summed", "summed, summed"),
    "the_next_number_over_a_gap": (
        "counts_gap",
        ALL,
        "_by_sums",
        "within & (after < count), after, pivot",
        "within & (after < count), near + 1, pivot",
    ),
    "no_score_outside": ("counts_gap", SOME, "_by_sums", "summed), -own)", "summed), 0 * own)"),
    "score_with_the_wrong_sign": ("counts_gap", SOME, "_by_sums", "summed), -own)", "summed), own)"),
    "a_median_that_sees_the_draw": ("counts_gap", SOME, "_by_sums", "before = near", "pivot = near\n    before = near"),
    "binomial_as_negative": ("counts_totals", ALL, "_closed_form", '["trials"] - value', '["trials"] + value'),
    "failures_forgotten": ("geometric_probs", ALL, "_closed_form", 'fixed["failures"] + value', "value"),
    "along_the_other_side": (
        "counts_totals",
        ALL,
        "_closed_form",
        'xp.exp(-fixed["logits"])',
        'xp.exp(fixed["logits"])',
    ),
}
"""Broken variants, each with a program and an estimator that show it: in which function what is replaced by what."""

BEYOND = {
    "closed": ("counts_totals", "_closed_form", 'xp.where(value < fixed["trials"], value + 1, value)', "value + 1"),
    "sums": ("counts_inflated", "_by_sums", "xp.where(within & (after < count), after, pivot)", "near + 1"),
}
"""Variants that run the program at a count beyond the support: what comes of it is an error, or no number."""
