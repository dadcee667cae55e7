"""`LocalExpectation(elements=k)` has the exact gradient as its mean, in both libraries: summed over draws, branches and what is drawn of the elements."""

import pytest

from pplgrad import LocalExpectation
from pplgrad.estimators import element_sampling
from pplgrad.testing import in_numpyro, in_pyro
from tests.element_parts import PARTS, as_if_drawn_alike, finite_offset, without_weights

HOSTS = {"pyro": in_pyro, "numpyro": in_numpyro}


@pytest.fixture(autouse=True)
def finite(monkeypatch):
    monkeypatch.setattr(element_sampling, "offset", finite_offset)


def error(library, name, count):
    host = HOSTS[library]
    with host.isolated():
        return host.gradient_error(PARTS[name], LocalExpectation(elements=count), 1, False)


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("event", 1),
        ("event", 2),
        ("batch_without_plate", 1),
        ("parents_in_a_minibatch", 1),
        ("parents_in_a_minibatch", 2),
    ],
)
@pytest.mark.parametrize("library", HOSTS)
def test_exact(library, name, count):
    assert error(library, name, count) < 1e-9


@pytest.mark.parametrize("broken", [without_weights, as_if_drawn_alike])
@pytest.mark.parametrize("library", HOSTS)
def test_mutant_is_caught(library, broken, monkeypatch):
    broken(monkeypatch)
    assert error(library, "event", 1) > 1e-4
