"""What is proved of estimators of counts, the same in both libraries."""

import inspect
import textwrap

import numpy as np
import pytest

from pplgrad import CountDifference, LocalExpectation, SumAndSample
from pplgrad.core import estimator as contract
from pplgrad.estimators import count_difference, count_heads
from pplgrad.testing.counting import COUNTING

FEW = CountDifference(3)
"""A window that most of these laws leave, so that the score term has its part."""

HEAD = LocalExpectation(head=3)
PROBABLE = SumAndSample(3)

EXACT = [
    *((CountDifference(), name) for name in COUNTING),
    *((FEW, name) for name in ("counts_inflated", "counts_gap", "counts_masked", "counts_chain", "two_modes")),
    *((HEAD, name) for name in ("counts_between", "counts_event", "counts_masked", "counts_chain", "two_modes")),
    *((PROBABLE, name) for name in ("counts_between", "counts_subsampled", "counts_masked", "counts_chain")),
]
QUICK = ["poisson", "counts_inflated", "counts_totals", "counts_between"]


def exact_cases():
    """Return every estimator and program whose expectation is computed; those that take seconds run with all cases."""
    return [
        pytest.param(estimator, name, id=f"{name}-{estimator!r}", marks=() if name in QUICK else pytest.mark.exhaustive)
        for estimator, name in EXACT
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
    """Put a function of `count_difference`, or a method of `Head` or `BranchTerms`, there in which a piece of code is another."""
    owners = ((count_heads.Head, count_heads), (contract.BranchTerms, contract), (count_difference, count_difference))
    owner, module = next((owner, module) for owner, module in owners if hasattr(owner, name))
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(old) == 1, old
    scope = dict(vars(module))
    exec(source.replace(old, new), scope)
    patch.setattr(owner, name, scope[name])


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
    "binomial_as_negative": ("binomial_logits", ALL, "_closed_form", '["trials"] - value', '["trials"] + value'),
    "failures_forgotten": ("geometric_probs", ALL, "_closed_form", 'fixed["failures"] + value', "value"),
    "along_the_other_side": (
        "binomial_logits",
        ALL,
        "_closed_form",
        'xp.exp(-fixed["logits"])',
        'xp.exp(fixed["logits"])',
    ),
    "a_tail_that_is_forgotten": (
        "counts_between",
        HEAD,
        "surrogate",
        "xp.where(outside, one",
        "xp.where(outside, 0 * one",
    ),
    "a_tail_inside_the_head": ("counts_between", HEAD, "surrogate", "xp.where(outside, one", "xp.where(~outside, one"),
    "a_head_without_its_probabilities": (
        "counts_between",
        PROBABLE,
        "surrogate",
        "xp.sum(probs * (",
        "xp.sum(self.log_probs * (",
    ),
    "a_baseline_for_the_head_alone": ("counts_between", PROBABLE, "surrogate", "one * (own - baseline)", "one * own"),
    "elements_and_counts_exchanged": (
        "counts_totals",
        LocalExpectation(head=2),
        "costs_of_elements",
        "(-2, -1)",
        "(-1, -2)",
    ),
}
"""Broken variants, each with a program and an estimator that show it: in which function what is replaced by what."""

BEYOND = {
    "closed": ("counts_totals", "_closed_form", 'xp.where(value < fixed["trials"], value + 1, value)', "value + 1"),
    "sums": ("counts_inflated", "_by_sums", "xp.where(within & (after < count), after, pivot)", "near + 1"),
}
"""Variants that run the program at a count beyond the support: what comes of it is an error, or no number."""
