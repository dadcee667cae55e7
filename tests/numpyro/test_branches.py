"""Estimators that run the program at other values: exact over their finite noise, z-tests over the rest."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO

from pplgrad import (
    REBAR,
    DisARM,
    EstimatorError,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    Reparam,
    ScoreFunction,
    UnorderedSet,
)
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing import gradient_error, z_score
from pplgrad.testing.in_numpyro import (
    HOST,
    assert_same,
    exact_gradient,
    expected_gradient_over_cells,
    kept_by_the_guide,
    parameters,
)
from pplgrad.testing.programs import CASES
from tests.branch_mutants import MUTANTS
from tests.branching import ALIKE, EXACT, NUMBERS, RANDOM, exact_pairs, numbers, random_pairs


def elbo(name, estimator, particles=1, vectorize=True):
    return TraceGrad_ELBO(particles, vectorize, estimators=dict.fromkeys(CASES[name].latents, estimator))


@pytest.mark.grid(together="exact branches in NumPyro")
@pytest.mark.parametrize(("short", "name"), exact_pairs(ALIKE, ("local", "disarm", "muprop", "set2")))
def test_exact(short, name):
    assert gradient_error(EXACT[short][0], "numpyro", name) < 1e-9


@pytest.mark.grid(together="exact branches in NumPyro")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "vectorize"),
    [
        *((short, how) for short, (_, names) in EXACT.items() if "single" in names for how in (True, False)),
        # A function of the user's takes the same way through as lax.map.
        *((short, lambda f, xs: jax.lax.map(f, xs)) for short in ("local", "disarm")),
    ],
)
def test_two_particles_exact(short, vectorize):
    case, estimator = CASES["single"], EXACT[short][0]
    wrap, extra = kept_by_the_guide(case, estimator)
    found = expected_gradient_over_cells(case, elbo("single", estimator, 2, vectorize), 2, wrap, extra)
    assert_same(found, exact_gradient(case))


@pytest.mark.grid(together="unbiased branches")
@pytest.mark.slow
@pytest.mark.parametrize(("short", "name"), random_pairs(ALIKE))
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

    keys = jax.random.split(jax.random.key(2), draws)
    # A thousand at once stay in the processor's cache.
    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=1000))(keys)
    rows = np.concatenate([np.asarray(g) for g in found.values()], -1)
    return rows.mean(0), rows.std(0) / np.sqrt(draws)


@cache
def known_moments(law):
    """Return the moments that are known to be right of a family, for all its estimators."""
    plain = ScoreFunction(LeaveOneOut()) if law == "poisson" else Reparam()
    return moments(TraceGrad_ELBO(8, estimators={"x": plain, "w": LocalExpectation()}), law, 20_000)


@pytest.mark.grid(together="numbers in branches")
@pytest.mark.slow
@pytest.mark.parametrize("family", NUMBERS)
def test_numbers_unbiased(family):
    """Against the mean of the score function with a leave-one-out baseline, or of the reparameterized gradient."""
    wanted, error = known_moments(family.split("-")[0])
    chosen = TraceGrad_ELBO(estimators={"x": NUMBERS[family], "w": LocalExpectation()})
    found, spread = moments(chosen, family, 20_000)
    assert np.all(np.abs(found - wanted) < 4.5 * np.sqrt(error**2 + spread**2) + 1e-12)


@pytest.mark.slow
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
    """Python control flow on a value: branches run one by one, also where a branch has another site."""

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
        numpyro.sample("x", dist.Normal(0.0, 1.0).mask((z > 0) & new_site), obs=0.3)
        numpyro.sample("y", dist.Normal(0.0, jnp.where(z > 0, 2.0, 1.0)), obs=0.3)

    def gradient(program, new_site):
        objective = TraceGrad_ELBO()
        return jax.grad(lambda a: objective.loss(jax.random.key(0), {"a": a}, program, guide, new_site))(jnp.array(0.3))

    for new_site in (False, True):
        np.testing.assert_allclose(gradient(model, new_site), gradient(by_where, new_site), rtol=1e-6)


def over_a_scan():
    """Return a program with a binary site that two scanned ones and their data follow."""
    data = jnp.array([0.4, -0.7])

    def model():
        z = numpyro.sample("z", dist.Bernoulli(logits=-0.3))

        def step(w, x):
            w = numpyro.sample("w", dist.Bernoulli(logits=0.2 * w + z - 0.5)) * 1.0
            numpyro.sample("x", dist.Normal(w + z, 1.0), obs=x)
            return w, None

        scan(step, 0.0, data)

    def guide():
        a = numpyro.param("a", jnp.array([0.3, 0.8, -0.4]))
        z = numpyro.sample("z", dist.Bernoulli(logits=a[0]))
        scan(
            lambda w, _: (numpyro.sample("w", dist.Bernoulli(logits=a[1] * z + a[2] * w)) * 1.0, None),
            0.0,
            None,
            length=2,
        )

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [LocalExpectation(), DisARM(), MuProp(), REBAR(0.5, 0.8, learn=False)],
    ids=["local", "disarm", "muprop", "rebar"],
)
def test_a_scan_may_follow(estimator):
    model, guide = over_a_scan()
    moments = []
    for particles, chosen in ((8, ScoreFunction(LeaveOneOut())), (1, estimator)):
        plain = ScoreFunction(LeaveOneOut()) if particles > 1 else ScoreFunction()
        objective = TraceGrad_ELBO(particles, estimators={"z": chosen, "w": plain})

        def one(key, objective=objective):
            return jax.grad(lambda a: objective.loss(key, {"a": a}, model, guide))(jnp.array([0.3, 0.8, -0.4]))

        rows = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 40_000)))
        moments.append((rows.mean(0), rows.std(0) / 200))
    (wanted, error), (found, spread) = moments
    assert np.all(np.abs(found - wanted) < 4.5 * np.sqrt(error**2 + spread**2))


@pytest.mark.parametrize(
    ("estimator", "distribution", "words"),
    [
        (DisARM(), lambda: dist.Poisson(2.0), "Poisson is not binary"),
        (UnorderedSet(), lambda: dist.Poisson(2.0), "does not have finitely many values"),
        (LocalExpectation(), lambda: dist.Normal(0.0, 1.0), "does not have finitely many values"),
        (DisARM(), lambda: dist.Categorical(jnp.ones(3) / 3), "use one that fits there: CARMS.*, LocalExpectation"),
    ],
)
def test_misfits_are_refused(estimator, distribution, words):
    def program():
        numpyro.sample("z", distribution())

    with pytest.raises(EstimatorError, match=words) as error:
        TraceGrad_ELBO(estimators={"z": estimator}).loss(jax.random.key(0), {}, program, program)
    assert "'z'" in str(error.value)


SMALLER = {"chain": "event", "counts": "categorical_index", "hierarchy": "independent"}
"""Programs that show the same faults, where JAX takes a fraction of the time to compile an estimator."""


def proved(mutant):
    """Return whether `test_exact` or `test_unbiased` has this estimator on this program: the sound one need not pass twice."""
    table, pairs = (EXACT, exact_pairs(ALIKE)) if mutant.exact else (RANDOM, random_pairs(ALIKE))
    pairs = [getattr(pair, "values", pair) for pair in pairs]
    return any(table[short][0] == mutant.estimator and name == mutant.case for short, name in pairs)


def far(estimator, case, exact):
    """Return whether an estimator is seen to be wrong on a program."""
    if exact:
        return gradient_error(estimator, "numpyro", case) > 1e-6
    return z_score(estimator, "numpyro", case, draws=5000) > 8


# Several mutants break one estimator, which is seen to be sound once.
sound_is_far = cache(far)


@pytest.mark.grid(together="mutants of branches")
@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    mutant = replace(MUTANTS[name], case=SMALLER.get(MUTANTS[name].case, MUTANTS[name].case))
    shown = mutant.estimator, mutant.case, mutant.exact
    if not proved(mutant):
        assert not sound_is_far(*shown)
    mutant.apply(monkeypatch)
    assert far(*shown)
