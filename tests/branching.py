"""Which estimators that run branches are proved on which programs, the same in both libraries."""

from pplgrad import ARM, ARMS, DisARM, LocalExpectation
from pplgrad.testing.programs import CASES

# Without nested_plates: its cells go into the thousands.
FINITE = [name for name in CASES if name != "nested_plates"]
BINARY = [name for name in FINITE if all(size == 2 for _, size in CASES[name].latents.values())]

EXACT = {"local": (LocalExpectation(), FINITE), "disarm": (DisARM(), BINARY)}
"""Estimators with finite noise, by a short name: the expectation is a finite sum."""

RANDOM = {"arm": (ARM(), BINARY), "arms2": (ARMS(2), BINARY), "arms4": (ARMS(4), BINARY)}
"""Estimators with uniform noise: z-tests."""

HARD = ["hierarchy", "mixed", "event", "subsampled", "reparameterized_parent", "nested_plates"]
"""The programs of the z-tests: dependent sites, both kinds, a joint event, a minibatch, plates."""


def exact_pairs():
    """Return every estimator with finite noise and each of its programs."""
    return [(short, name) for short, (_, names) in EXACT.items() for name in names]


def random_pairs():
    """Return every estimator with uniform noise and each program of the z-tests that it fits."""
    return [(short, name) for short, (_, names) in RANDOM.items() for name in HARD if name in [*names, "nested_plates"]]
