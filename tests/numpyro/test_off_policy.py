"""Objectives at the draws of another program: exact over all draws of the proposal."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import (
    ConfigurationError,
    DisARM,
    EstimatorError,
    LeaveOneOut,
    LogVariance,
    ProgramError,
    ScoreFunction,
    TrajectoryBalance,
)
from pplgrad.numpyro import TraceGrad_ELBO, check_gradients, config_estimators
from pplgrad.numpyro._tracing import particle_trace
from pplgrad.testing.in_numpyro import HOST, KEY, _which_particle, array
from tests import off_policy as shared

PARAMS = {"a": shared.A, "m": shared.M, "log_normalizer": shared.LOG_Z}


def expected(make_elbo, program, params, rows, weights, particles):
    """Return E_r of loss and gradients; `rows` are the values of all particles, (tuples, particles, ...)."""
    model, guide = program
    which = _which_particle(particles)
    params = {name: array(x) for name, x in params.items()}

    def one(values):
        def proposal():
            mine = which()
            for name, value in values.items():
                numpyro.sample(name, dist.Delta(value[mine]))

        elbo = make_elbo(proposal)
        return jax.value_and_grad(lambda p: elbo.loss(jax.random.key(KEY), p, model, guide))(params)

    losses, gradients = jax.jit(jax.vmap(one))({name: array(x) for name, x in rows.items()})
    weights = np.asarray(weights)
    return {"loss": weights @ losses} | {n: np.tensordot(weights, np.asarray(g), 1) for n, g in gradients.items()}


def expected_over_pairs(objective_of, particles, vectorized=True):
    rows, r, _, _ = shared.pair_rows()
    picked, weights = map(np.array, zip(*shared.tuples(r, particles), strict=True))

    def make(proposal):
        return TraceGrad_ELBO(particles, vectorize_particles=vectorized, objective=objective_of(proposal))

    values = {name: value[picked] for name, value in rows.items()}
    return expected(make, shared.pair(HOST), PARAMS, values, weights, particles)


def assert_log_variance_exact(particles=2, vectorized=True):
    _, r, f, slopes = shared.pair_rows()
    value, wanted = shared.half_variance(r, f, slopes)
    found = expected_over_pairs(LogVariance, particles, vectorized)
    np.testing.assert_allclose(found["loss"], value, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["a"], wanted, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["m"], 0.0, atol=0)


@pytest.mark.parametrize(("particles", "vectorized"), [(2, True), (3, True), (2, False)])
def test_log_variance_exact(particles, vectorized):
    assert_log_variance_exact(particles, vectorized)


def test_variances_are_averaged_over_further_particles():
    _, r, f, slopes = shared.pair_rows()
    found = expected_over_pairs(lambda proposal: LogVariance(proposal, samples=2), 4)
    np.testing.assert_allclose(found["a"], shared.half_variance(r, f, slopes)[1], atol=1e-9, rtol=0)


def assert_balance_exact(particles=2):
    _, r, f, slopes = shared.pair_rows()
    value, wanted, by_number = shared.balance(r, f, slopes)
    found = expected_over_pairs(TrajectoryBalance, particles)
    np.testing.assert_allclose(found["loss"], value, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["a"], wanted, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["log_normalizer"], by_number, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found["m"], 0.0, atol=0)


@pytest.mark.parametrize("particles", [1, 2])
def test_trajectory_balance_exact(particles):
    assert_balance_exact(particles)


def assert_elements_exact():
    """Each element has a variance of its own, whose mean over minibatches is that of all data."""
    r, _, _ = shared.element_rows()
    value, wanted = shared.half_variance_of_elements()
    loss, found = 0.0, 0.0
    outcomes = np.array(list(np.ndindex(2, 2)))
    picked = np.array(list(np.ndindex(4, 4)))
    for subset in shared.SUBSETS:

        def plate():
            return numpyro.plate("data", 3, subsample_size=2)

        def given(program, subset=subset):
            return handlers.substitute(program, data={"data": jnp.array(subset)})

        which = _which_particle(2)
        model, guide = map(given, shared.elements(HOST, plate))
        chances = r[outcomes, np.array(subset)].prod(1)
        weights = chances[picked].prod(1) / len(shared.SUBSETS)

        def one(z, model=model, guide=guide, which=which, plate=plate, given=given):
            def proposal():
                mine = z[which()]
                with plate():
                    numpyro.sample("z", dist.Delta(mine))

            elbo = TraceGrad_ELBO(2, objective=LogVariance(given(proposal)))
            return jax.value_and_grad(lambda b: elbo.loss(jax.random.key(KEY), {"b": b}, model, guide))(array(shared.B))

        losses, gradients = jax.jit(jax.vmap(one))(array(outcomes[picked]))
        loss, found = loss + weights @ losses, found + weights @ gradients
    np.testing.assert_allclose(loss, value, atol=1e-9, rtol=0)
    np.testing.assert_allclose(found, wanted, atol=1e-9, rtol=0)


def test_elements_of_minibatches_exact():
    assert_elements_exact()


@pytest.mark.parametrize("name", ["variance_with_the_denominator_of_all", "model_that_follows"])
def test_mutant_is_caught(name, monkeypatch):
    shared.MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        assert_log_variance_exact()


def test_guide_draws_in_place_of_the_proposals_are_caught(monkeypatch):
    class Empty(dict):
        pass

    plain = particle_trace.proposed_draws
    monkeypatch.setattr(
        particle_trace, "substitute", lambda fn, data: fn if isinstance(data, Empty) else handlers.substitute(fn, data)
    )
    monkeypatch.setattr(particle_trace, "proposed_draws", lambda *args: Empty(plain(*args)))
    with pytest.raises(AssertionError):
        assert_log_variance_exact()


def one_site():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(array([0.3, 0.6, 0.8])).to_event(1))
        numpyro.sample("x", dist.Normal(z @ array([1.0, -2.0, 0.5]), 1.0), obs=1.4)

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", array(shared.A))).to_event(1))

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [False, True])
def test_on_the_guides_draws_is_leave_one_out(vectorized):
    """VarGrad is the gradient of the evidence lower bound with leave-one-out, also under a proposal that is the guide."""
    model, guide = one_site()
    rows = []
    for objective in ({}, {"objective": LogVariance()}, {"objective": LogVariance(guide)}):
        estimators = {} if objective else {"z": ScoreFunction(LeaveOneOut())}
        elbo = TraceGrad_ELBO(5, vectorize_particles=vectorized, estimators=estimators, **objective)
        slope = jax.grad(lambda a, elbo=elbo: elbo.loss(jax.random.key(3), {"a": a}, model, guide))
        rows.append(jax.jit(slope)(array(shared.A)))
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-12)
    np.testing.assert_allclose(rows[2], rows[0], atol=1e-12)
    assert np.abs(rows[0]).max() > 0.01


NORMALS = [0.3, -0.2, 0.4]


def normals():
    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        y = numpyro.sample("y", dist.Normal(z, 0.8))
        numpyro.sample("x", dist.Normal(y * z, 0.7), obs=0.4)

    def guide():
        p = numpyro.param("p", array(NORMALS))
        numpyro.param("log_normalizer", 0.5)
        z = numpyro.sample("z", dist.Normal(p[0], jnp.exp(p[1])))
        numpyro.sample("y", dist.Normal(p[2] * z, jnp.exp(p[1])))

    def proposal():
        # Reads the guide's parameter, which gets no gradient through it, and has a site of its own.
        p = numpyro.param("p", array([0.0, 0.0, 0.0]))
        wide = numpyro.sample("wide", dist.Bernoulli(0.5))
        z = numpyro.sample("z", dist.Normal(p[0], (1 + wide) * jnp.exp(p[1])))
        numpyro.sample("y", dist.Normal(p[2] * z, 2 * jnp.exp(p[1])))

    return model, guide, proposal


def assert_draws_are_constant(objective_of, proposed):
    """The gradient is that of densities written out at the draws of the step."""
    model, guide, proposal = normals()
    key, params = jax.random.key(5), {"p": array(NORMALS), "log_normalizer": array(0.5)}

    def draws(key):
        seeded = handlers.substitute(
            handlers.seed(proposal if proposed else guide, jax.random.split(key)[1]), data=params
        )
        found = handlers.trace(seeded).get_trace()
        return found["z"]["value"], found["y"]["value"]

    z, y = jax.vmap(draws)(jax.random.split(key, 4))

    def by_hand(params):
        p = params["p"]
        log_q = dist.Normal(p[0], jnp.exp(p[1])).log_prob(z) + dist.Normal(p[2] * z, jnp.exp(p[1])).log_prob(y)
        f = log_q - dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(z, 0.8).log_prob(y)
        f = f - dist.Normal(y * z, 0.7).log_prob(0.4)
        return 0.5 * f.var(ddof=1) if objective_of is LogVariance else ((params["log_normalizer"] + f) ** 2).mean()

    elbo = TraceGrad_ELBO(4, objective=objective_of(proposal if proposed else None))
    found = jax.jit(jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide)))(params)
    wanted = jax.jit(jax.value_and_grad(by_hand))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), found, wanted)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("proposed", [False, True])
@pytest.mark.parametrize("objective_of", [LogVariance, TrajectoryBalance])
def test_draws_are_constant(objective_of, proposed):
    assert_draws_are_constant(objective_of, proposed)


@pytest.mark.slow
def test_draws_that_move_are_caught(monkeypatch):
    shared.draws_that_move(monkeypatch)
    with pytest.raises(AssertionError):
        assert_draws_are_constant(LogVariance, False)


def test_svi_learns_the_normalizer():
    """SVI keeps log Z, which approaches the log evidence; the guide may be wrapped."""
    model, guide = shared.pair(HOST)
    z, w = np.array(list(np.ndindex(2, 2))).T
    log_p = (
        shared.bernoulli(0.3, z) + shared.bernoulli(0.2 + 0.5 * z, w) + shared.normal(shared.X[0], shared.M * z + 2 * w)
    )
    proposal = shared.pair_proposal(HOST)
    svi = SVI(model, config_estimators(guide), Adam(0.03), TraceGrad_ELBO(8, objective=TrajectoryBalance(proposal)))
    found = svi.run(jax.random.key(0), 1000, progress_bar=False)
    assert abs(found.params["log_normalizer"] - np.log(np.exp(log_p).sum())) < 0.02
    assert found.losses[-1] < 1e-3 < found.losses[0]
    np.testing.assert_allclose(found.params["m"], shared.M)


def chain():
    """Return model, guide and proposal of a chain of three binary sites in a scan."""

    def program(kind):
        def run():
            b = numpyro.param("b", array(0.4)) if kind != "model" else 0.3

            def step(z, _):
                z = numpyro.sample("z", dist.Bernoulli(logits=2.0 * z - 1.5 if kind == "proposal" else b * z - 0.1))
                if kind == "model":
                    numpyro.sample("x", dist.Normal(z, 1.0), obs=array(0.7))
                return z.astype(float), z

            return scan(step, array(1.0), None, length=3)

        return run

    return program("model"), program("guide"), program("proposal")


@pytest.mark.slow
def test_steps_of_a_scan():
    """The values of a proposal go into the steps of the guide's scan."""
    model, guide, proposal = chain()
    key = jax.random.key(2)
    b = array(0.4)

    def draws(key):
        seeded = handlers.seed(proposal, jax.random.split(key)[1])
        return handlers.trace(handlers.substitute(seeded, data={"b": b})).get_trace()["z"]["value"]

    z = jax.vmap(draws)(jax.random.split(key, 5))

    def by_hand(b):
        before = jnp.concatenate([jnp.ones((5, 1)), z[:, :-1]], 1)
        f = dist.Bernoulli(logits=b * before - 0.1).log_prob(z) - dist.Bernoulli(logits=0.3 * before - 0.1).log_prob(z)
        return 0.5 * (f - dist.Normal(z, 1.0).log_prob(0.7)).sum(1).var(ddof=1)

    elbo = TraceGrad_ELBO(5, objective=LogVariance(proposal))
    found = jax.jit(jax.value_and_grad(lambda b: elbo.loss(key, {"b": b}, model, guide)))(b)
    np.testing.assert_allclose(found, jax.jit(jax.value_and_grad(by_hand))(b), atol=1e-9)


def refused(objective, error, words, model=None, guide=None, params=None, **given):
    first, second, _ = normals()
    params = {"p": array(NORMALS)} if params is None else params
    with pytest.raises(error, match=words):
        elbo = TraceGrad_ELBO(**({"num_particles": 2} | given), objective=objective)
        elbo.loss(jax.random.key(0), params, model or first, guide or second)


def test_what_is_refused():
    def without():
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    def larger():
        numpyro.sample("z", dist.Normal(array([0.0, 1.0]), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(0.0, 1.0))

    def alone():
        numpyro.sample("u", dist.Normal(0.0, 1.0))
        normals()[0]()

    refused(LogVariance(without), ProgramError, "Site 'y' of the guide is not drawn by the objective's proposal.*'z'")
    refused(LogVariance(larger), ProgramError, r"Site 'z' has shape \(2,\) in the objective's proposal and shape \(\)")
    refused(LogVariance(), ConfigurationError, "one particle has none", num_particles=1)
    refused(LogVariance(), ConfigurationError, "drop higher_order=True", higher_order=True)
    refused(
        LogVariance(), EstimatorError, "Site 'z' names DisARM.*no site has an estimator", estimators={"z": DisARM()}
    )
    with pytest.warns(UserWarning, match="in model but not guide"):  # NumPyro's own.
        refused(LogVariance(), ProgramError, "Site 'u' is drawn by the model alone", model=alone)
    refused(TrajectoryBalance(), ConfigurationError, r"numpyro.param\('log_normalizer', 0.0\)")
    refused(
        TrajectoryBalance(),
        ConfigurationError,
        r"has shape \(2,\)",
        params={"p": array(NORMALS), "log_normalizer": array([0.0, 1.0])},
    )


@pytest.mark.slow
def test_minibatches_that_would_be_squared_are_refused():
    def model():
        with numpyro.plate("data", 3, subsample_size=2) as index:
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=array(shared.X)[index])

    def guide():
        numpyro.param("log_normalizer", 0.0)
        with numpyro.plate("data", 3, subsample_size=2):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", array([0.2, 0.1]))))

    params = {"a": array([0.2, 0.1]), "log_normalizer": array(0.0)}
    for objective in (TrajectoryBalance(), LogVariance(plates=())):
        refused(objective, ProgramError, "in the subsampled plate 'data'", model, guide, params)
    assert TraceGrad_ELBO(2, objective=LogVariance()).loss(jax.random.key(0), params, model, guide) >= 0


def test_checks_are_refused_and_descriptions_say_why():
    model, guide, _ = normals()
    for given in (
        {"elbo": TraceGrad_ELBO(2, objective=LogVariance())},
        {"objective": LogVariance(), "num_particles": 2},
    ):
        with pytest.raises(ConfigurationError, match="nothing can be checked"):
            check_gradients(model, guide, **given)
    rows = (
        TraceGrad_ELBO(2, objective=LogVariance()).describe(jax.random.key(0), {"p": array(NORMALS)}, model, guide).rows
    )
    assert {row["reason"] for row in rows} == {"no estimator: draws are constants under LogVariance"}


@pytest.mark.slow
@pytest.mark.parametrize("objective_of", [LogVariance, TrajectoryBalance])
def test_two_modes(objective_of):
    """At uniform draws the guide finds both modes, where the evidence lower bound stays in one."""
    model, guide, uniform = shared.two_modes(HOST)
    masses = []
    for objective in ({}, {"objective": objective_of(uniform)}):
        svi = SVI(model, guide, numpyro.optim.Adam(0.1), TraceGrad_ELBO(16, **objective))
        found = svi.run(jax.random.key(0), 400, progress_bar=False).params
        masses.append(shared.mass_of_the_other_mode(found["a"], found["b"]))
    assert masses[0] < 0.02 and abs(masses[1] - shared.MASS) < 0.05
    if objective_of is TrajectoryBalance:
        assert abs(found["log_normalizer"] - shared.EVIDENCE) < 0.2
