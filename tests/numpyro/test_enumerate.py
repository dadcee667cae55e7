"""`Enumerate()` in NumPyro: exact sums over all values of guide sites, against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from pplgrad import (
    IWAE,
    Enumerate,
    EstimatorError,
    ImpossibleValueError,
    LocalExpectation,
    Renyi,
    Reparam,
    ScoreFunction,
)
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.testing.in_numpyro import (
    HOST,
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    log_weight_and_objective,
    outcomes,
    parameters,
    stacked,
)
from pplgrad.testing.programs import ALL
from tests.covering import mostly
from tests.enumerating import ALONE, BETWEEN, MUTANTS, chosen, loss_after_one, marked

KEYS = jax.random.split(jax.random.key(3), 3)
WAYS = {
    "one": {},
    "several": {"num_particles": 2},
    "looped": {"num_particles": 2, "vectorize_particles": False},
    "chunks": {"max_parallel": 4},
    "unfused": {"fuse": False},
}


def draws(case, elbo):
    """Return the values and the gradients of steps with draws of their own."""
    model, guide = case.build(HOST)
    step = jax.value_and_grad(lambda p, key: elbo.loss(key, p, model, guide))
    return jax.jit(jax.vmap(step, (None, 0)))(parameters(case), KEYS)


def exact_loss(case):
    """Return the loss, summed over all outcomes."""
    log_q, objective = jax.vmap(lambda o: log_weight_and_objective(case, parameters(case), o))(
        stacked(list(outcomes(case)))
    )
    return -float((jnp.exp(log_q) * objective).sum())


def every(gradients):
    """Yield the gradient of each step."""
    for i in range(len(KEYS)):
        yield {name: np.asarray(x[i]) for name, x in gradients.items()}


LONG = ("chain_in_the_model", "one_hot", "hierarchy")
"""What compiles for long; Pyro's test has them."""

PAIRS = [
    *(
        pytest.param("one", name, marks=[*marked(name).marks, *([pytest.mark.exhaustive] if name in LONG else [])])
        for name in ALONE
        if not ALL[name].subsamples
    ),
    *((way, "three_coupled") for way in WAYS if way not in ("one", "unfused")),
    pytest.param("unfused", "three_coupled", marks=pytest.mark.exhaustive),
    ("several", "through_a_sum"),
]


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_one_step_is_exact(way, name):
    case = ALL[name]
    values, gradients = draws(case, TraceGrad_ELBO(estimators={"*": Enumerate()}, **WAYS[way]))
    if way == "one":
        np.testing.assert_allclose(values, exact_loss(case), atol=1e-9)
    for found in every(gradients):
        assert_same(found, exact_gradient(case))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one", "several"])
def test_values_that_another_site_makes_impossible(way):
    case = ALL["possible_after_one"]
    loss, wanted = jax.value_and_grad(lambda p: loss_after_one(HOST, p))(parameters(case))
    values, gradients = draws(case, TraceGrad_ELBO(estimators={"*": Enumerate()}, **WAYS[way]))
    np.testing.assert_allclose(values, loss, atol=1e-9)
    for found in every(gradients):
        assert_same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALONE if ALL[name].subsamples])
def test_minibatches_are_all_that_is_drawn(name):
    elbo = TraceGrad_ELBO(estimators={"*": Enumerate()})
    assert_same(expected_gradient(ALL[name], elbo, 1), exact_gradient(ALL[name]))


def over(name, elbo):
    """Return the expected gradient of the program that shows a mutant, or of `beside_others` with other estimators."""
    if name in BETWEEN:
        return expected_gradient_over_cells(ALL["beside_others"], elbo)
    if ALL[name].subsamples:
        return expected_gradient(ALL[name], elbo, 1)
    return next(every(draws(ALL[name], elbo)[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(["disarm", "one"], BETWEEN))
def test_between_other_estimators(name):
    assert_same(over(name, TraceGrad_ELBO(estimators=chosen(name))), exact_gradient(ALL["beside_others"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(sorted(MUTANTS)[:2], MUTANTS))
def test_mutants_are_caught(name, monkeypatch):
    shown_by = MUTANTS[name].shown_by
    wanted = exact_gradient(ALL["beside_others" if shown_by in BETWEEN else shown_by])
    MUTANTS[name].apply(monkeypatch)
    found = over(shown_by, TraceGrad_ELBO(estimators=chosen(shown_by)))
    assert not max(float(np.abs(found[key] - value).max()) for key, value in wanted.items()) < 1e-6


@pytest.mark.slow
@pytest.mark.exhaustive
def test_second_derivatives():
    case = ALL["chain_in_the_model"]
    model, guide = case.build(HOST)
    params = parameters(case)

    def loss(p, key, higher_order):
        elbo = TraceGrad_ELBO(estimators={"*": Enumerate()}, higher_order=higher_order)
        return elbo.loss(jax.random.key(key), p, model, guide)

    first = jax.hessian(loss)(params, 0, True)
    for other in (jax.hessian(loss)(params, 1, True), jax.hessian(loss)(params, 2, False)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), first, other)


def coin(**infer):
    return lambda: numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.4)), infer=infer)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("how", ["parallel", "sequential"])
@pytest.mark.parametrize("wrap", [lambda guide: guide, config_estimators], ids=["plain", "wrapped"])
def test_the_hosts_mark_asks_for_it(wrap, how):
    rows = TraceGrad_ELBO().describe(jax.random.key(0), {"a": 0.4}, coin(), wrap(coin(enumerate=how))).rows
    assert [(row["estimator"], row["evaluations"]) for row in rows] == [("Enumerate()", 1)]
    named = coin(enumerate=how, estimator=LocalExpectation())
    rows = TraceGrad_ELBO().describe(jax.random.key(0), {"a": 0.4}, coin(), named).rows
    assert rows[0]["estimator"] == "LocalExpectation()"


def test_config_enumerate_asks_for_it():
    funsor = pytest.importorskip("numpyro.contrib.funsor")
    rows = TraceGrad_ELBO().describe(jax.random.key(0), {"a": 0.4}, coin(), funsor.config_enumerate(coin())).rows
    assert rows[0]["estimator"] == "Enumerate()"


def test_a_mark_in_the_model_changes_nothing_for_a_site_that_the_guide_draws():
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()})
    rows = elbo.describe(jax.random.key(0), {"a": 0.4}, coin(enumerate="parallel"), coin()).rows
    assert [row["estimator"] for row in rows] == ["ScoreFunction()"]


@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.5)], ids=str)
def test_a_bound_of_several_particles_has_no_joint_sum(objective):
    elbo = TraceGrad_ELBO(2, objective=objective)
    with pytest.raises(EstimatorError, match=r"Enumerate.*'z'.*combines.*use LocalExpectation\(\)"):
        elbo.loss(jax.random.key(0), {"a": 0.4}, coin(), coin(estimator=Enumerate()))
    rows = elbo.describe(jax.random.key(0), {"a": 0.4}, coin(), coin(enumerate="parallel")).rows
    assert rows[0]["estimator"] == "LocalExpectation()"


def test_a_sum_that_is_too_large_is_refused_with_its_size():
    def run():
        with numpyro.plate("data", 20):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(z.sum(), 1.0), obs=0.0)

    def guide():
        with numpyro.plate("data", 20):
            numpyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    with pytest.raises(
        EstimatorError, match=r"1,048,576 joint values at site 'z' .*LocalExpectation\(\) or ScoreFunction\(\)"
    ):
        TraceGrad_ELBO().loss(jax.random.key(0), {}, run, guide)


def test_a_site_inside_scan_is_refused_by_name():
    def run():
        scan(lambda carry, x: (carry, numpyro.sample("z", dist.Bernoulli(0.5))), 0.0, jnp.arange(3))

    with pytest.raises(EstimatorError, match="Enumerate.*'z', which is drawn inside scan"):
        TraceGrad_ELBO(estimators={"z": Enumerate()}).loss(jax.random.key(0), {}, run, run)


@pytest.mark.exhaustive
def test_a_site_in_front_of_a_scan_is_summed_over():
    """The steps of the scan read the site, and so does what is observed in them."""
    data = jnp.array([0.3, -0.4, 0.9])

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))

        def step(carry, y):
            numpyro.sample("y", dist.Normal(carry * (z - 0.2), 1.0), obs=y)
            return carry + 0.5 * z, None

        scan(step, jnp.array(1.0), data)

    def exact(a):
        total = 0.0
        for z in (0, 1):
            log_q = dist.Bernoulli(logits=a).log_prob(z)
            means = (1.0 + 0.5 * z * jnp.arange(3)) * (z - 0.2)
            log_p = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(means, 1.0).log_prob(data).sum()
            total -= jnp.exp(log_q) * (log_p - log_q)
        return total

    elbo = TraceGrad_ELBO(estimators={"z": Enumerate()})
    loss, slope = jax.value_and_grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, model, coin()))(0.4)
    np.testing.assert_allclose((loss, slope), jax.value_and_grad(exact)(0.4), atol=1e-9)


@pytest.mark.exhaustive  # Runs eagerly: half a minute.
def test_python_control_flow_runs_value_by_value():
    """A program that cannot be traced: each density is charged to every draw before it."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        k = numpyro.sample("k", dist.Categorical(logits=jnp.array([0.1, 0.5, -0.4]) * (2.0 if int(z) else 1.0)))
        numpyro.factor("f", jnp.sin(k + 2.0 * z))

    def guide():
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.4)))
        b = numpyro.param("b", jnp.array([[0.1, 0.2, 0.3], [-0.3, 0.4, 0.1]]))
        numpyro.sample("k", dist.Categorical(logits=b[int(z)]))

    def exact(p):
        total = 0.0
        for z in (0, 1):
            for k in range(3):
                log_q = dist.Bernoulli(logits=p["a"]).log_prob(z) + dist.Categorical(logits=p["b"][z]).log_prob(k)
                prior = dist.Categorical(logits=jnp.array([0.1, 0.5, -0.4]) * (1 + z)).log_prob(k)
                f = dist.Bernoulli(0.3).log_prob(z) + prior + jnp.sin(k + 2.0 * z) - log_q
                total -= jnp.exp(log_q) * f
        return total

    params = {"a": jnp.array(0.4), "b": jnp.array([[0.1, 0.2, 0.3], [-0.3, 0.4, 0.1]])}
    elbo = TraceGrad_ELBO(estimators={"*": Enumerate()})
    for key in range(2):
        found = jax.value_and_grad(lambda p, key=key: elbo.loss(jax.random.key(key), p, model, guide))(params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), found, jax.value_and_grad(exact)(params))


@pytest.mark.slow
def test_a_cost_that_is_infinite_at_a_possible_value_names_the_site():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.factor("f", jnp.where(z == 1, -jnp.inf, 0.0))

    elbo = TraceGrad_ELBO(estimators={"z": Enumerate()})
    with pytest.raises(ImpossibleValueError, match="'z'.*probability 0"):
        elbo.loss(jax.random.key(0), {"a": -9.0}, model, coin())
    assert jnp.isnan(jax.jit(lambda a: elbo.loss(jax.random.key(0), {"a": a}, model, coin()))(-9.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "behind", [Reparam(), Reparam(sticking_the_landing=True), ScoreFunction()], ids=["path", "landing", "score"]
)
def test_a_continuous_site_behind_is_drawn_in_each_row(behind):
    """The expectation over it in closed form, against the mean of many steps."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        x = numpyro.sample("x", dist.Normal(z, 1.0))
        numpyro.sample("y", dist.Normal(x * (1.0 + z), 1.0), obs=0.7)

    def guide():
        a = numpyro.param("a", jnp.zeros(3))
        z = numpyro.sample("z", dist.Bernoulli(logits=a[0]))
        numpyro.sample("x", dist.Normal(a[1] + a[2] * z, 0.8))

    def exact(a):
        """E over x of a quadratic: from its mean and variance."""
        total = 0.0
        for z in (0, 1):
            m, v = a[1] + a[2] * z, 0.64
            log_q = dist.Bernoulli(logits=a[0]).log_prob(z)
            prior = dist.Normal(z, 1.0).log_prob(m) - 0.5 * v
            entropy = 0.5 * jnp.log(2 * jnp.pi * jnp.e * v)
            likelihood = dist.Normal(m * (1 + z), 1.0).log_prob(0.7) - 0.5 * v * (1 + z) ** 2
            total += jnp.exp(log_q) * (dist.Bernoulli(0.3).log_prob(z) - log_q + prior + entropy + likelihood)
        return -total

    elbo = TraceGrad_ELBO(estimators={"z": Enumerate(), "x": behind})
    at = jnp.array([0.2, 0.4, -0.3])
    step = jax.grad(lambda a, key: elbo.loss(key, {"a": a}, model, guide))
    rows = np.asarray(jax.jit(jax.vmap(step, (None, 0)))(at, jax.random.split(jax.random.key(1), 40_000)))
    error = rows.std(0) / len(rows) ** 0.5
    assert (abs(rows.mean(0) - jax.grad(exact)(at)) < 4.5 * error).all()
