"""Subsets and rankings: their laws, and estimators at them, against enumeration."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pplgrad import (
    REBAR,
    RELAX,
    SIMPLE,
    EstimatorError,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    ScoreFunction,
    StraightThrough,
)
from pplgrad.core.noise import replaced_noise
from pplgrad.estimators import perturbed
from pplgrad.numpyro import PermutationMatrix, PlackettLuce, Subset, TraceGrad_ELBO, check_gradients
from pplgrad.numpyro._array_ops import OPS
from pplgrad.testing import gradient_error, z_score
from pplgrad.testing.in_numpyro import HOST, assert_same, exact_gradient, expected_gradient
from pplgrad.testing.structured import MATRICES, STRUCTURED
from tests import structures


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize(("n", "k"), structures.LAWS)
@pytest.mark.parametrize("impossible", [False, True])
def test_law_of_subsets(n, k, impossible):
    logits = structures.some_logits(n, impossible and n > k)
    law = Subset(k, jnp.asarray(logits))
    values = law.enumerate_support()
    for row in (0, 1):
        wanted, probs = structures.law(logits[row], k)
        mean, cov = structures.covariance(logits[row], k)
        found = {
            tuple(z): float(p) for z, p in zip(np.asarray(values[:, row]), law.log_prob(values)[:, row], strict=True)
        }
        assert len(found) == len(wanted)
        np.testing.assert_allclose([np.exp(found[tuple(z)]) for z in wanted], probs, atol=1e-12)
        np.testing.assert_allclose(law.mean[row], mean, atol=1e-12)
        np.testing.assert_allclose(law.variance[row], np.diag(cov), atol=1e-12)
        can = wanted[probs > 0]
        both = jax.jit(jax.jacrev(lambda x: (Subset(k, x).mean, Subset(k, x).log_prob(can))))  # noqa: B023
        jacobian, scores = both(jnp.asarray(logits[row]))
        np.testing.assert_allclose(jacobian, cov, atol=1e-11)
        np.testing.assert_allclose(scores, np.where(np.isfinite(logits[row]), can - mean, 0.0), atol=1e-11)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2), (5, 4)])
def test_draws_of_subsets(n, k):
    logits = structures.some_logits(n, True)
    drawn = np.asarray(jax.jit(lambda key: Subset(k, jnp.asarray(logits)).sample(key, (20_000,)))(jax.random.key(1)))
    assert drawn.shape == (20_000, 2, n) and (drawn.sum(-1) == k).all()
    for row in (0, 1):
        values, probs = structures.law(logits[row], k)
        found = (drawn[:, row, None] == values).all(-1).mean(0)
        assert (np.abs(found - probs) < 5 * np.sqrt(probs * (1 - probs) / 20_000) + 1e-12).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_law_of_rankings(n):
    logits = structures.some_logits(n, False)
    law = PlackettLuce(jnp.asarray(logits))
    found = law.log_prob(law.enumerate_support())
    drawn = np.asarray(law.sample(jax.random.key(0), (20_000,)))
    for row in (0, 1):
        orders, log_probs = structures.rankings(logits[row])
        np.testing.assert_array_equal(law.enumerate_support()[:, row], orders)
        np.testing.assert_allclose(found[:, row], log_probs, atol=1e-11)
        often, probs = (drawn[:, row, None] == orders).all(-1).mean(0), np.exp(log_probs)
        assert (np.abs(often - probs) < 5 * np.sqrt(probs * (1 - probs) / 20_000) + 5e-4).all()  # Of rare ones, ten.


@pytest.mark.slow
def test_extreme_logits_stay_finite():
    far = jnp.array([0.0, -2000.0, -3000.0, 1500.0])
    np.testing.assert_allclose(PlackettLuce(far).log_prob(jnp.array([2, 1, 0, 3])), -9500.0)
    wide = jnp.linspace(-900.0, 900.0, 200)
    value = (jnp.arange(200) >= 150).astype(float)
    found, slopes = jax.jit(jax.value_and_grad(lambda x: Subset(50, x).log_prob(value)))(wide)
    assert -1e-3 < float(found) <= 0
    assert np.isfinite(slopes).all()


@pytest.mark.slow
def test_shapes_pytrees_and_support():
    law = Subset(2, jnp.zeros((3, 4)))
    assert law.expand((5, 3)).sample(jax.random.key(0)).shape == (5, 3, 4)
    leaves, tree = jax.tree.flatten(law)
    again = jax.tree.unflatten(tree, leaves)
    assert again.k == 2 and again.support(law.sample(jax.random.key(0))).all()
    assert not law.support(jnp.ones((3, 4))).any()
    checked = Subset(2, jnp.zeros(4), validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        assert checked.log_prob(jnp.ones(4)) == -jnp.inf
    ranked = PlackettLuce(jnp.zeros((3, 4)))
    assert ranked.support(ranked.sample(jax.random.key(0))).all() and not ranked.support(jnp.zeros((3, 4), int)).any()
    assert jax.vmap(lambda x: Subset(2, x).log_prob(jnp.array([1.0, 1, 0, 0])))(jnp.zeros((3, 4))).shape == (3,)
    for large in (Subset(20, jnp.zeros(40)), PlackettLuce(jnp.zeros(9))):
        assert not large.has_enumerate_support
        with pytest.raises(NotImplementedError, match="too many"):
            large.enumerate_support()


@pytest.mark.parametrize("make", [
    lambda: Subset(0, jnp.zeros(3)),
    lambda: Subset(4, jnp.zeros(3)),
    lambda: Subset(2.0, jnp.zeros(3)),
    lambda: Subset(2, jnp.array([0.0, -jnp.inf, -jnp.inf]), validate_args=True),
    lambda: Subset(1, jnp.array([0.0, jnp.nan]), validate_args=True),
    lambda: PlackettLuce(jnp.array([0.0, -jnp.inf]), validate_args=True),
    lambda: PlackettLuce(1.0),
])  # fmt: skip
def test_bad_arguments(make):
    with pytest.raises(ValueError, match=r"Subset\(k=|PlackettLuce"):
        make()


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("short", structures.EXACT)
def test_exact_gradient(name, short):
    estimator, particles = structures.EXACT[short]
    assert gradient_error(estimator, "numpyro", name, particles=particles) < 1e-9


@pytest.mark.parametrize("short", structures.RELAXED)
def test_relaxed_gradient(short):
    estimator = structures.RELAXED[short]
    with replaced_noise(structures.fixed_noise):
        found = expected_gradient(structures.CASE, TraceGrad_ELBO(estimators={"z": estimator}), 1)
    np.testing.assert_allclose(found["a"], structures.expected(estimator), atol=1e-9)


def learn(law, cost=lambda z: (z * jnp.arange(4.0)).sum(-1)):
    """Return a program of one site."""

    def model():
        z = numpyro.sample("z", law(jnp.zeros(4)))
        numpyro.factor("f", cost(z))

    def guide():
        numpyro.sample("z", law(numpyro.param("a", jnp.array([0.1, 0.2, -0.4, 0.3]))))

    return model, guide


def pairs(logits):
    return Subset(2, logits)


@pytest.mark.parametrize(("law", "estimator"), [
    (pairs, GumbelSoftmax()),
    (pairs, StraightThrough()),
    (pairs, REBAR()),
    (PlackettLuce, RELAX()),
    (lambda x: dist.Poisson(jnp.exp(x)).to_event(1), RELAX(through_cost=False)),
    (PlackettLuce, REBAR()),
    (PermutationMatrix, GumbelSoftmax()),
    (PermutationMatrix, LocalExpectation()),
    (PlackettLuce, SIMPLE()),
    (lambda x: dist.Bernoulli(logits=x).to_event(1), SIMPLE()),
])  # fmt: skip
def test_what_does_not_fit_is_refused(law, estimator):
    model, guide = learn(law)
    with pytest.raises(EstimatorError, match="site 'z'"):
        TraceGrad_ELBO(estimators={"z": estimator}).loss(jax.random.key(0), {}, model, guide)


@pytest.mark.slow
def test_a_long_subset_is_not_listed():
    def model():
        numpyro.factor("f", numpyro.sample("z", Subset(20, jnp.zeros(40)))[0])

    def guide():
        numpyro.sample("z", Subset(20, numpyro.param("a", jnp.linspace(-1.0, 1.0, 40))))

    params = {"a": jnp.linspace(-1.0, 1.0, 40)}
    with pytest.raises(EstimatorError, match="site 'z': Subset has too many values to list"):
        TraceGrad_ELBO(estimators={"z": LocalExpectation()}).loss(jax.random.key(0), params, model, guide)
    for estimator in (ScoreFunction(samples=2), SIMPLE()):
        objective = TraceGrad_ELBO(estimators={"z": estimator})
        grads = jax.jit(jax.grad(lambda p: objective.loss(jax.random.key(0), p, model, guide)))(params)  # noqa: B023
        assert np.isfinite(grads["a"]).all()


def test_a_relaxed_bernoulli_does_not_fit_a_subset():
    def model():
        numpyro.sample("z", Subset(2, jnp.zeros(4)))

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(4))).to_event(1))

    with pytest.raises(EstimatorError, match="Site 'z' is relaxed"):
        TraceGrad_ELBO(estimators={"z": GumbelSoftmax()}).loss(jax.random.key(0), {}, model, guide)


def test_misuse_of_a_relaxed_subset_is_refused():
    model, guide = learn(pairs, lambda z: jnp.where(z[0] == 1, 1.0, 2.0))
    with pytest.raises(EstimatorError, match="'z'"):
        TraceGrad_ELBO(estimators={"z": SIMPLE()}).loss(jax.random.key(0), {"a": jnp.zeros(4)}, model, guide)


@pytest.mark.slow
def test_certificate_by_enumeration():
    model, guide = learn(pairs)
    estimators = {"z": ScoreFunction(LeaveOneOut())}
    found = check_gradients(
        model, guide, estimators=estimators, num_particles=2, reference="enumeration", draws=200, tolerance=0.9
    )
    assert found.status == "unbiased"


@pytest.mark.slow
@pytest.mark.grid(together="mutants of structures")
@pytest.mark.parametrize("name", structures.MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    assert structures.law_error(Subset, PlackettLuce, jnp.asarray) < 1e-11
    structures.MUTANTS[name](monkeypatch)
    assert structures.law_error(Subset, PlackettLuce, jnp.asarray) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", structures.NETWORK_ON)
def test_a_network_alone_is_a_control_variate(name):
    assert z_score(structures.NETWORK, "numpyro", name, draws=50_000) < 4.5


def drawn_ranking(logits, order, key):
    """Return what an estimator sees of a ranking, and its uniform noise."""
    uniform = jax.random.uniform(jax.random.key(key), logits.shape, jnp.float64)
    noise = SimpleNamespace(uniform=lambda shape, like: uniform)
    return SimpleNamespace(
        ops=OPS, noise=noise, is_ranking=True, is_matrix=False, ranking_logits=logits, ranking=order
    ), uniform


@pytest.mark.slow
def test_keys_given_a_ranking_move_as_their_formula_says():
    logits = jnp.asarray(structures.some_logits(5, False))
    order = jnp.stack([jnp.array([3, 0, 4, 1, 2]), jnp.array([1, 2, 3, 4, 0])])
    draw, noise = drawn_ranking(logits, order, 0)

    def keys(logits):
        ranked = jnp.take_along_axis(logits, order, -1)
        rest = jnp.log(jnp.cumsum(jnp.exp(ranked)[:, ::-1], -1)[:, ::-1])
        found = -jnp.log(jnp.cumsum(-jnp.log(noise) * jnp.exp(-rest), -1))
        return jnp.take_along_axis(found, jnp.argsort(order, -1), -1)

    drawn = perturbed.perturbed(draw)
    np.testing.assert_allclose(drawn.keys, keys(logits), atol=1e-12)
    np.testing.assert_array_equal(jnp.argsort(-drawn.keys, -1), order)
    along = jnp.cos(jnp.arange(10.0)).reshape(2, 5)
    _, back = jax.vjp(keys, logits)
    np.testing.assert_allclose(drawn.given(along), back(along)[0], atol=1e-12)
    scores = jax.grad(lambda x: PlackettLuce(x).log_prob(order).sum())(logits)
    np.testing.assert_allclose(drawn.score(), scores, atol=1e-12)


def test_keys_given_a_drawn_ranking_are_gumbel_around_the_logits():
    logits = jnp.broadcast_to(jnp.array([1.0, -0.5, 0.3]), (100_000, 3))
    order = PlackettLuce(logits).sample(jax.random.key(1))
    draw, _ = drawn_ranking(logits, order, 2)
    gumbel = np.exp(-np.exp(-np.asarray(perturbed.perturbed(draw).keys - logits)))
    for power in (1, 2, 3):  # A Gumbel's distribution function at itself is uniform.
        np.testing.assert_allclose((gumbel**power).mean(0), 1 / (power + 1), atol=5 * 0.3 / np.sqrt(100_000))
    both = np.corrcoef(gumbel.T)
    np.testing.assert_allclose(both, np.eye(3), atol=5 / np.sqrt(100_000))


@pytest.mark.parametrize("name", structures.NETWORK_MUTANTS)
def test_mutant_of_keys_is_caught(name, monkeypatch):
    structures.NETWORK_MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        test_keys_given_a_ranking_move_as_their_formula_says()


@pytest.mark.slow
def test_keys_that_move_freely_are_seen_in_the_mean(monkeypatch):
    structures.keys_given_a_ranking_move_freely(monkeypatch)
    assert z_score(structures.NETWORK, "numpyro", "ranking", draws=400_000) > 4.5


@pytest.mark.slow
def test_subsets_and_rankings_are_summed_out_of_a_model():
    made = structures.summed_out(HOST)
    assert_same(expected_gradient(made.case, TraceGrad_ELBO(), 1), exact_gradient(made.by_hand))


@pytest.mark.grid
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("short", structures.MATRIX)
def test_exact_gradient_of_matrices(name, short):
    estimator, particles = structures.MATRIX[short]
    assert gradient_error(estimator, "numpyro", name, particles=particles) < 1e-9


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("short", structures.MATRIX_RANDOM)
def test_relaxed_matrices_are_a_control_variate(name, short):
    assert z_score(structures.MATRIX_RANDOM[short], "numpyro", name, draws=50_000) < 4.5


@pytest.mark.slow
def test_law_of_matrices():
    logits = jnp.asarray(structures.some_logits(4, False))
    order = PlackettLuce(logits).sample(jax.random.key(0), (7,))
    law, matrices = PermutationMatrix(logits, validate_args=True), jax.nn.one_hot(order, 4)
    np.testing.assert_allclose(law.log_prob(matrices), PlackettLuce(logits).log_prob(order), atol=1e-12)
    drawn = law.sample(jax.random.key(0), (7,))
    assert drawn.shape == (7, 2, 4, 4) and law.support(drawn).all() and drawn.dtype == logits.dtype
    np.testing.assert_array_equal(jnp.argmax(drawn, -1), order)
    with pytest.warns(UserWarning, match="Out-of-support"):
        law.log_prob(jnp.ones((2, 4, 4)) / 4)
    assert not law.has_enumerate_support


@pytest.mark.slow
def test_relaxed_matrices_move_with_their_keys_as_their_formula_says():
    logits = jnp.asarray(structures.some_logits(4, False))
    draw, _ = drawn_ranking(logits, jnp.array([[3, 0, 1, 2], [1, 2, 3, 0]]), 0)
    draw.is_matrix = True
    drawn = perturbed.perturbed(draw)
    weights, back = jax.vjp(lambda keys: replace(drawn, keys=keys).weights(0.7), drawn.keys)
    slopes = jnp.sin(jnp.arange(32.0)).reshape(2, 16)
    np.testing.assert_allclose(drawn.along_keys(slopes, weights, 0.7), back(slopes)[0], atol=1e-12)
    np.testing.assert_allclose(weights.reshape(2, 4, 4).sum(-1), 1.0)
    cold = drawn.weights(1e-3).reshape(2, 4, 4)
    np.testing.assert_allclose(cold, jax.nn.one_hot(draw.ranking, 4), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
def test_mutant_of_matrices_is_seen_in_the_mean(name, monkeypatch):
    structures.keys_of_a_matrix_move_freely(monkeypatch)
    assert z_score(structures.MATRIX_RANDOM["rebar"], "numpyro", name, draws=50_000) > 4.5
