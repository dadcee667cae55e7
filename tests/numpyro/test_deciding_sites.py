"""Estimators that run branches at a site that decides whether others exist: programs that run eagerly, one branch after the other."""

import jax
import numpy as np
import pytest

from pplgrad import DisARM, LocalExpectation, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro._rerun import branches
from pplgrad.testing.in_numpyro import HOST, array
from tests.deciding import PARAMS, PROGRAMS, exact

plain = branches.with_other_sites


def rows(name, estimators, count):
    """Return the gradients of so many keys."""
    model, guide = PROGRAMS[name][0](HOST)
    objective, params = TraceGrad_ELBO(estimators=estimators), {n: array(x) for n, x in PARAMS.items()}
    found = [
        jax.grad(lambda p, key=key: objective.loss(key, p, model, guide))(params)
        for key in jax.random.split(jax.random.key(0), count)
    ]
    return {n: np.stack([np.asarray(row[n]) for row in found]) for n in params}


def error(count=3):
    """Return how far a step with a local expectation is from the exact gradient to the guide's parameters, at worst."""
    return np.abs(rows("observed", {"z": LocalExpectation()}, count)["a"] - exact("observed")["a"]).max()


@pytest.mark.slow
def test_exact_whatever_is_drawn():
    assert error() < 1e-9


def without_the_others(ops, layout, site, found, drawn):
    return [found.get((spec.name, spec.sign), x * 0) for spec, x in zip(layout.costs, drawn, strict=True)]


@pytest.mark.slow
def test_mutant_is_caught(monkeypatch):
    monkeypatch.setattr(branches, "with_other_sites", without_the_others)
    assert error() > 1e-3


@pytest.mark.exhaustive  # Eager JAX takes a second for each gradient.
@pytest.mark.parametrize(
    "at_z", [LocalExpectation(), DisARM(), ScoreFunction(samples=2)], ids=["local", "disarm", "samples"]
)
def test_unbiased(at_z):
    """The elements of a plate decide together; what exists or not is drawn in the guide, and decides itself."""
    found = rows("latent", {"z": at_z, "[wv]": LocalExpectation()}, 300)
    for name, wanted in exact("latent").items():
        spread = found[name].std(0) / np.sqrt(len(found[name]))
        assert np.all(np.abs(found[name].mean(0) - wanted) < 4.5 * spread + 1e-12)
