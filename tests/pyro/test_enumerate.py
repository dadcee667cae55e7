"""`Enumerate()` in Pyro: exact sums over all values of guide sites, against brute force and `TraceEnum_ELBO`."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pplgrad import (
    IWAE,
    ConfigurationError,
    Enumerate,
    EstimatorError,
    ImpossibleValueError,
    LocalExpectation,
    Renyi,
    Reparam,
    ScoreFunction,
)
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import (
    HOST,
    array,
    assert_same,
    exact_gradient,
    exact_loss,
    expected_gradient,
    expected_gradient_over_cells,
    fresh,
    gradient,
    worst,
)
from pplgrad.testing.programs import ALL
from tests.covering import mostly
from tests.enumerating import ALONE, BETWEEN, MUTANTS, chosen, loss_after_one, marked

WAYS = {
    "looped": {"num_particles": 2},
    "at-once": {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 2},
    "chunks": {"vectorize_particles": True, "max_plate_nesting": 2, "max_parallel": 4},
}


def draws(case, elbo, subsets=None):
    """Return the value and the gradient of two steps with draws of their own."""
    model, guide = case.build(HOST)
    for seed in range(2):
        fresh(case)
        pyro.set_rng_seed(seed)
        yield elbo.loss_and_grads(model, guide), gradient()


@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [marked(name) for name in ALONE if not ALL[name].subsamples])
def test_one_step_is_exact(name, way):
    if name in ("batch_without_plate", "categorical_index") and way != "looped":
        pytest.skip("does not broadcast")
    case = ALL[name]
    fresh(case)
    loss = float(exact_loss(case, *case.build(HOST)).detach())
    for value, found in draws(case, TraceGrad_ELBO(estimators={"*": Enumerate()}, **WAYS[way])):
        assert abs(value - loss) < 1e-9
        assert_same(found, exact_gradient(case))


@pytest.mark.parametrize("way", WAYS)
def test_values_that_another_site_makes_impossible(way):
    case = ALL["possible_after_one"]
    params = {name: array(x).requires_grad_() for name, x in case.params.items()}
    loss = loss_after_one(HOST, params)
    wanted = torch.autograd.grad(loss, list(params.values()))
    for value, found in draws(case, TraceGrad_ELBO(estimators={"*": Enumerate()}, **WAYS[way])):
        assert abs(value - float(loss.detach())) < 1e-9
        assert_same(found, dict(zip(params, map(np.asarray, wanted), strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALONE if ALL[name].subsamples])
def test_minibatches_are_all_that_is_drawn(name):
    case = ALL[name]
    elbo = TraceGrad_ELBO(estimators={"*": Enumerate()}, max_plate_nesting=2)
    assert_same(expected_gradient(case, lambda: elbo, 1), exact_gradient(case))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "vectorized"),
    [
        *mostly(["score"], [pytest.param(name, True) for name in BETWEEN]),
        pytest.param("one", False, marks=pytest.mark.exhaustive),
    ],
)
def test_between_other_estimators(name, vectorized):
    case = ALL["beside_others"]
    found = expected_gradient_over_cells(case, lambda: elbo_of(name, vectorized))
    assert_same(found, exact_gradient(case))


def elbo_of(name, vectorized=True):
    return TraceGrad_ELBO(vectorize_particles=vectorized, max_plate_nesting=2, estimators=chosen(name))


@pytest.mark.parametrize("name", mostly(sorted(MUTANTS)[:4], MUTANTS))
def test_mutants_are_caught(name, monkeypatch):
    mutant = MUTANTS[name]
    case = ALL["beside_others" if mutant.shown_by in BETWEEN else mutant.shown_by]
    over = expected_gradient_over_cells if mutant.shown_by in BETWEEN else lambda c, make: expected_one(c, make)
    wanted = exact_gradient(case)
    mutant.apply(monkeypatch)
    # The draws of minibatches are forced one by one.
    assert not worst(over(case, lambda: elbo_of(mutant.shown_by, not case.subsamples)), wanted) < 1e-6


def expected_one(case, make):
    """Return the gradient of one step; over all minibatches where there are any."""
    if case.subsamples:
        return expected_gradient(case, make, 1)
    return next(draws(case, make()))[1]


def three(b):
    """Return a program whose guide `TraceEnum_ELBO` enumerates, with parameters in model and guide."""

    def model():
        m = pyro.param("m", array(0.7))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        k = pyro.sample("k", dist.Categorical(logits=torch.stack([0.2 * z, z - 0.3, 0.5 * z], -1)))
        with pyro.plate("data", 3):
            w = pyro.sample("w", dist.Bernoulli(torch.sigmoid(0.3 * z - 0.2)))
            pyro.sample("x", dist.Normal(m * z + torch.sin(1.0 * k) * w, 1.0), obs=array([0.3, -1.1, 2.0]))

    def guide():
        a, c = pyro.param("a", array(0.2)), pyro.param("c", array([0.2, -0.5, 0.1]))
        z = pyro.sample("z", dist.Bernoulli(logits=a))
        k = pyro.sample("k", dist.Categorical(logits=Vindex(pyro.param("b", array(b)))[z.long(), :]))
        with pyro.plate("data", 3):
            pyro.sample("w", dist.Bernoulli(logits=c * (1.0 + z) + 0.3 * k))

    return model, guide


@pytest.mark.grid
@pytest.mark.parametrize("how", ["parallel", "sequential"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vectorize_particles": True, "num_particles": 2},
        pytest.param({"compile": {"backend": "eager"}}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_config_enumerate_gives_what_trace_enum_gives(options, how):
    model, guide = three([[0.1, -0.2, 0.4], [0.3, 0.1, -0.5]])
    asking = config_enumerate(guide, how)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, config_enumerate(guide, "parallel"))
    wanted = gradient()
    elbo = TraceGrad_ELBO(max_plate_nesting=1, **options)
    for _ in range(4):
        assert abs(elbo.loss_and_grads(model, asking) - loss) < 1e-9
        assert_same(gradient(), wanted)
    assert abs(elbo.loss(model, asking) - loss) < 1e-9
    assert abs(TraceGrad_ELBO(max_plate_nesting=1).loss(model, asking) - loss) < 1e-9
    assert float(elbo.differentiable_loss(model, asking).detach()) == pytest.approx(loss, abs=1e-9)
    rows = elbo.describe(model, asking).rows
    assert [row["estimator"] for row in rows] == ["Enumerate()"] * 3
    assert [row["evaluations"] for row in rows] == [0, 0, 11]


@pytest.mark.exhaustive
def test_second_derivatives():
    model, guide = three([[0.1, -0.2, 0.4], [0.3, 0.1, -0.5]])
    TraceGrad_ELBO(max_plate_nesting=1).loss(model, guide)
    leaf = pyro.get_param_store()._params["a"]

    def second(elbo, guide):
        slope = torch.autograd.grad(elbo.differentiable_loss(model, guide), leaf, create_graph=True)[0]
        return torch.autograd.grad(slope, leaf)[0]

    wanted = second(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide, "parallel"))
    for higher_order in (False, True):
        elbo = TraceGrad_ELBO(max_plate_nesting=1, estimators={"*": Enumerate()}, higher_order=higher_order)
        assert second(elbo, guide) == pytest.approx(wanted, abs=1e-9)
    mixed = TraceGrad_ELBO(max_plate_nesting=1, estimators={"z": Enumerate(), "*": ScoreFunction()}, higher_order=True)
    with pytest.raises(EstimatorError, match="'k', which follows a site under Enumerate"):
        mixed.differentiable_loss(model, guide)


def test_a_sum_that_is_too_large_is_refused_with_its_size():
    def run():
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.0))

    def guide():
        with pyro.plate("data", 20):
            pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    with pytest.raises(
        EstimatorError, match=r"1,048,576 joint values at site 'z' .*LocalExpectation\(\) or ScoreFunction\(\)"
    ):
        TraceGrad_ELBO().loss_and_grads(run, guide)


def test_many_sites_that_meet_in_one_density_are_refused_by_name():
    def run():
        every = [pyro.sample(f"z{i}", dist.Bernoulli(0.5)) for i in range(100)]
        pyro.sample("x", dist.Normal(sum(every), 1.0), obs=torch.tensor(0.0))

    def guide():
        for i in range(100):
            pyro.sample(f"z{i}", dist.Bernoulli(0.5))

    with pytest.raises(EstimatorError, match=r"10\^30 or more joint values at sites 'z0'.*LocalExpectation"):
        TraceGrad_ELBO(estimators={"*": Enumerate()}).loss_and_grads(run, guide)


def test_what_cannot_be_summed_over_is_refused_by_name():
    def run(law=dist.Poisson(2.0)):
        pyro.sample("z", law, infer={"enumerate": "parallel"})

    with pytest.raises(EstimatorError, match="Enumerate.*'z': Poisson does not have finitely many values"):
        TraceGrad_ELBO().loss_and_grads(run, run)
    with pytest.raises(ConfigurationError, match="limit=0"):
        Enumerate(limit=0)


@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.5)], ids=str)
def test_a_bound_of_several_particles_has_no_joint_sum(objective):
    def run(**infer):
        return lambda: pyro.sample("z", dist.Bernoulli(0.4), infer=infer)

    elbo = TraceGrad_ELBO(2, objective=objective)
    with pytest.raises(EstimatorError, match=r"Enumerate.*'z'.*combines.*use LocalExpectation\(\)"):
        elbo.loss_and_grads(run(), run(estimator=Enumerate()))
    asking = run(enumerate="parallel")
    assert TraceGrad_ELBO(2, objective=objective).describe(run(), asking).rows[0]["estimator"] == "LocalExpectation()"


def test_a_number_of_values_that_depends_on_another_site_is_refused():
    def run():
        n = pyro.sample("n", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Binomial(total_count=int(n) + 1, probs=torch.tensor(0.4)))

    with pytest.raises(EstimatorError, match="'z' needs a number of values that does not depend"):
        TraceGrad_ELBO(estimators={"*": Enumerate()}).loss_and_grads(run, run)


def test_a_named_estimator_goes_before():
    def run(**infer):
        return lambda: pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel", **infer})

    assert (
        TraceGrad_ELBO().describe(run(), run(estimator=LocalExpectation())).rows[0]["estimator"] == "LocalExpectation()"
    )


def test_a_mark_in_the_model_changes_nothing_for_a_site_that_the_guide_draws():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(0.2))))

    rows = TraceGrad_ELBO(estimators={"z": ScoreFunction()}).describe(model, guide).rows
    assert [row["estimator"] for row in rows] == ["ScoreFunction()"]


BEHIND = [Reparam(), Reparam(sticking_the_landing=True), ScoreFunction()]


@pytest.mark.exhaustive
@pytest.mark.parametrize("behind", BEHIND, ids=["path", "landing", "score"])
def test_a_continuous_site_behind_is_drawn_in_each_row(behind):
    """The expectation over it in closed form, against the mean of many steps with noise of their own."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        x = pyro.sample("x", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(x * (1.0 + z), 1.0), obs=torch.tensor(0.7))

    def guide():
        a = pyro.param("a", array([0.2, 0.4, -0.3]))
        z = pyro.sample("z", dist.Bernoulli(logits=a[0]))
        pyro.sample("x", dist.Normal(a[1] + a[2] * z, 0.8))

    def exact(a):
        """E over x of a quadratic: from its mean and variance."""
        total = 0.0
        for z in (0.0, 1.0):
            m, v, z = a[1] + a[2] * z, 0.64, torch.tensor(z)
            log_q = dist.Bernoulli(logits=a[0]).log_prob(z)
            prior = dist.Normal(z, 1.0).log_prob(m) - 0.5 * v
            entropy = 0.5 * torch.log(torch.tensor(2 * torch.pi * torch.e * v))
            likelihood = dist.Normal(m * (1 + z), 1.0).log_prob(torch.tensor(0.7)) - 0.5 * v * (1 + z) ** 2
            total = total + log_q.exp() * (dist.Bernoulli(0.3).log_prob(z) - log_q + prior + entropy + likelihood)
        return -total

    leaf = array([0.2, 0.4, -0.3]).requires_grad_()
    exact(leaf).backward()
    elbo = TraceGrad_ELBO(
        2000, vectorize_particles=True, max_plate_nesting=0, estimators={"z": Enumerate(), "x": behind}
    )
    rows = []
    for _ in range(40):
        elbo.loss_and_grads(model, guide)
        rows.append(torch.as_tensor(gradient()["a"]))
    rows = torch.stack(rows)
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - leaf.grad).abs() < 4.5 * error).all()


def test_a_cost_that_is_infinite_at_a_possible_value_names_the_site():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.factor("f", torch.where(z == 1, -torch.inf, 0.0))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", array(-9.0))))

    with pytest.raises(ImpossibleValueError, match="'z'.*probability 0"):
        TraceGrad_ELBO(estimators={"z": Enumerate()}).loss_and_grads(model, guide)


def test_a_plate_of_many_elements_is_refused_with_its_size():
    def run():
        with pyro.plate("data", 20_000):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.0))

    def guide():
        with pyro.plate("data", 20_000):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(
        EstimatorError, match=r"10\^6020 or more joint values at site 'z' \(2 values of 20000 elements\)"
    ):
        TraceGrad_ELBO(estimators={"z": Enumerate()}).loss_and_grads(run, guide)
