"""A site whose elements have one value each, or that has no elements, changes no gradient, in both libraries."""

import numpy as np
import pytest

import pplgrad as pg
from pplgrad.testing import in_numpyro, in_pyro
from pplgrad.testing.programs import Case, bernoulli, case, values

HOSTS = {"pyro": in_pyro, "numpyro": in_numpyro}
ONE: dict[str, Case] = {}
ESTIMATORS = [
    (pg.ScoreFunction(), 1),
    (pg.ScoreFunction(pg.LeaveOneOut()), 2),
    (pg.LocalExpectation(), 1),
    (pg.LocalExpectation(elements=1), 1),
    (pg.MeasureValued(), 1),
    (pg.Enumerate(), 1),
]


@case({"c": ((2,), 1), "z": ((), 2)}, {"a": (4,), "b": (4,)}, into=ONE)
def one_value(h):
    """Two elements of one value each, and a site that follows them."""

    def model():
        b = values("one_value", h)["b"]
        c = h.sample("c", h.dist.Categorical(logits=b[:2, None]).to_event(1))
        z = h.sample("z", bernoulli(h, b[2] + c[..., 0]))
        h.sample("x", h.dist.Normal(b[3] * z + c[..., 1], 1.0), obs=h.array(np.array(0.3)))

    def guide():
        a = values("one_value", h)["a"]
        c = h.sample("c", h.dist.Categorical(logits=a[:2, None]).to_event(1))
        h.sample("z", bernoulli(h, a[2] + a[3] * c[..., 0]))

    return model, guide


@case({"e": ((0,), 2), "z": ((), 2)}, {"a": (2,), "b": (3,)}, into=ONE)
def no_elements(h):
    """A site without elements, and another one."""

    def model():
        b = values("no_elements", h)["b"]
        h.sample("e", bernoulli(h, b[:0]).to_event(1))
        z = h.sample("z", bernoulli(h, b[0]))
        h.sample("x", h.dist.Normal(b[1] * z, 1.0), obs=h.array(np.array(0.3)))

    def guide():
        a = values("no_elements", h)["a"]
        h.sample("e", bernoulli(h, a[:0]).to_event(1))
        h.sample("z", bernoulli(h, a[1]))

    return model, guide


@pytest.mark.filterwarnings("ignore:.*mixes particles")  # Of a sum over nothing: Pyro runs them one by one.
@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize(("estimator", "particles"), ESTIMATORS, ids=repr)
@pytest.mark.parametrize("library", HOSTS)
def test_exact(library, estimator, particles, name):
    host = HOSTS[library]
    with host.isolated():
        assert host.gradient_error(ONE[name], estimator, particles, particles > 1) < 1e-9


CATEGORICAL = [pg.CARMS(), pg.TreeDisARM(), pg.StickBreakingDisARM()]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", CATEGORICAL, ids=repr)
@pytest.mark.parametrize("library", HOSTS)
def test_unbiased(library, estimator):
    """Of one category there is none to compare with; the site that follows has two."""
    host = HOSTS[library]
    with host.isolated():
        assert host.z_score(ONE["one_value"], estimator, 1, False, draws=100, seed=0) < 4.5
