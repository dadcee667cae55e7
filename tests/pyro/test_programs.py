"""The programs that users write: TraceGrad_ELBO takes what Trace_ELBO takes, and is right there."""

import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, AutoNormalMessenger
from pyro.optim import Adam

from pplgrad import DecayingAverage, LeaveOneOut, Reparam, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO, config_estimators
from pplgrad.testing.in_pyro import HOST, Force, array, assert_same, exact_gradient, fresh, gradient
from pplgrad.testing.programs import CASES


@pytest.mark.grid
@pytest.mark.parametrize("name", [name for name in CASES if name != "batch_without_plate"])  # Trace_ELBO refuses it.
@pytest.mark.parametrize(("particles", "vectorized"), [(1, False), (3, False), (3, True), (1, True)])
def test_same_draws_and_same_loss_as_trace_elbo(name, particles, vectorized):
    fresh(CASES[name])
    model, guide = CASES[name].build(HOST)
    found = []
    for make in (Trace_ELBO, TraceGrad_ELBO):
        elbo = make(particles, vectorize_particles=vectorized)
        elbo.loss(model, guide)  # The first run may guess the plate nesting, which draws.
        for method in (elbo.loss, elbo.loss_and_grads, lambda *a: elbo.differentiable_loss(*a).item()):  # noqa: B023
            pyro.set_rng_seed(3)
            found.append(method(model, guide))
    np.testing.assert_allclose(found, found[0], rtol=1e-12)


def test_is_an_elbo_with_every_argument():
    elbo = TraceGrad_ELBO(
        num_particles=2,
        max_plate_nesting=3,
        vectorize_particles=True,
        strict_enumeration_warning=False,
        ignore_jit_warnings=True,
        jit_options={},
        retain_graph=True,
        tail_adaptive_beta=-0.5,
    )
    assert isinstance(elbo, ELBO) and isinstance(elbo, Trace_ELBO) and elbo.max_plate_nesting == 4


def test_differentiable_loss_has_the_gradient_of_loss_and_grads():
    case = CASES["nested_plates"]
    model, guide = case.build(HOST)
    elbo = TraceGrad_ELBO(2, estimators={"*": ScoreFunction(LeaveOneOut())})
    found = []
    for backward in (elbo.loss_and_grads, lambda *a: elbo.differentiable_loss(*a).backward()):
        fresh(case)
        pyro.set_rng_seed(0)
        backward(model, guide)
        found.append(gradient())
    assert_same(found[0], found[1], 1e-12)


def gaussian_mixture():
    data = torch.tensor([-2.1, -1.9, 2.0, 2.2])

    def model():
        means = pyro.sample("means", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(logits=torch.zeros(2)))
            pyro.sample("x", dist.Normal(means[k], 1.0), obs=data)

    return model


@pytest.mark.slow
def test_autoguide_beside_a_hand_written_discrete_site():
    model = gaussian_mixture()
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["k"]), init_loc_fn=lambda s: torch.tensor([-0.5, 0.5])))

    def part():
        # An AutoGuideList makes the plates itself, and lends them to its parts.
        with guide.plates["data"]:
            pyro.sample("k", dist.Categorical(logits=pyro.param("logits", torch.zeros(4, 2))))

    guide.append(part)
    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO(4))
    losses = [svi.step() for _ in range(400)]
    assert np.mean(losses[-50:]) < np.mean(losses[:50]) - 1
    assert (pyro.param("logits").argmax(-1) == torch.tensor([0, 0, 1, 1])).all()


def test_wrapped_autoguide_keeps_its_attributes():
    def model():
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.sample("nu", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))

    guide = config_estimators(AutoNormal(model), {"nu_unconstrained": Reparam(), "nu*": Reparam()})
    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO())
    for _ in range(5):
        svi.step()
    assert set(guide.median()) == {"mu", "nu"}
    assert guide.quantiles([0.5]).keys() == {"mu", "nu"}
    assert set(pickle.loads(pickle.dumps(guide)).median()) == {"mu", "nu"}


def test_effect_guide():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.tensor([0.9, 1.0, 1.1]))

    guide = AutoNormalMessenger(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO(2, vectorize_particles=False))
    losses = [svi.step() for _ in range(200)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


def test_precedence():
    """The ELBO beats the site's own, which beats the inner wrapper, which beats the outer one; names beat patterns."""
    score = [ScoreFunction(DecayingAverage(i / 10)) for i in range(6)]

    def guide():
        pyro.sample("own", dist.Bernoulli(0.5), infer={"estimator": score[1]})
        for name in ("inner", "outer", "elbo", "exact"):
            pyro.sample(name, dist.Bernoulli(0.5))

    def model():
        for name in ("own", "inner", "outer", "elbo", "exact"):
            pyro.sample(name, dist.Bernoulli(0.5))

    inner = config_estimators(guide, {"own": score[0], "in*": score[2], "e*": score[0]})
    outer = config_estimators({"i*": score[0], "*": score[3], "exact": score[0]})(inner)
    elbo = TraceGrad_ELBO(estimators={"e*": score[0], "el*": score[4], "exact": score[5], "elbo": score[4]})
    elbo.loss_and_grads(model, outer)
    (structure,) = elbo._structures._known.values()
    chosen = {site.name: site.estimator for site in structure.found.sites}
    assert chosen == {"own": score[1], "inner": score[2], "outer": score[3], "elbo": score[4], "exact": score[5]}


def test_the_users_infer_dict_is_not_written_to():
    shared = {"note": 1}

    def guide():
        pyro.sample("z", dist.Bernoulli(0.5), infer=shared)

    TraceGrad_ELBO().loss_and_grads(guide, config_estimators(guide, {"z": ScoreFunction()}))
    assert shared == {"note": 1}


def test_return_value_and_other_handlers_pass_through():
    @config_estimators({"z": ScoreFunction()})
    def guide(x):
        """Docs stay."""
        return pyro.sample("z", dist.Bernoulli(0.5)) + x

    assert guide.__doc__ == "Docs stay." and guide.__name__ == "guide"
    conditioned = poutine.condition(guide, data={"z": torch.tensor(1.0)})
    assert conditioned(2) == 3
    assert poutine.trace(poutine.block(guide, hide=["z"])).get_trace(2).nodes.keys() == {"_INPUT", "_RETURN"}


def test_blocked_and_conditioned_sites():
    """A guide site that a handler hides or observes is none of the ELBO's business."""
    case = CASES["hierarchy"]
    fresh(case)
    model, guide = case.build(HOST)
    data = {"z1": array(1.0)}
    conditioned = poutine.condition(model, data=data)
    blocked = poutine.block(poutine.condition(guide, data=data), hide=["z1"])
    elbo = TraceGrad_ELBO(estimators={"z[23]": ScoreFunction()})
    reference = Trace_ELBO()
    pyro.set_rng_seed(1)
    found = elbo.loss_and_grads(conditioned, blocked)
    pyro.set_rng_seed(1)
    assert found == pytest.approx(reference.loss(conditioned, blocked))


@pytest.mark.slow
def test_obs_mask_factor_and_deterministic():
    observed = torch.tensor([True, True, False])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            d = pyro.deterministic("d", 2 * z)
            pyro.sample("x", dist.Bernoulli(logits=d), obs=torch.tensor([1.0, 0, 0]), obs_mask=observed)
            pyro.factor("f", 0.1 * z)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(3))))
            with poutine.mask(mask=~observed):
                pyro.sample("x_unobserved", dist.Bernoulli(0.5))

    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO(4, vectorize_particles=True))
    for _ in range(600):
        svi.step()
    # The best mean-field logits: E[log p(x | z=1)] − E[log p(x | z=0)] + 0.1, with x uniform where it is not observed.
    one, zero = torch.nn.functional.logsigmoid(torch.tensor([2.0, -2.0]))
    wanted = torch.stack([one, zero, (one + zero) / 2]) - torch.tensor(0.5).log() + 0.1
    np.testing.assert_allclose(pyro.param("a").detach(), wanted, atol=0.25)


def test_markov_and_sequential_plates():
    def model(n):
        z = torch.tensor(0.0)
        for t in pyro.markov(range(n)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(0.3 + 0.4 * z))
        for i in pyro.plate("seq", 3):
            pyro.sample(f"x{i}", dist.Normal(z * i, 1.0), obs=torch.tensor(0.5))

    def guide(n):
        z = torch.tensor(0.0)
        for t in pyro.markov(range(n)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=pyro.param("a", torch.zeros(5))[t] + z))

    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO(2))
    assert all(np.isfinite(svi.step(4)) for _ in range(10))


def test_pyro_module_and_registered_modules():
    net = torch.nn.Linear(3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) * torch.ones(3), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=net(x)).to_event(1))

    x = torch.cat([torch.zeros(20, 3), 2 * torch.ones(20, 3)])
    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO(2, vectorize_particles=True))
    losses = [svi.step(x) for _ in range(150)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 5


def test_shared_minibatch_and_changing_batch_sizes():
    data = torch.cat([torch.zeros(7), 2 * torch.ones(6)])

    def model(batch):
        with pyro.plate("data", 13, subsample_size=len(batch)) as index:
            seen.append(index.clone())
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=data[index])

    def guide(batch):
        with pyro.plate("data", 13, subsample_size=len(batch)) as index:
            seen.append(index.clone())
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(13))[index]))

    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO())
    for step in range(60):
        seen = []
        svi.step(data[: 5 + step % 3])
        assert (seen[0] == seen[1]).all()


def test_metamorphic_scale_and_permutation():
    """Costs × 10 give gradients × 10; permuting a plate permutes the gradients."""
    data = torch.tensor([0.3, -0.6, 1.4])

    def programs(order, factor):
        def model():
            with poutine.scale(scale=factor), pyro.plate("data", 3):
                z = pyro.sample("z", dist.Bernoulli(0.4))
                pyro.sample("x", dist.Normal(2 * z, 1.0), obs=data[order])

        def guide():
            with poutine.scale(scale=factor), pyro.plate("data", 3):
                pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor([0.1, -0.3, 0.7]))[order]))

        return model, guide

    draw = np.array([1.0, 0.0, 1.0])

    def grad(order, factor):
        pyro.clear_param_store()
        with Force([{"z": draw[order]}], {}):
            TraceGrad_ELBO(estimators={"z": ScoreFunction()}).loss_and_grads(*programs(order, factor))
        return gradient()["a"]

    same = [0, 1, 2]
    np.testing.assert_allclose(grad(same, 10.0), 10 * grad(same, 1.0))
    np.testing.assert_allclose(grad([2, 0, 1], 1.0), grad(same, 1.0))


def test_subsampling_is_not_scaled_twice():
    """NumPyro 0.22's TraceGraph_ELBO is off by N/n here; the enumeration covers it, this names the trap."""
    assert exact_gradient(CASES["subsampled"])["a"].any()


def test_score_of_a_transformed_distribution_and_a_mask():
    from pplgrad.pyro._distributions import unmasked

    base = dist.Normal(torch.zeros(3), 1.0)
    fn = base.mask(torch.tensor([True, False, True])).to_event(1)
    value = torch.ones(3)
    np.testing.assert_allclose(unmasked(fn).log_prob(value), base.log_prob(value).sum())
    assert unmasked(base) is base


def normal_program(estimator, sigma, n):
    """Return a program of n draws, each with a mean of its own, so that one step has the gradients of all."""
    c = 1.5

    def model():
        with pyro.plate("draws", n):
            x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
            pyro.factor("f", -((x - c) ** 2))

    def guide():
        mu = pyro.param("mu", torch.tensor(0.4).expand(n))
        with pyro.plate("draws", n), poutine.mask(mask=False):
            pyro.sample("x", dist.Normal(mu, sigma), infer={"estimator": estimator})

    return model, guide, c


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_closed_form_moments_of_both_estimators(sigma):
    r"""x ~ N(μ, σ²), cost (x − c)², gradient with respect to μ: 2(μ − c) in the mean.

    Pathwise: g = 2(x − c), variance 4σ². Score: g = (x − c)² (x − μ)/σ²; with d = μ − c and x = μ + σε,
    g = (d + σε)² ε/σ, E[g²] = (d⁴ + 18 d²σ² + 15 σ⁴)/σ² (from E ε² = 1, E ε⁴ = 3, E ε⁶ = 15), so that the variance is
    d⁴/σ² + 14 d² + 15 σ²: it grows with d and is unbounded as σ → 0.
    """
    n = 40_000
    for estimator in (Reparam(), ScoreFunction()):
        model, guide, c = normal_program(estimator, sigma, n)
        pyro.clear_param_store()
        d = 0.4 - c
        if estimator == Reparam():
            variance = 4 * sigma**2
        else:
            variance = d**4 / sigma**2 + 14 * d**2 + 15 * sigma**2
        TraceGrad_ELBO().loss_and_grads(model, guide)
        draws = gradient()["mu"].astype(float)
        mean_error = (draws.mean() - 2 * d) / np.sqrt(variance / n)
        fourth = ((draws - draws.mean()) ** 4).mean()
        variance_error = (draws.var() - variance) / np.sqrt((fourth - variance**2) / n)
        assert abs(mean_error) < 4 and abs(variance_error) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log_normal", "gamma", "poisson", "geometric", "beta"])
def test_score_function_on_any_distribution(name):
    """z-test against quadrature or a long sum, on a cost that is neither linear nor symmetric."""
    theta = torch.tensor(0.3)
    families = {
        "log_normal": lambda t: dist.LogNormal(t, 0.5),
        "gamma": lambda t: dist.Gamma(2.0 + t, 1.5),
        "poisson": lambda t: dist.Poisson(1.0 + t),
        "geometric": lambda t: dist.Geometric(logits=t),
        "beta": lambda t: dist.Beta(2.0 + t, 1.0),
    }
    family = families[name]

    def cost(x):
        return torch.sin(2 * x) + 0.3 * x

    t = theta.clone().requires_grad_()
    if name in ("poisson", "geometric"):
        grid = torch.arange(0.0, 200.0)
        exact = (family(t).log_prob(grid).exp() * cost(grid)).sum()
    else:
        top = 1.0 if name == "beta" else 60.0
        grid = (torch.arange(400_000.0) + 0.5) * top / 400_000
        exact = (family(t).log_prob(grid).exp() * cost(grid)).sum() * top / 400_000
    (wanted,) = torch.autograd.grad(exact, t)

    def model():
        with pyro.plate("many", 50_000):
            x = pyro.sample("x", family(torch.tensor(0.0)).mask(False))
            pyro.factor("f", cost(x))

    def guide():
        with pyro.plate("many", 50_000), poutine.mask(mask=False):
            pyro.sample("x", family(pyro.param("t", theta.expand(50_000))))

    TraceGrad_ELBO(estimators={"x": ScoreFunction()}).loss_and_grads(model, guide)
    draws = -gradient()["t"]
    assert abs(draws.mean() - wanted.item()) / (draws.std() / np.sqrt(len(draws))) < 4
