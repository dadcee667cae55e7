"""Relaxations: their expected gradient is what their formula says, bias included, and misuse is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import Adam

from pplgrad import (
    REBAR,
    RELAX,
    BaselineError,
    DoubleCV,
    EstimatorError,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    MuProp,
    ReinMax,
    ScoreFunction,
    StraightThrough,
)
from pplgrad.numpyro import OneHotCategorical, TraceGrad_ELBO, config_estimators, is_baseline_param
from pplgrad.testing.cells import disturb, z_of
from pplgrad.testing.in_numpyro import HOST, assert_same, exact_gradient, expected_gradient
from pplgrad.testing.programs import CASES, Case
from tests import relaxing

CASE = Case("relaxing", {"a": relaxing.LOGITS}, {"z": ((2,), 2)}, relaxing.program)
THREE = Case("three", {"a": relaxing.THREE}, {"z": ((), 3)}, relaxing.one_of_three, one_hot=("z",))


def gradients(estimator, draws, particles=1, case=CASE):
    """Return gradients of the loss of the program, one a row."""
    model, guide = case.build(HOST)
    objective = TraceGrad_ELBO(particles, estimators={"z": estimator})

    def one(key):
        return jax.grad(lambda a: objective.loss(key, {"a": a}, model, guide))(jnp.array(case.params["a"]))

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws)))


@pytest.mark.parametrize("short", relaxing.FINITE)
def test_expected_gradient(short):
    found = expected_gradient(CASE, TraceGrad_ELBO(estimators={"z": relaxing.FINITE[short]}), 1)
    np.testing.assert_allclose(found["a"], relaxing.expected(short), atol=1e-9)


@pytest.mark.parametrize("particles", [1, 2])
def test_reinmax_is_exact_for_a_quadratic(particles):
    """A normal density is quadratic in a binary value that moves its mean."""
    found = expected_gradient(CASES["single"], TraceGrad_ELBO(particles, estimators={"z": ReinMax()}), particles)
    assert_same(found, exact_gradient(CASES["single"]))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gumbel_softmax_is_the_gradient_of_the_relaxed_objective(temperature):
    found = gradients(GumbelSoftmax(temperature), 50_000)
    wanted = relaxing.relaxed_objective_gradient(temperature)
    assert z_of(found, wanted) < 4.5


@pytest.mark.slow
def test_bias_vanishes_with_the_temperature():
    biases = [np.abs(relaxing.relaxed_objective_gradient(t, 4000) - relaxing.exact()).max() for t in (1.0, 0.3, 0.05)]
    assert biases[0] > biases[1] > 3 * biases[2]


@pytest.mark.slow
@pytest.mark.parametrize("short", relaxing.HARD)
def test_hard_draws_have_the_slopes_of_concrete_weights(short):
    estimator = relaxing.HARD[short]
    assert z_of(gradients(estimator, 50_000), relaxing.hard_gradient(estimator.temperature)) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("short", ["hard", "rao"])
def test_hard_draws_of_three_have_the_slopes_of_concrete_weights(short):
    found, wanted = gradients(relaxing.HARD[short], 50_000, case=THREE), relaxing.hard_slopes_of_three(0.5)
    error = np.sqrt(found.var(0) / len(found) + wanted.var(0) / len(wanted))
    assert np.max(np.abs(found.mean(0) - wanted.mean(0)) / error) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("name", relaxing.MUTANTS)
def test_gumbel_rao_mutant_is_caught(name, monkeypatch):
    owner, attribute, broken = relaxing.MUTANTS[name]
    monkeypatch.setattr(owner, attribute, broken)
    estimator = relaxing.HARD["rao"]
    assert z_of(gradients(estimator, 50_000), relaxing.hard_gradient(estimator.temperature)) > 4.5


@pytest.mark.slow
def test_gumbel_rao_has_the_mean_of_the_hard_one_and_less_variance():
    hard, rao = gradients(GumbelSoftmax(0.5, hard=True), 50_000), gradients(GumbelRao(10, 0.5), 50_000)
    z = (hard.mean(0) - rao.mean(0)) / np.sqrt((hard.var(0) + rao.var(0)) / 50_000)
    assert np.all(np.abs(z) < 4.5) and np.all(rao.var(0) < 0.95 * hard.var(0))


@pytest.mark.slow
def test_the_argmax_of_the_relaxed_draw_is_the_hosts_draw():
    """The noise is drawn given the draw: hard weights are the draws of Trace_ELBO, and so is the loss."""
    model, guide = CASES["one_hot"].build(HOST)
    params = {name: jnp.asarray(value) for name, value in CASES["one_hot"].params.items()}

    def losses(objective):
        run = jax.jit(lambda key: objective.loss(key, params, model, guide))
        return [run(jax.random.key(key)) for key in range(3)]

    wanted = losses(Trace_ELBO(2))
    for estimator in (StraightThrough(), GumbelSoftmax(0.3, hard=True), ReinMax()):
        np.testing.assert_allclose(losses(TraceGrad_ELBO(2, estimators={"*": estimator})), wanted)


@pytest.mark.slow
def test_a_relaxed_parent_of_a_score_function_site():
    """z relaxed and k by the score function: exact for k's logits given z; z's weights move k's logits."""
    case = CASES["one_hot"]
    found = expected_gradient(case, TraceGrad_ELBO(estimators={"z": StraightThrough(), "k": ScoreFunction()}), 1)
    np.testing.assert_allclose(found["a"], exact_gradient(case)["a"], atol=1e-9)


@pytest.mark.slow
def test_trains_with_a_temperature_that_is_an_argument():
    def model(temperature):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=2.0)

    def guide(temperature):
        logit = numpyro.param("a", jnp.array(0.0))
        numpyro.sample("z", dist.Bernoulli(logits=logit), infer={"estimator": GumbelSoftmax(temperature)})

    svi = SVI(model, config_estimators(guide), Adam(0.05), TraceGrad_ELBO(8))
    state = svi.init(jax.random.key(0), 1.0)
    step = jax.jit(svi.update)
    for i in range(300):
        state, _ = step(state, jnp.maximum(0.2, 1.0 - i / 200))
    # The posterior's logit: log(0.4 / 0.6) + log N(2; 2, 1) - log N(2; 0, 1).
    np.testing.assert_allclose(svi.get_params(state)["a"], np.log(0.4 / 0.6) + 2.0, atol=0.4)


MISUSES = {
    "equal": lambda z: jnp.where(z == 1, 1.0, -1.0),
    "where": lambda z: jnp.where(z, 1.0, -1.0),
    "index": lambda z: jnp.array([1.0, 2.0])[z.astype(int)],
    "copied": lambda z: jnp.where(jnp.stack([z, z])[1] > 0.5, 1.0, -1.0),
    "round": lambda z: jnp.round(z),
    "search": lambda z: jnp.array([1.0, 2.0, 3.0])[jnp.searchsorted(jnp.array([0.2, 0.5]), z)],
    "nonzero": lambda z: 1.0 + jnp.nonzero(jnp.stack([1 - z, z]), size=1)[0][0],
    "loop": lambda z: jax.lax.scan(lambda c, _: (c, jnp.where(c > 0, 1.0, 2.0)), z, None, length=2)[1].sum(),
}


@pytest.mark.grid
@pytest.mark.parametrize("estimator", [GumbelSoftmax(), StraightThrough()])
@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_refused(misuse, estimator):
    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=0.3))

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(MISUSES[misuse](z), 1.0), obs=0.3)

    with pytest.raises(EstimatorError, match="Site 'z' is relaxed, but the program compares"):
        TraceGrad_ELBO(estimators={"z": estimator}).loss(jax.random.key(0), {}, model, guide)


@pytest.mark.slow
def test_a_relaxed_value_may_be_a_parameter_of_a_distribution():
    """NumPyro compares a parameter with its constraint, and nothing comes of it."""

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.3)))

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=0.3)

    elbo = TraceGrad_ELBO(estimators={"z": GumbelSoftmax()})
    slope = jax.grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, model, guide))(0.3)
    assert jnp.isfinite(slope) and slope != 0


@pytest.mark.slow
def test_what_is_computed_from_a_relaxed_value_may_be_compared():
    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=0.3))

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Gamma(1.0 + jnp.maximum(2 * z - 1, 0.1), 1.0), obs=0.3)

    TraceGrad_ELBO(estimators={"z": GumbelSoftmax()}).loss(jax.random.key(0), {}, model, guide)


def test_misfits_are_refused():
    def loss(guide_law, model_law):
        objective = TraceGrad_ELBO(estimators={"z": GumbelSoftmax()})
        return objective.loss(
            jax.random.key(0),
            {},
            lambda: numpyro.sample("z", model_law),
            lambda: numpyro.sample("z", guide_law),
        )

    with pytest.raises(EstimatorError, match="'z': a Categorical .* OneHotCategorical"):
        loss(dist.Categorical(jnp.ones(3) / 3), dist.Categorical(jnp.ones(3) / 3))
    with pytest.raises(EstimatorError, match="'z': Poisson cannot be relaxed"):
        loss(dist.Poisson(1.0), dist.Poisson(1.0))
    with pytest.raises(EstimatorError, match="'z' is relaxed in the guide, but .* Binomial, is not defined"):
        loss(dist.Bernoulli(0.3), dist.Binomial(1, 0.3))


@pytest.mark.slow
def test_one_hot_categorical():
    logits = jnp.array([[0.1, -0.4, 0.9], [1.0, 2.0, -1.0]])
    law = OneHotCategorical(logits=logits)
    draws = law.sample(jax.random.key(0), (5,))
    assert draws.shape == (5, 2, 3) and law.support(draws).all() and not law.support(draws * 0.5).any()
    flat = dist.Categorical(logits=logits)
    np.testing.assert_allclose(law.log_prob(draws), flat.log_prob(draws.argmax(-1)))
    np.testing.assert_allclose(OneHotCategorical(probs=law.probs).log_prob(draws), law.log_prob(draws))
    assert law.enumerate_support().shape == (3, 2, 3) and law.enumerate_support(expand=False).shape == (3, 1, 3)
    np.testing.assert_allclose(law.mean + law.variance, 2 * law.probs - law.probs**2)
    assert jax.tree.map(jnp.shape, jax.tree.leaves(law)) == [(2, 3)]
    with pytest.raises(ValueError, match="exactly one"):
        OneHotCategorical()


@pytest.mark.slow
@pytest.mark.parametrize("short", relaxing.LEARNING)
def test_learning_follows_the_gradient_of_the_squared_gradient(short):
    model, guide = relaxing.fixed_prior(HOST)
    wrapped = config_estimators(guide, {"z": relaxing.LEARNING[short]})
    key, start = jax.random.key(4), {"a": jnp.array(relaxing.LOGITS)}
    sites = numpyro.handlers.trace(numpyro.handlers.seed(wrapped, 0)).get_trace()
    learned = {
        name: disturb(name, np.asarray(site["value"])) for name, site in sites.items() if is_baseline_param(name)
    }

    @jax.jit
    def gradient(learned):
        return jax.grad(lambda p: TraceGrad_ELBO().loss(key, p, model, wrapped))({**start, **learned})

    wanted, unit = relaxing.slope_by_differences(lambda p: float((gradient(p)["a"] ** 2).sum()), learned)
    found = gradient(learned)
    np.testing.assert_allclose(sum((found[n] * unit[n]).sum() for n in learned), wanted, rtol=1e-5)
    svi = SVI(model, wrapped, Adam(0.05), TraceGrad_ELBO())
    result = svi.run(jax.random.key(0), 100, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert all((result.params[name] != sites[name]["value"]).any() for name in learned)
    with pytest.raises(BaselineError, match="only a wrapped guide can register it"):
        TraceGrad_ELBO(estimators={"z": relaxing.LEARNING[short]}).loss(key, start, model, guide)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator", [MuProp(), DoubleCV(learn=False), REBAR(learn=False)], ids=["muprop", "double", "rebar"]
)
def test_branches_that_relax_refuse_what_they_cannot_relax(estimator):
    def program(law, use):
        def run():
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            w = numpyro.sample("w", law(0.5 + z))
            numpyro.sample("x", dist.Normal(use(w), 1.0), obs=0.3)

        def guide():
            numpyro.sample("w", law(0.5 + run_z()))

        # What is refused is refused when it is traced.
        objective = TraceGrad_ELBO(estimators={"z": estimator})
        jax.eval_shape(lambda key: objective.loss(key, {}, run, guide), jax.random.key(0))

    def run_z():
        return numpyro.sample("z", dist.Bernoulli(0.3))

    with pytest.raises(EstimatorError, match="'w' follows site 'z', .* Poisson cannot be relaxed"):
        program(dist.Poisson, lambda w: w)
    with pytest.raises(EstimatorError, match="Site 'w' is relaxed, but the program compares"):
        program(lambda p: dist.Bernoulli(0.5 * p), lambda w: jnp.where(w == 1, 2.0, 1.0))
    program(lambda p: dist.Bernoulli(0.5 * p), lambda w: 1.0 + w)
    program(lambda p: dist.Gamma(p, 1.0), lambda w: w)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [GumbelSoftmax, GumbelRao, ReinMax, GappedStraightThrough])
def test_a_temperature_may_follow_the_arguments(estimator):
    def model(step):
        numpyro.factor("f", numpyro.sample("z", dist.Bernoulli(0.4)) ** 2)

    def guide(step):
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.3)))

    def gradient(temperature):
        elbo = TraceGrad_ELBO(estimators={"z": estimator(temperature=temperature)})
        return jax.jit(jax.grad(lambda a, step: elbo.loss(jax.random.key(0), {"a": a}, model, guide, step)))(0.3, 4.0)

    np.testing.assert_allclose(gradient(lambda step: 1.0 / step), gradient(0.25))


@pytest.mark.slow
def test_relax_without_the_cost_needs_no_derivative():
    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.3)))

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.factor("f", jnp.where(z == 1, 2.0, 0.5))

    def losses(estimator):
        svi = SVI(model, config_estimators(guide, {"z": estimator}), Adam(0.1), TraceGrad_ELBO())
        return svi.run(jax.random.key(0), 2, progress_bar=False).losses

    assert np.isfinite(losses(RELAX(through_cost=False))).all()
    with pytest.raises(EstimatorError, match="Site 'z' is relaxed, but the program compares"):
        losses(RELAX())


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [REBAR(), RELAX()], ids=["rebar", "relax"])
def test_learning_leaves_the_gradient_of_arguments_alone(estimator):
    """Parameters that are the program's arguments are not among those that branches hold constant by name."""

    def model(a):
        z = numpyro.sample("z", dist.Bernoulli(0.4).expand((2,)).to_event(1))
        numpyro.sample("x", dist.Normal(z @ jnp.array([1.0, 0.5]) * jnp.exp(a[2]), 1.0), obs=1.4)

    def guide(a):
        numpyro.sample("z", dist.Bernoulli(logits=a[:2]).to_event(1))

    def gradient(estimator):
        wrapped = config_estimators(guide, {"z": estimator})
        sites = numpyro.handlers.trace(numpyro.handlers.seed(wrapped, 0)).get_trace(a)
        learned = {name: site["value"] for name, site in sites.items() if is_baseline_param(name)}
        assert bool(learned) == estimator.learn
        return jax.jit(jax.grad(lambda a: TraceGrad_ELBO().loss(jax.random.key(1), learned, model, wrapped, a)))(a)

    a = jnp.array([0.3, -0.4, 0.1])
    # An untrained network adds nothing: until then RELAX is REBAR.
    np.testing.assert_allclose(gradient(estimator), gradient(REBAR(learn=False)), rtol=1e-9)
