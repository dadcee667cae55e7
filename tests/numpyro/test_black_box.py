"""A NumPy function that is called element by element: exact, kept apart, refused where it must be, in NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from pplgrad import DisARM, Expectation, GumbelSoftmax, LocalExpectation, ScoreFunction
from pplgrad.engine.layout import Layout
from pplgrad.errors import EstimatorError, ProgramError
from pplgrad.numpyro import TraceGrad_ELBO, black_box
from pplgrad.testing.in_numpyro import (
    HOST,
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    parameters,
)
from tests.black_boxes import RETURNED, WRONG, claim_events, less_their_mean, mixed, plated
from tests.numpyro.test_axes import claims, faults


def expected(case, estimator, particles=1, together=True):
    """Return the expected gradient with an estimator at all sites."""
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    chosen = dict.fromkeys(case.latents, estimator)
    return over(case, TraceGrad_ELBO(particles, vectorize_particles=together, estimators=chosen), particles)


@pytest.mark.grid
@pytest.mark.parametrize("vectorized", [False, True], ids=["each", "whole"])
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation(), DisARM()], ids=repr)
def test_exact(estimator, vectorized):
    case = plated(black_box, vectorized)
    assert_same(expected(case, estimator), exact_gradient(case))


@pytest.mark.grid
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("case", [plated(black_box), mixed(black_box)], ids=["plated", "mixed"])
def test_exact_with_particles(case, together):
    assert_same(expected(case, ScoreFunction(), 2, together), exact_gradient(case))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation()], ids=repr)
def test_what_reads_the_whole_plate_is_charged_whole(estimator, monkeypatch):
    """And a rule that took it for elementwise would be seen."""
    case = mixed(black_box)
    wanted = exact_gradient(case)
    assert_same(expected(case, estimator), wanted)
    claim_events(monkeypatch)
    found = expected(case, ScoreFunction())
    assert max(np.abs(found[name] - wanted[name]).max() for name in wanted) > 1e-3


@pytest.mark.slow
def test_elements_stay_apart(monkeypatch):
    made, plain = [], Layout.build.__func__

    def build(cls, sites, costs, *rest):
        (cost,) = [cost for cost in costs if cost.name == "reward"]
        made.append({name: read.across for name, read in cost.reads.items()})
        return plain(cls, sites, costs, *rest)

    monkeypatch.setattr(Layout, "build", classmethod(build))
    for case in (plated(black_box), mixed(black_box)):
        elbo = TraceGrad_ELBO(2, estimators={"*": ScoreFunction()})
        elbo.loss(jax.random.key(0), parameters(case), *case.build(HOST))
    assert made[0] == {"z": frozenset(), "w": frozenset()} and made[-1] == {"z": frozenset({"p"})}


SHAPED = {
    "elements": lambda z: black_box(np.sin, z),
    "whole": lambda z: black_box(np.sin, z, vectorized=True),
    "event": lambda z: black_box(np.sum, z, event_dim=1),
    "arrays": lambda z: black_box(np.cumsum, z, event_dim=1, shape=(4,)),
    "beside": lambda z: black_box(lambda x, y: x + y.sum(), z, z[:, :, None], event_dim=(0, 1)),
    "first": lambda z: black_box(lambda x, y: x + y, z, z[:, :1]),
    "mapped": lambda z: jax.vmap(lambda z: black_box(np.sum, z, event_dim=1), 1, 1)(z),
    "mapped in": lambda z: jax.vmap(lambda z: black_box(np.cumsum, z, event_dim=1, shape=(3,)), 2, 1)(z),
    "row by row": lambda z: jax.lax.scan(lambda c, row: (c, black_box(np.sin, row)), 0.0, z)[1],
    "carried": lambda z: jax.lax.scan(lambda c, row: (c + black_box(np.sin, row), c), z[0], z)[1],
}


@pytest.mark.grid
@pytest.mark.parametrize("exact", [True, False], ids=["64 bits", "32 bits"])
@pytest.mark.parametrize("name", SHAPED)
def test_axes(name, exact):
    """No axis is claimed along which an element reads another."""
    with jax.enable_x64(exact):
        assert not faults(SHAPED[name], (2, 3, 4))
        kept = [axis is not None for axis in claims(SHAPED[name], (2, 3, 4))[0]]
    wanted = {"event": [1, 1, 0], "arrays": [1, 1, 0], "beside": [1, 1, 0], "first": [1, 0, 1], "mapped": [1, 1, 0]}
    wanted |= {"mapped in": [1, 0, 1], "carried": [0, 1, 1]}
    assert kept == wanted.get(name, [1, 1, 1])


def test_a_rule_that_claims_an_event_is_caught(monkeypatch):
    claim_events(monkeypatch)
    with jax.enable_x64(False):
        assert faults(SHAPED["arrays"], (2, 3, 4))


@pytest.mark.parametrize("exact", [True, False], ids=["64 bits", "32 bits"])
def test_values(exact):
    with jax.enable_x64(exact):
        x, k = jnp.arange(6.0).reshape(3, 2) / 3, jnp.array([[1], [2]])
        run = lambda x, k: black_box(lambda x, k: x.sum() + k, x, k, event_dim=(1, 0))  # noqa: E731
        wanted = np.asarray(x).sum(-1) + np.asarray(k)
        for found in (
            run(x, k),
            jax.jit(run)(x, k),
            jax.vmap(run, (None, 0))(x, k[:, 0]),
            jax.vmap(run)(x, k.repeat(3, 1).T),
        ):
            assert found.dtype == jnp.result_type(float)
        np.testing.assert_allclose(run(x, k), wanted, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(run)(x, k), wanted, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(run, (None, 0))(x, k[:, 0]), wanted, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(jax.vmap(run, (0, None), 2))(x, k)[:, 0], wanted, rtol=1e-6)
        assert black_box(lambda x: x > 1, 2.0) == 1.0 and black_box(np.exp, jnp.ones((0, 3))).shape == (0, 3)
        assert black_box(np.exp, jnp.array([True, False]).astype(int)).tolist() == pytest.approx([np.e, 1.0])


def test_numbers_of_64_bits_stay_whole():
    """JAX calls back in a thread of its own, where `enable_x64` around this test says nothing."""
    third, large = jnp.arange(1.0, 5.0) / 3, 2**40 + jnp.arange(4)
    found = jax.jit(jax.vmap(lambda x, n: black_box(lambda x, n: x + (n - 2**40), x, n)))(third, large)
    np.testing.assert_array_equal(found, np.arange(1.0, 5.0) / 3 + np.arange(4))


def test_there_is_no_gradient():
    value, slope = jax.value_and_grad(lambda x: (x * black_box(np.exp, x)).sum())(jnp.array([0.0, 1.0]))
    assert value == pytest.approx(np.e) and slope.tolist() == pytest.approx([1.0, np.e])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_from_the_start(name):
    function, shape, settings, said = WRONG[name]
    with pytest.raises(ProgramError, match=said):
        jax.eval_shape(lambda x: black_box(function, x, **settings), jnp.ones(shape))
    with pytest.raises(ProgramError, match="'exp' has values of batch shapes.*do not broadcast"):
        black_box(np.exp, jnp.ones(2), jnp.ones(3))


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_is_wrong(name):
    function, settings, said = RETURNED[name]
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=said):
        jax.jit(lambda x: black_box(function, x, **settings))(jnp.array([1.0, 2.0])).block_until_ready()


def test_rows_that_are_mixed_are_found_later():
    """In the first call all rows are the same, and in the second there is one; the promise is looked at in the fourth again."""
    run = jax.jit(lambda x: black_box(less_their_mean, x, vectorized=True))
    for _ in range(3):
        run(jnp.zeros(2)).block_until_ready()
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="drop vectorized=True"):
        run(jnp.arange(2.0)).block_until_ready()


@pytest.mark.slow
def test_inside_scan():
    """The score function of a chain whose rewards NumPy computes, against the derivative of the enumerated mean."""
    rewards = np.array([0.3, 1.7])

    def chain(logit, rewarded):
        def step(before, _):
            with numpyro.plate("p", 2):
                z = numpyro.sample("z", dist.Bernoulli(logits=logit + before))
                if rewarded:
                    numpyro.factor("reward", black_box(lambda z, b: rewards[int(z)] * (1 + b), z, before))
            return z.astype(float), z

        scan(step, jnp.zeros(2), None, length=2)

    def mean(a):
        total = 0.0
        for first in (0, 1):
            for second in (0, 1):
                p = jax.nn.sigmoid((2 * first - 1) * a), jax.nn.sigmoid((2 * second - 1) * (a + first))
                total += p[0] * p[1] * (rewards[first] + rewards[second] * (1 + first))
        return -2 * total

    elbo = TraceGrad_ELBO(4000, estimators={"z": ScoreFunction()}, objective=Expectation())
    run = (lambda: chain(0.0, True)), (lambda: chain(numpyro.param("a", jnp.array(0.4)), False))
    found = jax.jit(jax.grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, *run)))(jnp.array(0.4))
    assert float(found) == pytest.approx(float(jax.grad(mean)(0.4)), abs=0.1)


def test_a_relaxed_value_is_refused():
    def model():
        with numpyro.plate("p", 2):
            numpyro.factor("reward", black_box(np.exp, numpyro.sample("z", dist.Bernoulli(0.5))))

    def guide():
        with numpyro.plate("p", 2):
            numpyro.sample("z", dist.Bernoulli(logits=jnp.zeros(2)))

    for exact in (True, False):
        with jax.enable_x64(exact), pytest.raises(EstimatorError, match="Site 'z' is relaxed"):
            TraceGrad_ELBO(estimators={"z": GumbelSoftmax()}).loss(jax.random.key(0), {}, model, guide)
