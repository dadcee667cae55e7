"""Estimators of counts: exact over a support that is cut off where sums in float64 end, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import substitute

from pplgrad import IWAE, Auto, CountDifference, EstimatorError, Expectation, LeaveOneOut, ScoreFunction, SumAndSample
from pplgrad.errors import PplgradError
from pplgrad.numpyro import TraceGrad_ELBO, check_gradients
from pplgrad.numpyro._tracing import particle_trace
from pplgrad.testing import gradient_error
from pplgrad.testing.counting import COUNTING, VECTORS
from pplgrad.testing.in_numpyro import (
    HOST,
    assert_same,
    exact_bound_gradient,
    exact_gradient,
    exact_hessian,
    expected_gradient_over_cells,
    parameters,
)
from tests.bounds import bound
from tests.counting import AT, BEYOND, CLOSED, HEAD, MUTANTS, WIDE, at_every_count, exact_cases, rewritten

pytestmark = pytest.mark.slow  # Each compiles for seconds; Pyro's are quick.


@pytest.mark.parametrize(("estimator", "name"), exact_cases())
def test_exact(estimator, name):
    assert gradient_error(estimator, "numpyro", name) < 1e-9


@pytest.mark.parametrize(
    ("name", "vectorize"),
    [("counts_inflated", True), pytest.param("counts_totals", False, marks=pytest.mark.exhaustive)],
)
def test_two_particles_exact(name, vectorize):
    case = COUNTING[name]
    elbo = TraceGrad_ELBO(2, vectorize, estimators=dict.fromkeys(case.latents, CountDifference(2)))
    assert_same(expected_gradient_over_cells(case, elbo, 2), exact_gradient(case))


@pytest.mark.parametrize("name", ["counts_inflated", pytest.param("counts_totals", marks=pytest.mark.exhaustive)])
def test_importance_weighted_exact(name):
    case = COUNTING[name]
    elbo = TraceGrad_ELBO(2, estimators=dict.fromkeys(case.latents, CountDifference()), objective=IWAE())
    assert_same(expected_gradient_over_cells(case, elbo, 2), exact_bound_gradient(case, bound(1.0), 2, 0))


@pytest.mark.parametrize("law", CLOSED)
def test_closed_forms_are_the_sums(law, monkeypatch):
    model, guide = at_every_count(HOST, CLOSED[law])
    elbo, found = TraceGrad_ELBO(estimators={"n": WIDE}), []
    for closed in (True, False):
        if not closed:
            monkeypatch.setattr(particle_trace, "parameters", lambda fn: None)

        def loss(a):
            return elbo.loss(jax.random.key(0), {"a": a}, model, substitute(guide, {"n": jnp.asarray(AT)}))

        found.append(jax.jit(jax.grad(loss))(jnp.full(len(AT), 0.4)))
    # JAX's betaln, of which NumPyro's GammaPoisson is made, is right to 1.4e-6 alone, also in float64.
    tolerance = 1e-5 if law in ("negative_binomial_probs", "gamma_poisson") else 1e-9
    np.testing.assert_allclose(*found, atol=tolerance, rtol=tolerance)
    assert np.all(np.abs(found[0]) > 1e-3)


def test_second_derivatives_of_a_head_exact():
    case = COUNTING["counts_between"]
    elbo = TraceGrad_ELBO(estimators={"n": HEAD}, higher_order=True)
    found, wanted = expected_gradient_over_cells(case, elbo, derive=jax.hessian), exact_hessian(case)
    for row in wanted:
        assert_same(found[row], wanted[row])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    """In Pyro, which runs each outcome by itself and compiles nothing, they are caught by every run of the tests."""
    case, estimator, *change = MUTANTS[name]
    rewritten(monkeypatch, *change)
    assert not gradient_error(estimator, "numpyro", case) < 1e-6


def test_no_branch_beyond_the_support(monkeypatch):
    """NumPyro's Binomial has a finite density beyond its support, so that the closed form's branch there shows in Pyro alone."""
    case, *change = BEYOND["sums"]
    rewritten(monkeypatch, *change)
    try:
        wrong = not gradient_error(CountDifference(), "numpyro", case) < 1e-6
    except (PplgradError, ValueError):
        wrong = True
    assert wrong


@pytest.mark.parametrize("name", VECTORS)
def test_counts_with_a_total_have_the_score_function(name):
    assert gradient_error(ScoreFunction(), "numpyro", name) < 1e-9
    assert gradient_error(ScoreFunction(LeaveOneOut()), "numpyro", name, particles=2, vectorized=True) < 1e-9


def test_the_most_probable_of_several_counts_are_refused():
    def program():
        numpyro.sample("z", dist.Poisson(jnp.ones(2)).to_event(1))

    with pytest.raises(EstimatorError, match="'z' needs a single count, and there are 2 .* use CountDifference"):
        TraceGrad_ELBO(estimators={"z": SumAndSample()}).loss(jax.random.key(0), {}, program, program)


@pytest.mark.parametrize(
    ("law", "word"),
    [
        (dist.Normal(0.0, 1.0), "Normal"),
        (dist.Categorical(jnp.ones(3) / 3), "Categorical"),
        (dist.Bernoulli(0.3), "Bernoulli"),
        (dist.Multinomial(3, jnp.ones(3) / 3), "Multinomial"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_laws_are_refused(law, word):
    def program():
        numpyro.sample("z", law)

    with pytest.raises(
        EstimatorError, match=f"at site 'z': an element of {word} is no single count .*use one that fits"
    ):
        TraceGrad_ELBO(estimators={"z": CountDifference()}).loss(jax.random.key(0), {}, program, program)


@pytest.mark.parametrize(
    "law",
    [
        lambda a: dist.Poisson(1e4 * jnp.exp(a)),
        lambda a: dist.ZeroInflatedPoisson(jax.nn.sigmoid(a), 1e3 * jnp.exp(a)),
        lambda a: dist.NegativeBinomial2(1e4 * jnp.exp(a), jnp.exp(a)),
        lambda a: dist.BetaBinomial(1e-3 * jnp.exp(a), 1e-3 * jnp.exp(a), 500),
        lambda a: dist.Poisson(0 * a),
        lambda a: dist.Binomial(4, 1 + 0 * a),
    ],
    ids=["large", "far modes", "long tail", "at both ends", "rate 0", "certain"],
)
def test_float32_stays_finite(law):
    def model():
        with numpyro.plate("p", 500):
            n = numpyro.sample("n", dist.Poisson(30.0))
        numpyro.factor("f", jnp.cos(1.0 * n).sum(-1))

    def guide():
        with numpyro.plate("p", 500):
            numpyro.sample("n", law(numpyro.param("a", jnp.zeros(500))))

    with jax.enable_x64(False):
        elbo = TraceGrad_ELBO(objective=Expectation(), estimators={"n": CountDifference()})
        a = jnp.zeros(500)
        found = jax.jit(jax.grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, model, guide)))(a)
        assert found.dtype == jnp.float32 and np.isfinite(found).all()


@pytest.mark.parametrize("estimator", [CountDifference(4), pytest.param(HEAD, marks=pytest.mark.exhaustive)])
def test_ranks_that_jax_is_told_to_refuse(estimator):
    """The rules of derivatives run where the user differentiates, under the user's settings."""

    def model():
        with numpyro.plate("p", 3):
            numpyro.sample("n", dist.ZeroInflatedPoisson(jnp.full(3, 0.3), jnp.ones(3)))

    def guide():
        a = numpyro.param("a", jnp.zeros(3))
        with numpyro.plate("p", 3):
            numpyro.sample("n", dist.ZeroInflatedPoisson(jax.nn.sigmoid(a), jnp.exp(a)))

    elbo = TraceGrad_ELBO(estimators={"n": estimator})
    with jax.numpy_rank_promotion("raise"):
        assert np.isfinite(jax.grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, model, guide))(jnp.zeros(3))).all()


def test_auto():
    case = COUNTING["counts_event"]
    model, guide = case.build(HOST)
    described = TraceGrad_ELBO(estimators={"*": Auto(2)}).describe(jax.random.key(0), parameters(case), model, guide)
    assert [row["estimator"] for row in described.rows] == ["CountDifference()", "LocalExpectation()"]


@pytest.mark.exhaustive
def test_check_gradients():
    case = COUNTING["counts_event"]
    model, guide = case.build(HOST)
    found = check_gradients(model, guide, params=parameters(case), estimators={"*": CountDifference()}, draws=1000)
    assert found.status in ("unbiased", "unknown")  # The reference is the score function, beside which much is unknown.
