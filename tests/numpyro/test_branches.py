"""Estimators that run the program at other values: exact over their finite noise, z-tests over the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO

from pplgrad import DisARM, EstimatorError, LeaveOneOut, LocalExpectation, ProgramError, Reparam, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing import gradient_error, z_score
from pplgrad.testing.in_numpyro import (
    HOST,
    assert_same,
    exact_gradient,
    expected_gradient_over_cells,
    parameters,
)
from pplgrad.testing.programs import CASES
from tests.branch_mutants import MUTANTS
from tests.branching import EXACT, NUMBERS, RANDOM, exact_pairs, numbers, random_pairs


def elbo(name, estimator, particles=1, vectorize=True):
    return TraceGrad_ELBO(particles, vectorize, estimators=dict.fromkeys(CASES[name].latents, estimator))


@pytest.mark.parametrize(("short", "name"), exact_pairs())
def test_exact(short, name):
    found = expected_gradient_over_cells(CASES[name], elbo(name, EXACT[short][0]))
    assert_same(found, exact_gradient(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [True, False, lambda f, xs: jax.lax.map(f, xs)], ids=["vmap", "map", "callable"])
@pytest.mark.parametrize("short", [short for short, (_, names) in EXACT.items() if "single" in names])
def test_two_particles_exact(short, vectorize):
    found = expected_gradient_over_cells(CASES["single"], elbo("single", EXACT[short][0], 2, vectorize), 2)
    assert_same(found, exact_gradient(CASES["single"]))


@pytest.mark.slow
@pytest.mark.parametrize(("short", "name"), random_pairs())
def test_unbiased(short, name):
    assert z_score(RANDOM[short][0], "numpyro", name, draws=50_000) < 4.5


@pytest.mark.slow
def test_particles_unbiased():
    assert z_score(DisARM(), "numpyro", particles=2, vectorized=True, draws=50_000) < 4.5


def moments(objective, family, draws):
    """Return the mean gradient and its standard error, over all coordinates in a row."""
    model, guide = numbers(HOST, family)
    params = {"m": jnp.array([0.3, -0.5]), "s": jnp.array([0.1, -0.2])}

    def one(key):
        return jax.grad(lambda p: objective.loss(key, p, model, guide))(params)

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), draws))
    rows = np.concatenate([np.asarray(g) for g in found.values()], -1)
    return rows.mean(0), rows.std(0) / np.sqrt(draws)


@pytest.mark.slow
@pytest.mark.parametrize("family", NUMBERS)
def test_numbers_unbiased(family):
    """Against the mean of the score function with a leave-one-out baseline, or of the reparameterized gradient."""
    plain = ScoreFunction(LeaveOneOut()) if "poisson" in family else Reparam()
    known = TraceGrad_ELBO(8, estimators={"x": plain, "w": LocalExpectation()})
    chosen = TraceGrad_ELBO(estimators={"x": NUMBERS[family], "w": LocalExpectation()})
    (wanted, error), (found, spread) = moments(known, family, 50_000), moments(chosen, family, 50_000)
    assert np.all(np.abs(found - wanted) < 4.5 * np.sqrt(error**2 + spread**2) + 1e-12)


def test_draws_are_those_of_trace_elbo():
    case = CASES["hierarchy"]
    model, guide = case.build(HOST)
    key = jax.random.key(3)
    found = elbo("hierarchy", LocalExpectation()).loss(key, parameters(case), model, guide)
    np.testing.assert_allclose(found, Trace_ELBO().loss(key, parameters(case), model, guide))


def chosen(a):
    return numpyro.sample("z", dist.Bernoulli(logits=a), infer={"estimator": LocalExpectation()})


@pytest.mark.slow
def test_programs_that_cannot_be_traced():
    """Python control flow on a value: branches run one by one; with other sites in a branch, refused."""

    def guide(new_site):
        chosen(numpyro.param("a", jnp.array(0.3)))

    def model(new_site):
        z = numpyro.sample("z", dist.Bernoulli(jnp.array(0.4)))
        if z > 0 and new_site:
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=0.3)
        scale = 2.0 if z > 0 else 1.0
        numpyro.sample("y", dist.Normal(0.0, scale), obs=0.3)

    def by_where(new_site):
        z = numpyro.sample("z", dist.Bernoulli(jnp.array(0.4)))
        numpyro.sample("y", dist.Normal(0.0, jnp.where(z > 0, 2.0, 1.0)), obs=0.3)

    def loss(params, program, new_site):
        return TraceGrad_ELBO().loss(jax.random.key(0), params, program, guide, new_site)

    params = {"a": jnp.array(0.3)}
    found, wanted = (jax.grad(loss)(params, program, False)["a"] for program in (model, by_where))
    np.testing.assert_allclose(found, wanted)
    with pytest.raises(ProgramError, match="'x' exists or not"):
        jax.grad(loss)(params, model, True)


def test_scanned_sites_are_refused():
    def program():
        def step(z, _):
            return chosen(z), None

        scan(step, jnp.zeros((), int), None, length=2)

    with pytest.raises(EstimatorError, match="'z', which is drawn inside scan"):
        TraceGrad_ELBO().loss(jax.random.key(0), {}, program, program)


@pytest.mark.parametrize(
    ("estimator", "distribution", "words"),
    [
        (DisARM(), lambda: dist.Poisson(2.0), "Poisson is not binary"),
        (LocalExpectation(), lambda: dist.Poisson(2.0), "does not have finitely many values"),
        (LocalExpectation(), lambda: dist.Normal(0.0, 1.0), "does not have finitely many values"),
        (DisARM(), lambda: dist.Categorical(jnp.ones(3) / 3), "use one that fits there: LocalExpectation"),
    ],
)
def test_misfits_are_refused(estimator, distribution, words):
    def program():
        numpyro.sample("z", distribution())

    with pytest.raises(EstimatorError, match=words) as error:
        TraceGrad_ELBO(estimators={"z": estimator}).loss(jax.random.key(0), {}, program, program)
    assert "'z'" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    mutant = MUTANTS[name]

    def far():
        if mutant.exact:
            return gradient_error(mutant.estimator, "numpyro", mutant.case) > 1e-6
        return z_score(mutant.estimator, "numpyro", mutant.case, draws=20_000) > 8

    assert not far()
    mutant.apply(monkeypatch)
    assert far()
