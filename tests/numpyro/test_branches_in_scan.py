"""Estimators that run branches at sites inside `scan` and `cond`: each step takes other values alone, and the sum over all draws is exact."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI

from pplgrad import (
    ARMS,
    CARMS,
    IWAE,
    REBAR,
    RELAX,
    RODEO,
    CountDifference,
    DisARM,
    DoubleCV,
    Enumerate,
    EstimatorError,
    GumbelSoftmax,
    LeaveOneOut,
    LocalExpectation,
    MeasureValued,
    Mirrored,
    MuProp,
    Reparam,
    ScoreFunction,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
)
from pplgrad.engine import loop_steps
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.numpyro._tracing import control_flow, handlers
from pplgrad.testing import in_numpyro
from pplgrad.testing.in_numpyro import (
    assert_same,
    exact_bound_gradient,
    exact_gradient,
    expected_gradient_over_cells,
    parameters,
    worst,
)
from pplgrad.testing.programs import Case
from tests.bounds import bound
from tests.numpyro.scans import CASES, PARAMS, as_case, param, scoped

ESTIMATORS = {
    "local": LocalExpectation(),
    "disarm": DisARM(),
    "samples": ScoreFunction(samples=2),
    "set": UnorderedSet(2),
    "sum": SumAndSample(2),
    "disarm-all": DisARM(differentiate="all"),
}
REVERSED = ["both-reverse", "guide-reverse"]


def error(name, estimator, particles=1, **settings):
    """Return how far the expectation over all draws, and those of branches, is from the exact gradient."""
    case = as_case(name)
    objective = TraceGrad_ELBO(particles, estimators=dict.fromkeys(case.latents, estimator), **settings)
    return worst(expected_gradient_over_cells(case, objective, particles), exact_gradient(case))


@pytest.fixture
def read_as_stored(monkeypatch):
    """Let a guide's reversed scan take the listed uniforms by their place in what it hands out; NumPyro counts its steps as they run."""
    plain = in_numpyro.inverse_cdf
    monkeypatch.setattr(in_numpyro, "inverse_cdf", lambda fn, uniform, *size: plain(fn, uniform[::-1], *size))


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("short", ESTIMATORS)
@pytest.mark.parametrize("name", [name for name in CASES if name not in REVERSED])
def test_exact(name, short):
    """Plates in a step, two sites of a step, sites before and after the scan."""
    assert error(name, ESTIMATORS[short]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", REVERSED)
def test_exact_where_the_guide_runs_in_reverse(name, read_as_stored):
    assert error(name, LocalExpectation()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("short", ["local", "disarm-all"])
def test_exact_one_after_the_other(short):
    """One branch at a time, with a number of branches that the chunks do not divide."""
    assert error("forward", ESTIMATORS[short], max_parallel=2) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [True, False])
def test_exact_with_two_particles(vectorize):
    assert error("two-steps", DisARM(), 2, vectorize_particles=vectorize) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [LocalExpectation(), ScoreFunction(samples=2)], ids=["local", "samples"])
def test_exact_under_a_bound(estimator):
    """The bound of two particles, of which one changes one step."""
    case = as_case("two-steps")
    objective = TraceGrad_ELBO(2, estimators={"z": estimator}, objective=IWAE())
    found = expected_gradient_over_cells(case, objective, 2)
    assert_same(found, exact_bound_gradient(case, bound(1.0), 2, 0))


def one_at_wrong_step(monkeypatch):
    plain = control_flow.FlowMessenger.running_step
    monkeypatch.setattr(control_flow.FlowMessenger, "running_step", property(lambda self: plain.fget(self) + 1))


def forgetting(msg):
    """Hand out what a scan's body drew, and forget what was changed afterwards."""
    state, (sites, (result, _)) = msg["value"]
    msg["value"] = state, (sites, result)


def handed_out_as_drawn(monkeypatch):
    monkeypatch.setattr(handlers.SiteMessenger, "changes_draws", False)


def another_steps_costs(monkeypatch):
    plain = loop_steps.LoopSteps.in_branches
    monkeypatch.setattr(
        loop_steps.LoopSteps, "in_branches", lambda self, signal: plain(self, jnp.roll(signal, 1, axis=2))
    )


def earlier_steps_alternatives(monkeypatch):
    plain = loop_steps.LoopSteps.branches
    monkeypatch.setattr(
        loop_steps.LoopSteps,
        "branches",
        lambda self, values: plain(self, replace(values, at=lambda n: jnp.roll(values.at(n), 1, axis=0))),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", [one_at_wrong_step, handed_out_as_drawn, another_steps_costs, earlier_steps_alternatives]
)
def test_mutant_is_caught(broken, monkeypatch):
    broken(monkeypatch)
    assert error("two-steps", DisARM()) > 1e-3


def moments(estimators, model, guide, params, particles=1, draws=40_000):
    """Return the mean gradient and its standard error."""
    objective = TraceGrad_ELBO(particles, estimators=estimators)

    def one(key):
        return jax.grad(lambda p: objective.loss(key, p, model, guide))(params)

    rows = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=2000))(jax.random.split(jax.random.key(1), draws))
    every = np.concatenate([np.asarray(x).reshape(draws, -1) for x in jax.tree.leaves(rows)], -1)
    return every.mean(0), every.std(0) / np.sqrt(draws)


def assert_unbiased(case, estimator, exact):
    found, error = moments({"*": estimator}, *case.build(None), parameters(case))
    wanted = np.concatenate([exact[name] for name in sorted(exact)])
    assert np.all(np.abs(found - wanted) < 4.5 * error + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [ARMS(3), CARMS(3)])
def test_unbiased_with_uniform_noise(estimator):
    case = as_case("forward")
    assert_unbiased(case, estimator, exact_gradient(case))


@pytest.mark.slow
def test_a_scan_in_a_scope():
    """Its body sees another name than the program outside."""
    model, guide, latents = scoped("")
    exact = exact_gradient(Case("no scope", PARAMS, latents, lambda _: (model, guide)))
    model, guide, latents = scoped("s/")
    assert_unbiased(Case("scope", PARAMS, latents, lambda _: (model, guide)), LocalExpectation(), exact)


def walk(law):
    """Return a random walk whose steps are drawn in a scan, and its guide."""

    def model():
        def step(x, y):
            x = numpyro.sample("x", law(0.5 * x, 1.0))
            numpyro.sample("y", dist.Normal(jnp.sin(x), 1.0), obs=y)
            return 1.0 * x, None

        scan(step, 0.3, jnp.array([0.4, -0.2, 0.9]))

    def guide():
        m, s = numpyro.param("m", jnp.array([0.1, -0.3, 0.2])), numpyro.param("s", jnp.array(0.2))
        scan(lambda x, m: (1.0 * numpyro.sample("x", law(m + 0.4 * x, jnp.exp(s))), None), 0.3, m)

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "estimator"),
    [
        ("normal", MeasureValued()),
        ("normal", Mirrored()),
        ("normal", ScoreFunction(samples=3)),
        pytest.param("poisson", MeasureValued(), marks=pytest.mark.exhaustive),
        ("poisson", CountDifference()),
        pytest.param("poisson", LocalExpectation(head=4), marks=pytest.mark.exhaustive),
    ],
    ids=["measure", "mirrored", "samples", "poisson", "difference", "head"],
)
def test_numbers_unbiased(law, estimator):
    """Against reparameterized gradients, or the score function with a leave-one-out baseline."""
    laws = {"normal": dist.Normal, "poisson": lambda loc, scale: dist.Poisson(scale * jnp.exp(0.3 * jnp.tanh(loc)))}
    known = Reparam() if law == "normal" else ScoreFunction(LeaveOneOut())
    params = {"m": jnp.array([0.1, -0.3, 0.2]), "s": jnp.array(0.2)}
    wanted, its_error = moments({"x": known}, *walk(laws[law]), params, 8)
    found, error = moments({"x": estimator}, *walk(laws[law]), params, draws=10_000 if law == "poisson" else 40_000)
    assert np.all(np.abs(found - wanted) < 4.5 * np.sqrt(error**2 + its_error**2))


@pytest.mark.slow
def test_each_step_is_counted():
    case = as_case("forward")
    model, guide = case.build(None)
    objective = TraceGrad_ELBO(estimators={"z": LocalExpectation()})
    rows = objective.describe(jax.random.key(0), parameters(case), model, guide)
    assert [row["evaluations"] for row in rows.rows] == [3]


def fractions(in_a_scan):
    """Return a program with two sites of each step, whose carry has fractions; or the same as a Python loop."""
    data = jnp.array([0.2, -0.4])

    def latents(p, suffix, z):
        z = 1.0 * numpyro.sample(f"z{suffix}", dist.Bernoulli(logits=p[0] + p[1] * z))
        return z, 1.0 * numpyro.sample(f"w{suffix}", dist.Bernoulli(logits=p[1] * z - 0.3))

    def program(p, x, suffix, z):
        z, w = latents(p, suffix, z)
        if x is not None:
            numpyro.sample(f"x{suffix}", dist.Normal(p[2] * w + z * z, 1.0), obs=x)
        return z

    def run(p, xs):
        if in_a_scan:
            return scan(lambda z, x: (program(p, x, "", z), None), 0.0, xs, length=2)[0]
        z = 0.0
        for t in range(2):
            z = program(p, None if xs is None else xs[t], str(t), z)
        return z

    def model():
        p = param("b")
        numpyro.factor("end", jnp.cos(p[1] * run(p, data)))

    def guide():
        run(jnp.concatenate([param("a"), jnp.zeros(1)]), None)

    names = ["z", "w"] if in_a_scan else ["z0", "z1", "w0", "w1"]
    return Case(
        f"fractions {in_a_scan}", PARAMS, {n: ((2,) if in_a_scan else (), 2) for n in names}, lambda _: (model, guide)
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [MuProp(), DoubleCV(2, scale=1.0, learn=False), RODEO(2, learn=False)])
def test_derivatives_at_relaxed_values_exact(estimator):
    case = fractions(True)
    found = expected_gradient_over_cells(case, TraceGrad_ELBO(estimators={"*": estimator}))
    assert_same(found, exact_gradient(case))


@pytest.mark.slow
def test_rebar_unbiased():
    case = fractions(True)
    assert_unbiased(case, REBAR(0.5, 0.8, learn=False), exact_gradient(case))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [GumbelSoftmax(0.5), StraightThrough(), REBAR(0.5, 0.8, learn=False)])
def test_relaxed_as_in_a_loop(estimator):
    """Mean and spread of a biased estimate are those of the same program without a scan; so is the spread of REBAR, whose relaxed costs are relaxed from a step on."""
    found, wanted = (
        moments({"*": estimator}, *case.build(None), parameters(case)) for case in (fractions(True), fractions(False))
    )
    assert np.all(np.abs(found[0] - wanted[0]) < 4.5 * np.hypot(found[1], wanted[1]))
    np.testing.assert_allclose(found[1], wanted[1], rtol=0.05)


@pytest.mark.slow
def test_learned_numbers_are_shared_by_the_steps():
    case = fractions(True)
    model, guide = case.build(None)
    wrapped = config_estimators(guide, {"*": RELAX(0.5, hidden=3)})
    result = SVI(model, wrapped, numpyro.optim.Adam(0.02), TraceGrad_ELBO()).run(
        jax.random.key(0), 20, progress_bar=False
    )
    assert np.isfinite(result.losses).all()
    assert result.params["z$pplgrad.log_temperature"].shape == () and result.params["z$pplgrad.in"].shape == (3, 2)


@pytest.mark.slow
def test_a_carry_of_whole_numbers_is_refused():
    model, guide = as_case("two-steps").build(None)
    with pytest.raises(
        EstimatorError, match="relaxed site's value, a number with a fraction, is used as .* integer loop carry"
    ):
        TraceGrad_ELBO(estimators={"z": REBAR(learn=False)}).loss(jax.random.key(0), {}, model, guide)


def test_a_joint_sum_is_refused():
    model, guide = as_case("two-steps").build(None)
    with pytest.raises(EstimatorError, match=r"'z', which is drawn inside scan .* ScoreFunction\(\)"):
        TraceGrad_ELBO(estimators={"z": Enumerate()}).loss(jax.random.key(0), {}, model, guide)


@pytest.mark.parametrize("estimator", [LocalExpectation(), ScoreFunction(samples=2)])
def test_a_scan_in_a_scan_is_refused(estimator):
    def program():
        def inner(z, _):
            return numpyro.sample("z", dist.Bernoulli(logits=z)) * 1.0, None

        scan(lambda z, _: (scan(inner, z, None, length=2)[0], None), 0.0, None, length=2)

    with pytest.raises(
        EstimatorError, match=r"'z', which is drawn inside a scan in the body of another .* ScoreFunction\(\)"
    ):
        TraceGrad_ELBO(estimators={"z": estimator}).loss(jax.random.key(0), {}, program, program)
