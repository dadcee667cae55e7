"""Objectives that combine particles: exact over all tuples of outcomes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, RenyiELBO

from pplgrad import (
    IWAE,
    VIMCO,
    ConfigurationError,
    DReG,
    ProgramError,
    Renyi,
    Reparam,
    ReweightedWakeSleep,
)
from pplgrad.engine import surrogate
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.testing.in_numpyro import (
    HOST,
    KEY,
    assert_same,
    exact_bound_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    parameters,
    with_fixed_noise,
    z_of,
)
from pplgrad.testing.programs import CASES
from tests.bound_mutants import MUTANTS
from tests.bounds import (
    AMBIGUOUS,
    BRANCHES,
    KEPT,
    OBJECTIVES,
    RANDOM,
    REFUSED,
    SCORES,
    bound,
    branch_pairs,
    score_pairs,
    wake,
)


@cache
def wanted(name, power, particles, keep):
    """Return the exact gradient of a bound of a program, which is the same for all estimators."""
    return exact_bound_gradient(CASES[name], bound(power), particles, keep)


def make(name, estimator, objective, particles=2, vectorize=True):
    return TraceGrad_ELBO(
        particles, vectorize, estimators=dict.fromkeys(CASES[name].latents, estimator), objective=objective
    )


@pytest.mark.grid
@pytest.mark.parametrize(("objective", "name", "short"), score_pairs())
@pytest.mark.slow
def test_exact(objective, name, short):
    spec, power = OBJECTIVES[objective]
    found = expected_gradient(CASES[name], make(name, SCORES[short], spec), 2, shared=True)
    assert_same(found, wanted(name, power, 2, KEPT[name]))


@pytest.mark.grid
@pytest.mark.parametrize(("objective", "name", "short"), branch_pairs())
def test_branches_exact(objective, name, short):
    spec, power = OBJECTIVES[objective]
    found = expected_gradient_over_cells(CASES[name], make(name, BRANCHES[short], spec), 2)
    assert_same(found, wanted(name, power, 2, 0))


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [True, False, lambda f, xs: jax.lax.map(f, xs)], ids=["vmap", "map", "callable"])
@pytest.mark.parametrize("name", ["single", "shared_parameter"])
def test_three_particles_exact(name, vectorize):
    found = expected_gradient(CASES[name], make(name, VIMCO(), IWAE(), 3, vectorize), 3)
    assert_same(found, wanted(name, 1.0, 3, 0))


@pytest.mark.slow
def test_bounds_are_averaged_over_further_particles():
    found = expected_gradient(CASES["single"], make("single", VIMCO(), IWAE(2), 4), 4)
    assert_same(found, wanted("single", 1.0, 2, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["event_in_plate", "subsampled", "scaled"])
def test_the_program_as_a_whole(name):
    found = expected_gradient(CASES[name], make(name, VIMCO(), IWAE(plates=())), 2, shared=True)
    assert_same(found, wanted(name, 1.0, 2, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hierarchy", "event"])
def test_rebar_unbiased(name):
    case = CASES[name]
    wanted = exact_bound_gradient(case, bound(1.0), 2, 0)
    model, guide = case.build(HOST)
    guide = with_fixed_noise(guide, case)
    objective = make(name, RANDOM, IWAE())

    def one(key):
        return jax.grad(lambda p: objective.loss(key, p, model, guide))(parameters(case))

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 50_000))
    assert max(z_of(np.asarray(found[n]), value) for n, value in wanted.items()) < 4.5


@pytest.mark.parametrize("name", ["single", pytest.param("event_in_plate", marks=pytest.mark.slow)])
def test_wake_phases_exact(name):
    case = CASES[name]
    objective = TraceGrad_ELBO(2, objective=ReweightedWakeSleep())
    found = expected_gradient(case, objective, 2)
    wanted = exact_bound_gradient(case, wake(jax.lax.stop_gradient), 2, KEPT[name], draws_move=False)
    wanted["a"] = -wanted["a"]  # the guide's parameter raises log q, which log w subtracts
    assert_same(found, wanted)


@pytest.mark.slow
def test_one_particle_is_the_elbo():
    case = CASES["hierarchy"]
    model, guide = case.build(HOST)
    losses = [
        TraceGrad_ELBO(objective=objective).loss(jax.random.key(KEY), parameters(case), model, guide)
        for objective in (IWAE(), Renyi(0.3), IWAE(plates=()))
    ]
    plain = TraceGrad_ELBO().loss(jax.random.key(KEY), parameters(case), model, guide)
    np.testing.assert_allclose(losses, plain)


def continuous(discrete):
    """Return a program of two normal sites, one over the other, with a binary one between them if `discrete`."""
    data = jnp.array([0.4, -1.1])

    def model():
        with numpyro.plate("data", 2):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Bernoulli(logits=x)) if discrete else 0.0
            y = numpyro.sample("y", dist.Normal(x + b, 1.3))
            numpyro.sample("obs", dist.Normal(y * x + b, 0.7), obs=data)

    def guide():
        p = numpyro.param("p", jnp.array([0.3, -0.2, 0.4, 0.1, 0.6]))
        with numpyro.plate("data", 2):
            x = numpyro.sample("x", dist.Normal(p[0], jnp.exp(p[1])))
            b = numpyro.sample("b", dist.Bernoulli(logits=p[4] * x)) if discrete else 0.0
            numpyro.sample("y", dist.Normal(p[2] * x + 0.5 * b, jnp.exp(p[3])))

    return model, guide


def means(program, objective, draws):
    model, guide = program
    params = {"p": jnp.array([0.3, -0.2, 0.4, 0.1, 0.6])}

    def one(key):
        return jax.grad(lambda p: objective.loss(key, p, model, guide))(params)["p"]

    rows = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), draws)))
    return rows.mean(0), rows.std(0) / np.sqrt(draws)


@pytest.mark.grid(together="doubly reparameterized")
@pytest.mark.slow
@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.4)])
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "mixed"])
def test_doubly_reparameterized_is_unbiased(discrete, objective):
    found, wanted = (
        means(continuous(discrete), TraceGrad_ELBO(3, estimators={"[xy]": e}, objective=objective), 100_000)
        for e in (DReG(), Reparam())
    )
    assert np.all(np.abs(found[0] - wanted[0]) < 4.5 * np.sqrt(found[1] ** 2 + wanted[1] ** 2) + 1e-12)


@pytest.mark.slow
def test_doubly_reparameterized_of_one_site():
    """Σ w̃² ∂z log w ∂φ z, draw by draw."""

    def model():
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 0.7), obs=0.5)

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("m", 0.2), jnp.exp(numpyro.param("s", -0.3))))

    objective = TraceGrad_ELBO(3, estimators={"z": DReG()}, objective=IWAE())
    params, key = {"m": jnp.array(0.2), "s": jnp.array(-0.3)}, jax.random.key(2)
    found = jax.jit(jax.grad(lambda p: objective.loss(key, p, model, guide)))(params)
    values = []
    for k in jax.random.split(key, 3):
        run = numpyro.handlers.substitute(numpyro.handlers.seed(guide, jax.random.split(k)[1]), data=params)
        values.append(numpyro.handlers.trace(run).get_trace()["z"]["value"])
    noise = (jnp.stack(values) - params["m"]) / jnp.exp(params["s"])

    def log_w(z):
        q = dist.Normal(params["m"], jnp.exp(params["s"])).log_prob(z)
        return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(0.5) - q

    logs, slopes = jax.vmap(jax.value_and_grad(log_w))(jnp.stack(values))
    weights = jax.nn.softmax(logs) ** 2 * slopes
    np.testing.assert_allclose(found["m"], -weights.sum(), rtol=1e-9)
    np.testing.assert_allclose(found["s"], -(weights * noise * jnp.exp(params["s"])).sum(), rtol=1e-9)


@pytest.mark.slow
def test_the_value_is_that_of_the_hosts_bound():
    """Without subsampling, for the same draws."""
    model, guide = continuous(False)
    params = {"p": jnp.array([0.3, -0.2, 0.4, 0.1, 0.6])}
    keys = jax.random.split(jax.random.key(9), 400)
    found, wanted = (
        np.asarray(jax.jit(jax.vmap(lambda k, o=o: o.loss(k, params, model, guide)))(keys))
        for o in (TraceGrad_ELBO(5, objective=Renyi(0.5)), RenyiELBO(alpha=0.5, num_particles=5))
    )
    assert abs(found.mean() - wanted.mean()) < 4.5 * np.sqrt((found.var() + wanted.var()) / 400)


@pytest.mark.slow
def test_particles_share_the_minibatch():
    """Weights of different data points in one bound would mean nothing; with one point they are one sum of equal ones."""
    data = jnp.array([0.0, 100.0])

    def model():
        with numpyro.plate("data", 2, subsample_size=1) as index:
            numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=data[index])

    def guide():
        with numpyro.plate("data", 2, subsample_size=1):
            numpyro.sample("z", dist.Bernoulli(0.5))

    loss = jax.jit(lambda key: TraceGrad_ELBO(8, objective=IWAE()).loss(key, {}, model, guide))
    assert {round(float(loss(jax.random.key(k)))) for k in range(8)} == {2, 10_002}


@pytest.mark.slow
def test_training_with_the_defaults():
    case = CASES["mixed"]
    model, guide = case.build(HOST)
    svi = SVI(model, config_estimators(guide), numpyro.optim.Adam(0.01), TraceGrad_ELBO(4, objective=IWAE()))
    assert np.isfinite(svi.run(jax.random.key(0), 20, progress_bar=False).losses).all()


@pytest.mark.parametrize("words", REFUSED)
def test_misfits_are_refused(words):
    kind, estimator, objective, particles = REFUSED[words]
    given = {} if objective is None else {"objective": objective}
    name = "x" if isinstance(estimator, Reparam | DReG) else "z"
    elbo = TraceGrad_ELBO(particles, estimators={name: estimator}, **given)
    model, guide = CASES["mixed"].build(HOST)
    with pytest.raises(kind, match=words) as error:
        elbo.loss(jax.random.key(0), parameters(CASES["mixed"]), model, guide)
    assert f"'{name}'" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "objective", "words"), AMBIGUOUS)
def test_ambiguous_weights_are_refused(name, objective, words):
    model, guide = CASES[name].build(HOST)
    with pytest.raises((ProgramError, ConfigurationError), match=words):
        TraceGrad_ELBO(2, objective=objective).loss(jax.random.key(0), parameters(CASES[name]), model, guide)


def test_numbers_of_particles():
    with pytest.raises(ConfigurationError, match="num_particles=3; pass a multiple of 2"):
        TraceGrad_ELBO(3, objective=IWAE(2))
    with pytest.raises(ConfigurationError, match="sum_sites=False"):
        TraceGrad_ELBO(2, objective=IWAE(), sum_sites=False)
    for wrong in (
        lambda: Renyi(1.0),
        lambda: IWAE(0),
        lambda: IWAE(plates="data"),
        lambda: ReweightedWakeSleep(-1.0),
        lambda: ReweightedWakeSleep(0.5),
    ):
        with pytest.raises(ConfigurationError):
            wrong()


@pytest.mark.grid(together="mutants of bounds")
@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    mutant = MUTANTS[name]
    case = CASES[mutant.case]
    elbo = make(mutant.case, mutant.estimator, IWAE())
    wanted = exact_bound_gradient(case, bound(1.0), 2, KEPT[mutant.case])
    mutant.apply(monkeypatch)
    branches = mutant.estimator.uses_branches
    found = expected_gradient_over_cells(case, elbo, 2) if branches else expected_gradient(case, elbo, 2, shared=True)
    with pytest.raises(AssertionError):
        assert_same(found, wanted, 1e-6)


@pytest.mark.slow
def test_sleep_phase_unbiased():
    """The guide's gradient is that of −E_p(z, x)[log q(z; x)], and the model's is that of the wake phase."""

    def model(x):
        p = numpyro.param("p", jnp.array([0.4, -0.7, 0.9]))
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(logits=p[0]))
            numpyro.sample("x", dist.Bernoulli(logits=p[1] + p[2] * z), obs=x)

    def guide(x):
        a = numpyro.param("a", jnp.array([0.2, 0.5]))
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Bernoulli(logits=a[0] + a[1] * x))

    p, a, x = jnp.array([0.4, -0.7, 0.9]), jnp.array([0.2, 0.5]), jnp.array([1.0, 0.0])

    def crossed(a):
        total = 0.0
        for z in (0.0, 1.0):
            for seen in (0.0, 1.0):
                log_p = dist.Bernoulli(logits=p[0]).log_prob(z) + dist.Bernoulli(logits=p[1] + p[2] * z).log_prob(seen)
                total -= 2 * jnp.exp(log_p) * dist.Bernoulli(logits=a[0] + a[1] * seen).log_prob(z)
        return total

    def gradients(**given):
        elbo = TraceGrad_ELBO(2, objective=ReweightedWakeSleep(**given))
        one = jax.grad(lambda params, key: elbo.loss(key, params, model, guide, x))
        return jax.jit(jax.vmap(one, (None, 0)))({"p": p, "a": a}, jax.random.split(jax.random.key(0), 40_000))

    found = gradients(insomnia=0.0, dream=lambda drawn, x: (drawn["x"],))
    objective = ReweightedWakeSleep(insomnia=0.5, dream=lambda drawn, x: (drawn["x"],))
    svi = SVI(model, config_estimators(guide), numpyro.optim.Adam(0.01), TraceGrad_ELBO(2, objective=objective))
    assert np.isfinite(svi.run(jax.random.key(0), 5, x, progress_bar=False).losses).all()
    assert z_of(np.asarray(found["a"]), np.asarray(jax.grad(crossed)(a))) < 4.5
    wake = gradients()
    assert z_of(np.asarray(found["p"] - wake["p"]), np.zeros(3)) < 4.5


@pytest.mark.slow
def test_sleep_phase_at_log_odds_of_zero():
    """Each element's gradient is p − z = ±½, which the host differentiates to 0 or −1."""

    def model(x):
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(logits=jnp.zeros(2)))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(2))))

    elbo = TraceGrad_ELBO(2, objective=ReweightedWakeSleep(insomnia=0.0, dream=lambda drawn, x: (drawn["x"],)))
    found = jax.jit(jax.grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, model, guide, jnp.zeros(2))))(
        jnp.zeros(2)
    )
    np.testing.assert_allclose(np.abs(found), 0.5, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_mutants_of_the_reparameterized_score_are_caught(factor, monkeypatch):
    """The term left out, with the wrong sign, or twice."""
    plain = surrogate.path_terms
    monkeypatch.setattr(surrogate, "path_terms", lambda *args: factor * plain(*args))
    with pytest.raises(AssertionError):
        test_doubly_reparameterized_of_one_site()
