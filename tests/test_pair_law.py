"""The law of two of CARMS' draws, in both libraries: exact where it is rational, and with the margins that its draws have."""

import itertools
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from pplgrad.estimators import antithetic_categorical
from pplgrad.estimators.antithetic_categorical import _cell_law, _pair_law, _rectangle
from pplgrad.testing import in_numpyro, in_pyro

HOSTS = {"pyro": in_pyro, "numpyro": in_numpyro}
PROBABILITIES = [[0.2, 0.8], [0.1, 0.3, 0.6], [0.05, 0.05, 0.2, 0.7], [0.4, 1e-9, 0.3, 0.3 - 1e-9, 0.0]]


def ops_of(library):
    if library == "pyro":
        from pplgrad.pyro._array_ops import OPS
    else:
        from pplgrad.numpyro._array_ops import OPS
    return OPS


def corners(seed):
    """Return corners and sides of rectangles of all four kinds, sides from 1 down to 1e-9."""
    rng = np.random.default_rng(seed)
    x, sides = rng.uniform(-1, 1, 400), rng.uniform(0, 1, (2, 400)) * 10.0 ** rng.uniform(-9, 0, (2, 400))
    x[::3] = -sides.min(0)[::3] * rng.uniform(0, 1, len(x[::3]))
    return x, *sides


def error_of_rectangles(library, m):
    """Return the largest relative error of the mass of rectangles."""
    host, given = HOSTS[library], corners(m)
    with host.isolated():
        found = np.asarray(_rectangle(ops_of(library), *map(host.array, given), m))

    def g(t):
        return max(t, Fraction(0)) ** m

    worst = 0.0
    for value, corner in zip(found, zip(*given, strict=True), strict=True):
        x, h, k = map(Fraction, map(float, corner))
        exact = float(g(x + h + k) - g(x + h) - g(x + k) + g(x))
        # At its far corner a rectangle's mass depends on the last digit of x + h + k.
        if x + h + k > 1e-6:
            worst = max(worst, abs(value - exact) / exact)
    return worst


@pytest.mark.parametrize("m", [2, 3, 4, 6])
@pytest.mark.parametrize("library", HOSTS)
def test_a_rectangles_mass_is_exact_to_the_last_digits(library, m):
    assert error_of_rectangles(library, m) < 1e-9


@pytest.mark.parametrize("library", HOSTS)
def test_a_broken_quotient_is_caught(library, monkeypatch):
    plain = antithetic_categorical._quotients
    monkeypatch.setattr(antithetic_categorical, "_quotients", lambda xp, x, powers: plain(xp, x, [*powers[1:], x]))
    assert error_of_rectangles(library, 3) > 1e-3


def law(library, function, probabilities, first, second, power):
    host = HOSTS[library]
    draw = SimpleNamespace(ops=ops_of(library), log_probs=host.array(np.log(np.array(probabilities)))[None])
    index = [draw.ops.constant(np.array(x)[None], draw.ops.arange(1, draw.log_probs)) for x in (first, second)]
    return np.asarray(function(draw, *index, power))[0]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("power", [2, 3, 5])
@pytest.mark.parametrize("probabilities", PROBABILITIES)
@pytest.mark.parametrize("library", HOSTS)
def test_each_draw_has_the_sites_law_and_pairs_of_categories_are_picked(library, probabilities, power):
    """Summed over what one draw is, the law of two is that of the other."""
    first, second = np.array(list(itertools.product(range(len(probabilities)), repeat=2))).T
    with HOSTS[library].isolated():
        joint = law(library, _cell_law, probabilities, first, second, power)
        picked = law(library, _pair_law, probabilities, first, second, power)
    np.testing.assert_allclose(joint.reshape(len(probabilities), -1).sum(1), probabilities, rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(joint.reshape(len(probabilities), -1).sum(0), probabilities, rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(picked[first != second], joint[first != second], rtol=1e-12)
