"""Model sites that are summed out beside sampled ones: exact against sums written by hand, for every kind of estimator."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp as lse
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate, infer_discrete, markov

from pplgrad import (
    IWAE,
    REBAR,
    DisARM,
    Enumerate,
    GumbelSoftmax,
    LocalExpectation,
    MuProp,
    NeuralBaseline,
    PplgradError,
    Renyi,
    ScoreFunction,
)
from pplgrad.numpyro import TraceGrad_ELBO, _running, check_gradients, config_estimators
from pplgrad.numpyro._compat_jax import sub_jaxprs
from pplgrad.numpyro._tracing import contraction, marginal_sites, specification
from pplgrad.testing.in_numpyro import (
    HOST,
    assert_same,
    exact_bound_gradient,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    parameters,
    worst,
)
from tests.bounds import bound
from tests.numpyro.marginal import PROGRAMS, SUM

KEY = jax.random.key(0)
ESTIMATORS = {
    "default": None,
    "score": ScoreFunction(),
    "leave-one-out": ScoreFunction(samples=2),
    "local": LocalExpectation(),
    "joint": Enumerate(),
    "disarm": DisARM(),
    "muprop": MuProp(),
}


def summed_loss(model):
    """Return the loss of a model without parameters whose guide draws nothing; compiled as one, since each operation alone takes longer."""
    return jax.jit(lambda: TraceGrad_ELBO().loss(KEY, {}, model, lambda: None))()


def summed_slope(model, params):
    """Return the loss of a model whose guide draws nothing, and its gradient."""
    return jax.jit(jax.value_and_grad(lambda given: TraceGrad_ELBO().loss(KEY, given, model, lambda: None)))(params)


def made(program, estimator, particles=1, **given):
    if estimator is not None:
        given["estimators"] = dict.fromkeys(program.case.latents, estimator)
    return TraceGrad_ELBO(particles, **given)


def does_not_fit(name, short):
    branches = short in ("leave-one-out", "local", "joint", "disarm", "muprop")
    return name == "scan with draws" and branches or short in ("disarm", "muprop") and name == "parent in the guide"


@pytest.mark.slow
@pytest.mark.grid(without=does_not_fit)
@pytest.mark.parametrize("short", ESTIMATORS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact(name, short):
    program, estimator = PROGRAMS[name](), ESTIMATORS[short]
    over = expected_gradient_over_cells if getattr(estimator, "uses_branches", False) else expected_gradient
    assert_same(over(program.case, made(program, estimator), 1), exact_gradient(program.by_hand))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["subsampled", "scan with draws", "parent in the guide"])
def test_particles(name):
    program = PROGRAMS[name]()
    assert_same(expected_gradient(program.case, made(program, None, 2), 2), exact_gradient(program.by_hand))


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize(("objective", "power"), [(IWAE(), 1.0), (Renyi(0.4), 0.6)])
@pytest.mark.parametrize("name", ["subsampled", "chain", "scan", "parent in the guide"])
def test_bounds(name, objective, power):
    program = PROGRAMS[name]()
    wanted = exact_bound_gradient(program.by_hand, bound(power), 2, 0)
    shared = bool(program.case.subsamples)
    elbo = made(program, ScoreFunction(), 2, objective=objective)
    assert_same(expected_gradient(program.case, elbo, 2, shared=shared), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("short", [pytest.param("rebar", marks=pytest.mark.exhaustive), "gumbel"])
def test_relaxed_sites_are_followed_into_a_sum(short):
    """The derivative of a sum with respect to a relaxed site that it reads is that of the sum written by hand."""
    program, found = PROGRAMS["mixture"](), []
    for case in (program.case, program.by_hand):
        estimator = {"rebar": REBAR(0.5, learn=False), "gumbel": GumbelSoftmax(0.5)}[short]
        elbo = TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator))
        model, guide = case.build(HOST)
        step = jax.value_and_grad(lambda given, elbo=elbo, own=(model, guide): elbo.loss(KEY, given, *own))
        loss, grads = jax.jit(step)(parameters(case))
        found.append({**jax.tree.map(np.asarray, grads), "loss": np.asarray(loss)})
    assert_same(*found)


@pytest.mark.slow
def test_the_hosts_config_enumerate_asks_for_it():
    def model():
        w = numpyro.sample("w", dist.Bernoulli(logits=0.3))
        k = numpyro.sample("k", dist.Categorical(logits=jnp.array([0.1, 0.4, w])))
        numpyro.sample("x", dist.Normal(k, 1.0), obs=0.5)

    def guide():
        numpyro.sample("w", dist.Bernoulli(logits=0.2))

    elbo = TraceGrad_ELBO()
    described = elbo.describe(KEY, {}, config_enumerate(model), guide)
    assert [row["estimator"] for row in described.rows][1] == "summed out"
    infer = {"enumerate": "parallel"}

    def marked():
        numpyro.sample("k", dist.Bernoulli(0.5), infer=infer)

    elbo.loss(KEY, {}, marked, lambda: None)
    assert infer == {"enumerate": "parallel"}


@pytest.mark.slow
def test_what_the_hosts_tools_left_in_infer_is_not_read():
    """NumPyro's `infer_discrete` writes names of dimensions into the user's dict, which sites share: its own checks would look them up."""
    infer = dict(SUM)

    def model():
        with numpyro.plate("data", 2):
            y = numpyro.sample(
                "y", dist.Bernoulli(0.3), obs=jnp.ones(2), obs_mask=jnp.array([True, False]), infer=infer
            )
            numpyro.sample("x", dist.Normal(y, 1.0), obs=jnp.zeros(2))

    def other():
        numpyro.sample("k", dist.Bernoulli(0.3), infer=infer)

    wanted = TraceGrad_ELBO().loss(KEY, {}, model, lambda: None)
    handlers.seed(infer_discrete(other, rng_key=KEY), KEY)()
    assert "name_to_dim" in infer
    np.testing.assert_allclose(TraceGrad_ELBO().loss(KEY, {}, model, lambda: None), wanted, rtol=1e-12)


@pytest.mark.slow
def test_describe_names_what_is_summed_out():
    program = PROGRAMS["tree"]()
    found = TraceGrad_ELBO().describe(KEY, parameters(program.case), program.summed, program.guide)
    rows = {row["site"]: row for row in found.rows}
    assert rows["c"] == {
        "site": "c",
        "distribution": "Bernoulli",
        "plates": "columns, rows",
        "estimator": "summed out",
        "baseline": "none",
        "evaluations": 0,
        "reason": "infer={'enumerate': 'parallel'}",
    }
    assert list(rows) == ["w", "z", "k", "r", "c"]


@pytest.mark.slow
def test_each_site_of_a_scan_has_one_row():
    program = PROGRAMS["scan"]()
    found = TraceGrad_ELBO().describe(KEY, parameters(program.case), program.summed, program.guide)
    assert [row["site"] for row in found.rows] == ["w", "first", "k"]


@pytest.mark.slow
def test_check_gradients_enumerates_the_sampled_sites():
    program = PROGRAMS["subsampled"]()
    found = check_gradients(program.summed, program.guide, params=parameters(program.case), draws=100, warm_up=0)
    assert found.status != "biased" and "enumerated" in str(found)


def test_a_neural_baseline_in_svi():
    def model():
        w = numpyro.sample("w", dist.Bernoulli(0.4))
        means = numpyro.param("means", jnp.array([-1.0, 1.0]))
        with numpyro.plate("data", 3):
            k = numpyro.sample("k", dist.Bernoulli(logits=w), infer=dict(SUM))
            numpyro.sample("x", dist.Normal(means[k], 1.0), obs=jnp.array([0.3, -1.1, 2.0]))

    def guide():
        numpyro.sample("w", dist.Bernoulli(logits=numpyro.param("a", 0.3)))

    guide = config_estimators(guide, {"w": ScoreFunction(NeuralBaseline())})
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.01), TraceGrad_ELBO())
    assert np.isfinite(svi.run(KEY, 5, progress_bar=False).losses).all()


@pytest.mark.slow
def test_a_scan_of_one_step_and_of_two():
    for steps in (1, 2):

        def model(steps=steps):
            def body(k, x):
                k = numpyro.sample("k", dist.Bernoulli(logits=0.4 * k + 0.1), infer=dict(SUM))
                numpyro.sample("x", dist.Normal(k, 1.0), obs=x)
                return k, None

            scan(body, 0, jnp.arange(1.0, 1.0 + steps))

        total = jnp.zeros(2).at[1].set(-jnp.inf)
        for x in jnp.arange(1.0, 1.0 + steps):
            before, now = jnp.meshgrid(jnp.arange(2), jnp.arange(2), indexing="ij")
            move = dist.Bernoulli(logits=0.4 * before + 0.1).log_prob(now)
            total = lse(total[:, None] + move, 0) + dist.Normal(jnp.arange(2), 1.0).log_prob(x)
        np.testing.assert_allclose(summed_loss(model), -lse(total), atol=1e-9)


@pytest.mark.slow
def test_a_step_before_that_an_observed_site_alone_reads():
    x = jnp.array([0.1, 1.4, -0.3, 0.8])

    def model():
        def body(before, x):
            k = numpyro.sample("k", dist.Bernoulli(0.4), infer=dict(SUM))
            numpyro.sample("x", dist.Normal(k + 2.0 * before, 1.0), obs=x)
            return k, None

        scan(body, 0, x)

    total = jnp.array([0.0, -jnp.inf])
    before, now = jnp.meshgrid(jnp.arange(2), jnp.arange(2), indexing="ij")
    for value in x:
        own = dist.Bernoulli(0.4).log_prob(now) + dist.Normal(now + 2.0 * before, 1.0).log_prob(value)
        total = lse(total[:, None] + own, 0)
    np.testing.assert_allclose(summed_loss(model), -lse(total), atol=1e-9)


def test_a_scan_that_reads_nothing_summed_keeps_its_steps():
    """Only the scans that a sum reaches are enumerated; a site in another one keeps its own costs."""

    def model():
        k = numpyro.sample("k", dist.Bernoulli(0.4), infer=dict(SUM))
        numpyro.sample("y", dist.Normal(k, 1.0), obs=0.3)

        def body(carry, x):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return carry, None

        scan(body, 0, jnp.arange(3.0))

    def guide():
        def body(carry, _):
            numpyro.sample("z", dist.Bernoulli(0.6))
            return carry, None

        scan(body, 0, None, length=3)

    elbo = TraceGrad_ELBO()
    program = elbo._with_one_minibatch(KEY, marginal_program(model, guide))
    ((_, static, _),), _ = elbo._runs(KEY, {}, program)
    assert static.model == ["z", "x", "k (summed out)"]
    assert [plate.time for plate in static.plates["model", "x"]] == [True]


def marginal_program(model, guide):
    from pplgrad.core.program import Program

    return Program(model, guide, (), {})


def test_the_program_does_not_grow_with_the_steps_of_a_scan():
    def size(steps):
        def model():
            def body(k, x):
                k = numpyro.sample("k", dist.Categorical(logits=jnp.eye(3)[k]), infer=dict(SUM))
                numpyro.sample("x", dist.Normal(k, 1.0), obs=x)
                return k, None

            scan(body, 0, jnp.zeros(steps))

        closed = jax.make_jaxpr(lambda: TraceGrad_ELBO().loss(KEY, {}, model, lambda: None))()
        return count(closed.jaxpr)

    def count(jaxpr):
        return sum(1 + sum(map(count, sub_jaxprs(equation))) for equation in jaxpr.eqns)

    assert size(200) == size(20)


@pytest.mark.parametrize("law", ["one-hot", "from 3", "binomial"])
def test_values_other_than_0_1_2(law):
    def model():
        if law == "one-hot":
            k = numpyro.sample("k", HOST.one_hot(jnp.log(jnp.array([0.2, 0.5, 0.3]))), infer=dict(SUM))
            mean = k @ jnp.array([3.0, 4.0, 5.0])
        elif law == "from 3":
            mean = numpyro.sample("k", dist.DiscreteUniform(3, 5), infer=dict(SUM))
        else:
            mean = 3 + numpyro.sample("k", dist.Binomial(2, 0.4), infer=dict(SUM))
        numpyro.sample("x", dist.Normal(mean, 1.0), obs=4.4)

    probs = {"one-hot": [0.2, 0.5, 0.3], "from 3": [1 / 3] * 3, "binomial": [0.36, 0.48, 0.16]}[law]
    wanted = -lse(jnp.log(jnp.array(probs)) + dist.Normal(jnp.array([3.0, 4.0, 5.0]), 1.0).log_prob(4.4))
    np.testing.assert_allclose(TraceGrad_ELBO().loss(KEY, {}, model, lambda: None), wanted, atol=1e-9)


def test_an_impossible_value_is_summed_with_weight_zero():
    def model():
        logits = numpyro.param("l", jnp.array([0.1, 0.3])) + jnp.array([0.0, -jnp.inf])
        k = numpyro.sample("k", dist.Categorical(logits=logits), infer=dict(SUM))
        numpyro.sample("x", dist.Normal(k, 1.0), obs=0.3)

    loss, grads = jax.value_and_grad(TraceGrad_ELBO().loss, 1)(KEY, {"l": jnp.array([0.1, 0.3])}, model, lambda: None)
    np.testing.assert_allclose(loss, -dist.Normal(0.0, 1.0).log_prob(0.3), atol=1e-9)
    np.testing.assert_allclose(grads["l"], 0.0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["scan", "markov"])
def test_states_that_cannot_be_reached_or_seen_leave_the_gradient_a_number(steps):
    """Left to right, with values that one state cannot show: some messages of the recursion are impossible as a whole."""
    move = jnp.array([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    shown, seen = jnp.array([[1.0, 0.0], [0.7, 0.3], [0.2, 0.8]]), jnp.array([0, 1, 0, 1])

    def step(before, x, a, suffix=""):
        k = numpyro.sample("k" + suffix, dist.Categorical(move[before]), infer=dict(SUM))
        numpyro.sample("x" + suffix, dist.Categorical(shown[k]), obs=x)
        numpyro.sample("y" + suffix, dist.Normal(k * a, 1.0), obs=0.5)
        return k, None

    def model():
        a = numpyro.param("a")
        if steps == "scan":
            scan(lambda k, x: step(k, x, a), 0, seen)
        else:
            k = 0
            for t in markov(range(4)):
                k, _ = step(k, seen[t], a, str(t))

    def right(a):
        total = jnp.zeros(())
        for ks in itertools.product(range(3), repeat=4):
            probs = [move[i, j] * shown[j, x] for i, j, x in zip((0, *ks), ks, seen, strict=False)]
            total += jnp.prod(jnp.stack(probs)) * jnp.exp(dist.Normal(a * jnp.array(ks), 1.0).log_prob(0.5).sum())
        return -jnp.log(total)

    a = jnp.array(0.3)
    loss, grads = summed_slope(model, {"a": a})
    wanted = jax.jit(jax.value_and_grad(right))(a)
    np.testing.assert_allclose(loss, wanted[0], atol=1e-9)
    np.testing.assert_allclose(grads["a"], wanted[1], atol=1e-9)


def test_densities_that_contradict_each_other_do_not_underflow():
    """Each value is impossible (in floating point) to one of the two observations beside what the other value is to it."""

    def model():
        k = numpyro.sample("k", dist.Bernoulli(0.5), infer=dict(SUM))
        numpyro.sample("x", dist.Normal(numpyro.param("a") + 100 * k, 1.0), obs=0.0)
        numpyro.sample("y", dist.Normal(100 - 100 * k, 1.0), obs=0.0)

    def right(a):
        logs = [
            dist.Normal(a + 100 * k, 1.0).log_prob(0.0) + dist.Normal(100 - 100 * k, 1.0).log_prob(0.0) for k in (0, 1)
        ]
        return -lse(jnp.stack(logs) + jnp.log(0.5))

    a = jnp.array(0.3)
    loss, grads = summed_slope(model, {"a": a})
    wanted = jax.jit(jax.value_and_grad(right))(a)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-9)
    np.testing.assert_allclose(grads["a"], wanted[1], rtol=1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("read", ["carry", "steps", "summed"])
@pytest.mark.parametrize("steps", [1, 2, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_what_is_read_after_a_scan_is_put_into_its_body(steps, read):
    """The last value of a summed site is not known outside of a scan; the remedy that the error names gives the sum over all paths."""
    move, x = jnp.array([[0.7, 0.3], [0.2, 0.8]]), jnp.array([0.1, 1.2, -0.3, 0.9, 0.4])[:steps]

    def end(k):
        if read == "summed":
            k = numpyro.sample("e", dist.Bernoulli(0.3 + 0.4 * k), infer=dict(SUM))
        numpyro.sample("y", dist.Normal(1.5 * k, 1.0), obs=0.7)

    def model(inside):
        def body(before, row):
            x, t = row
            k = numpyro.sample("k", dist.Categorical(move[before]), infer=dict(SUM))
            numpyro.sample("x", dist.Normal(k, 1.0), obs=x)
            if inside:
                with handlers.mask(mask=t == steps - 1):
                    end(k)
            return k, k

        last, ks = scan(body, 0, (x, jnp.arange(steps)))
        if not inside:
            end(ks[-1] if read == "steps" else last)

    def loss(inside):
        return TraceGrad_ELBO().loss(KEY, {}, lambda: model(inside), lambda: None)

    terms = []
    for ks in itertools.product((0, 1), repeat=steps):
        own = sum(
            jnp.log(move[a, b]) + dist.Normal(b, 1.0).log_prob(x[t])
            for t, (a, b) in enumerate(zip((0, *ks), ks, strict=False))
        )
        seen = dist.Normal(jnp.array([0.0, 1.5]), 1.0).log_prob(0.7)
        e = 0.3 + 0.4 * ks[-1]
        terms.append(own + (lse(jnp.log(jnp.array([1 - e, e])) + seen) if read == "summed" else seen[ks[-1]]))
    wanted = -lse(jnp.array(terms))
    np.testing.assert_allclose(loss(True), wanted, rtol=1e-9)
    with pytest.raises(
        PplgradError, match=r"reads what a scan hands out of site 'k'.*handlers.mask\(mask=t == T - 1\)"
    ):
        loss(False)


def without_scale(monkeypatch):
    monkeypatch.setattr(marginal_sites, "_common_scale", lambda component: 1.0)


def summed_in_the_wrong_plate(monkeypatch):
    plain = contraction.Plates.sum_product

    def sum_product(self, factors, eliminate):
        return plain(replace(self, names=frozenset()), factors, eliminate)

    monkeypatch.setattr(contraction.Plates, "sum_product", sum_product)


def a_factor_counted_twice(monkeypatch):
    plain = contraction.contracted
    monkeypatch.setattr(
        contraction,
        "contracted",
        lambda factors, dims, *rest: plain([*factors, factors[-1]], [*dims, dims[-1]], *rest),
    )


def reads_of_one_factor_alone(monkeypatch):
    plain = specification.densities_read

    def densities_read(static, numbers, read, shapes):
        found = plain(static, numbers, read, shapes)
        return {key: {} if key.startswith("model:") and "(summed" in key else value for key, value in found.items()}

    monkeypatch.setattr(_running, "densities_read", densities_read)


def the_steps_before_are_left_out(monkeypatch):
    monkeypatch.setattr(contraction, "_connected", lambda factors, lags, cut: ([], list(factors)))


MUTANTS = {
    without_scale: "subsampled",
    summed_in_the_wrong_plate: "tree",
    a_factor_counted_twice: "parent in the guide",
    reads_of_one_factor_alone: "tree",
    the_steps_before_are_left_out: "scan",
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    program = PROGRAMS[MUTANTS[mutant]]()
    mutant(monkeypatch)
    try:
        found = expected_gradient(program.case, made(program, ScoreFunction()), 1)
    except (PplgradError, ValueError, KeyError, AssertionError):  # A sum in the wrong plate may be refused.
        return
    assert worst(found, exact_gradient(program.by_hand)) > 1e-6


@pytest.mark.slow
def test_torch_may_have_taken_funsor_before():
    """funsor has one backend for the whole process, and whoever imports pyro.contrib.funsor takes it."""
    pytest.importorskip("torch")
    import funsor

    funsor.set_backend("torch")
    program = PROGRAMS["mixture"]()
    assert_same(expected_gradient(program.case, made(program, None), 1), exact_gradient(program.by_hand))
