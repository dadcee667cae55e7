"""Which programs have divergences in closed form, the same in both libraries."""

import pytest

from pplgrad import ConfigurationError, DisARM, Enumerate, EstimatorError, LocalExpectation, ProgramError, ScoreFunction

EXACT = [
    ("single", {"z": "kl"}),
    ("shared_parameter", {"z": "kl"}),
    ("hierarchy", {"z3": "kl"}),
    ("hierarchy", {"z*": "entropy"}),
    ("nested_plates", {"g": "kl", "u": "kl", "v": "kl"}),
    ("subsampled", {"*": "kl"}),
    ("masked", {"z": "kl"}),
    ("scaled", {"z": "entropy", "w": "kl"}),
    ("chain", {"z*": "kl"}),
    ("event", {"z": "kl"}),
    ("event_in_plate", {"z": "kl"}),
    ("batch_without_plate", {"z": "entropy"}),
    ("categorical_index", {"k": "kl"}),
    ("auxiliary", {"helper": "entropy"}),
    ("counts", {"n": "kl", "z": "entropy"}),
    ("one_hot", {"*": "kl"}),
]
"""Programs of discrete sites: the closed form has the gradient that enumeration has."""

ESTIMATORS = {"score": ScoreFunction(), "local": LocalExpectation(), "enumerate": Enumerate(), "disarm": DisARM()}


def pairs():
    """Return programs, closed forms and estimators; few of them quick."""
    quick = {"single"}
    plain = [
        pytest.param(name, kinds, "score", marks=() if name in quick else pytest.mark.slow) for name, kinds in EXACT
    ]
    branches = [
        ("hierarchy", {"z3": "kl"}, "local"),
        ("chain", {"z*": "kl"}, "disarm"),
        ("single", {"z": "kl"}, "local"),
    ]
    return plain + [pytest.param(*row, marks=pytest.mark.slow) for row in branches]


REFUSED = [
    ("hierarchy", {"z1": "kl"}, ProgramError, "'z1' has no closed form: the model draws the site given 'z2'"),
    ("hierarchy", {"nobody": "kl"}, ConfigurationError, "names 'nobody', which matches no latent site"),
    ("hierarchy", {"z1": "KL"}, ConfigurationError, '\'KL\'; write "kl" or "entropy"'),
    ("auxiliary", {"helper": "kl"}, EstimatorError, "'helper' is not in the model"),
]
"""Programs and closed forms that are refused, with the error and words of it."""
