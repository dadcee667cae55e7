"""Objectives that combine particles: exact over all tuples of outcomes."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

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
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.in_pyro import (
    HOST,
    array,
    assert_same,
    exact_bound_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    fresh,
    gradient,
    z_of,
)
from pplgrad.testing.programs import CASES
from tests.bound_mutants import MUTANTS
from tests.bounds import AMBIGUOUS, BRANCHES, KEPT, OBJECTIVES, REFUSED, SCORES, bound, branch_pairs, score_pairs, wake


def make(name, estimator, objective, particles=2, vectorized=True):
    estimators = dict.fromkeys(CASES[name].latents, estimator)

    def elbo():
        return TraceGrad_ELBO(particles, vectorize_particles=vectorized, estimators=estimators, objective=objective)

    return elbo


# Without undeclared batch dimensions, these programs run vectorized; the loop runs them one by one.
@pytest.mark.grid
@pytest.mark.parametrize(("objective", "name", "short"), score_pairs())
def test_exact(objective, name, short):
    spec, power = OBJECTIVES[objective]
    vectorized = name not in ("mixed", "minibatch")
    found = expected_gradient(CASES[name], make(name, SCORES[short], spec, vectorized=vectorized), 2)
    assert_same(found, exact_bound_gradient(CASES[name], bound(power), 2, KEPT[name]))


@pytest.mark.grid
@pytest.mark.parametrize(("objective", "name", "short"), branch_pairs())
def test_branches_exact(objective, name, short):
    spec, power = OBJECTIVES[objective]
    found = expected_gradient_over_cells(CASES[name], make(name, BRANCHES[short], spec), 2)
    assert_same(found, exact_bound_gradient(CASES[name], bound(power), 2, 0))


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("name", ["single", "shared_parameter"])
def test_three_particles_exact(name, vectorized):
    found = expected_gradient(CASES[name], make(name, VIMCO(), IWAE(), 3, vectorized), 3)
    assert_same(found, exact_bound_gradient(CASES[name], bound(1.0), 3, 0))


@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [True, False])
def test_bounds_are_averaged_over_further_particles(vectorized):
    found = expected_gradient(CASES["single"], make("single", VIMCO(), IWAE(2), 4, vectorized), 4)
    assert_same(found, exact_bound_gradient(CASES["single"], bound(1.0), 2, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["event_in_plate", "subsampled", "scaled"])
def test_the_program_as_a_whole(name):
    found = expected_gradient(CASES[name], make(name, VIMCO(), IWAE(plates=())), 2)
    assert_same(found, exact_bound_gradient(CASES[name], bound(1.0), 2, 0))


@pytest.mark.parametrize("name", ["single", pytest.param("event_in_plate", marks=pytest.mark.slow)])
def test_wake_phases_exact(name):
    def elbo():
        return TraceGrad_ELBO(2, vectorize_particles=True, objective=ReweightedWakeSleep())

    found = expected_gradient(CASES[name], elbo, 2)
    wanted = exact_bound_gradient(CASES[name], wake(torch.Tensor.detach), 2, KEPT[name], draws_move=False)
    wanted["a"] = -wanted["a"]  # the guide's parameter raises log q, which log w subtracts
    assert_same(found, wanted)


def test_one_particle_is_the_elbo():
    case = CASES["hierarchy"]
    fresh(case)
    model, guide = case.build(HOST)
    losses = []
    for given in ({}, {"objective": IWAE()}, {"objective": Renyi(0.3)}):
        for method in ("loss", "loss_and_grads"):
            pyro.set_rng_seed(3)
            losses.append(getattr(TraceGrad_ELBO(**given), method)(model, guide))
    np.testing.assert_allclose(losses, losses[0])


def continuous(discrete):
    """Return a program of two normal sites, one over the other, with a binary one between them if `discrete`."""
    data = array([0.4, -1.1])

    def model():
        with pyro.plate("data", 2):
            x = pyro.sample("x", dist.Normal(array(0.0), 1.0))
            b = pyro.sample("b", dist.Bernoulli(logits=x)) if discrete else 0.0
            y = pyro.sample("y", dist.Normal(x + b, 1.3))
            pyro.sample("obs", dist.Normal(y * x + b, 0.7), obs=data)

    def guide():
        p = pyro.param("p", array([0.3, -0.2, 0.4, 0.1, 0.6]))
        with pyro.plate("data", 2):
            x = pyro.sample("x", dist.Normal(p[0], p[1].exp()))
            b = pyro.sample("b", dist.Bernoulli(logits=p[4] * x)) if discrete else 0.0
            pyro.sample("y", dist.Normal(p[2] * x + 0.5 * b, p[3].exp()))

    return model, guide


def means(program, estimator, objective, steps):
    """Many bounds of three particles at once, over and over."""
    model, guide = program
    many = type(objective)(**{**objective.__dict__, "samples": 3})
    elbo = TraceGrad_ELBO(3000, vectorize_particles=True, estimators={"[xy]": estimator}, objective=many)
    rows = []
    pyro.clear_param_store()
    for seed in range(steps):
        pyro.set_rng_seed(seed)
        elbo.loss_and_grads(model, guide)
        parameter = pyro.get_param_store()._params["p"]
        rows.append(parameter.grad.clone())
        parameter.grad = None
    rows = torch.stack(rows)
    return rows.mean(0), rows.std(0) / steps**0.5


@pytest.mark.grid(together="doubly reparameterized")
@pytest.mark.slow
@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.4)])
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "mixed"])
def test_doubly_reparameterized_is_unbiased(discrete, objective):
    found, wanted = (means(continuous(discrete), e, objective, 50) for e in (DReG(), Reparam()))
    assert ((found[0] - wanted[0]).abs() < 4.5 * (found[1] ** 2 + wanted[1] ** 2).sqrt() + 1e-12).all()


@pytest.mark.parametrize("vectorized", [True, False])
def test_doubly_reparameterized_of_one_site(vectorized):
    """Σ w̃² ∂z log w ∂φ z, draw by draw."""
    noise = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    visits = iter(noise)

    class Given(dist.Normal):
        def rsample(self, sample_shape=()):
            return self.loc + self.scale * (noise if vectorized else next(visits))

    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(array(0.0), 1.0)), 0.7), obs=array(0.5))

    def guide():
        m, s = pyro.param("m", array(0.2)), pyro.param("s", array(-0.3)).exp()
        pyro.sample("z", Given(m.expand(3) if vectorized else m, s))

    pyro.clear_param_store()
    given = {"max_plate_nesting": 0} if vectorized else {}
    objective = TraceGrad_ELBO(3, vectorize_particles=vectorized, estimators={"z": DReG()}, objective=IWAE(), **given)
    objective.loss_and_grads(model, guide)
    store = pyro.get_param_store()._params
    m, s = store["m"].detach(), store["s"].detach().exp()
    z = (m + s * noise).requires_grad_()
    logs = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(array(0.5)) - dist.Normal(m, s).log_prob(z)
    (slopes,) = torch.autograd.grad(logs.sum(), z)
    weights = logs.detach().softmax(0) ** 2 * slopes
    torch.testing.assert_close(store["m"].grad, -weights.sum())
    torch.testing.assert_close(store["s"].grad, -(weights * noise * s).sum())


@pytest.mark.parametrize("vectorized", [True, False])
def test_particles_share_the_minibatch(vectorized):
    """Weights of different data points in one bound would mean nothing; with one point they are one sum of equal ones."""
    data = array([0.0, 100.0])

    def model():
        with pyro.plate("data", 2, subsample_size=1) as index:
            pyro.sample("z", dist.Bernoulli(array(0.5)))
            pyro.sample("x", dist.Normal(array(0.0), 1.0), obs=data[index])

    def guide():
        with pyro.plate("data", 2, subsample_size=1):
            pyro.sample("z", dist.Bernoulli(array(0.5)))

    elbo = TraceGrad_ELBO(8, vectorize_particles=vectorized, objective=IWAE())
    assert {round(elbo.loss(model, guide)) for _ in range(8)} == {2, 10_002}
    assert {round(elbo.loss_and_grads(model, guide)) for _ in range(8)} == {2, 10_002}


def test_training_with_the_defaults():
    case = CASES["mixed"]
    fresh(case)
    model, guide = case.build(HOST)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceGrad_ELBO(4, objective=IWAE()))
    assert np.isfinite([svi.step() for _ in range(10)] + [svi.evaluate_loss()]).all()


@pytest.mark.parametrize("words", REFUSED)
def test_misfits_are_refused(words):
    kind, estimator, objective, particles = REFUSED[words]
    given = {} if objective is None else {"objective": objective}
    name = "x" if isinstance(estimator, Reparam | DReG) else "z"
    elbo = TraceGrad_ELBO(particles, estimators={name: estimator}, **given)
    fresh(CASES["mixed"])
    model, guide = CASES["mixed"].build(HOST)
    with pytest.raises(kind, match=words) as error:
        elbo.loss(model, guide)
    assert f"'{name}'" in str(error.value)


@pytest.mark.parametrize(("name", "objective", "words"), AMBIGUOUS)
def test_ambiguous_weights_are_refused(name, objective, words):
    fresh(CASES[name])
    model, guide = CASES[name].build(HOST)
    with pytest.raises((ProgramError, ConfigurationError), match=words):
        TraceGrad_ELBO(2, objective=objective).loss(model, guide)


def test_numbers_of_particles():
    with pytest.raises(ConfigurationError, match="num_particles=3; pass a multiple of 2"):
        TraceGrad_ELBO(3, objective=IWAE(2))


@pytest.mark.grid(together="mutants of bounds")
@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    mutant = MUTANTS[name]
    case, vectorized = CASES[mutant.case], mutant.case != "minibatch"
    over = expected_gradient_over_cells if mutant.estimator.uses_branches else expected_gradient
    wanted = exact_bound_gradient(case, bound(1.0), 2, KEPT[mutant.case])
    mutant.apply(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(over(case, make(mutant.case, mutant.estimator, IWAE(), vectorized=vectorized), 2), wanted, 1e-6)


@pytest.mark.slow
def test_sleep_phase_unbiased():
    """The guide's gradient is that of −E_p(z, x)[log q(z; x)]."""
    p = array([0.4, -0.7, 0.9])

    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=p[0]))
            pyro.sample("x", dist.Bernoulli(logits=p[1] + p[2] * z), obs=x)

    def guide(x):
        a = pyro.param("a", array([0.2, 0.5]))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=a[0] + a[1] * x))

    a, crossed = array([0.2, 0.5]).requires_grad_(), 0.0
    for z in (array(0.0), array(1.0)):
        for seen in (array(0.0), array(1.0)):
            log_p = dist.Bernoulli(logits=p[0]).log_prob(z) + dist.Bernoulli(logits=p[1] + p[2] * z).log_prob(seen)
            crossed = crossed - 2 * log_p.exp() * dist.Bernoulli(logits=a[0] + a[1] * seen).log_prob(z)
    (wanted,) = torch.autograd.grad(crossed, a)
    objective = ReweightedWakeSleep(insomnia=0.0, dream=lambda drawn, x: (drawn["x"],), dreams=20)
    elbo = TraceGrad_ELBO(2, objective=objective)
    rows = []
    pyro.clear_param_store()
    for seed in range(300):
        pyro.set_rng_seed(seed)
        elbo.loss_and_grads(model, guide, array([1.0, 0.0]))
        rows.append(gradient()["a"])
    assert z_of(np.stack(rows), wanted.numpy()) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_mutants_of_the_reparameterized_score_are_caught(factor, monkeypatch):
    """The term left out, with the wrong sign, or twice."""
    plain = surrogate.path_terms
    monkeypatch.setattr(surrogate, "path_terms", lambda *args: factor * plain(*args))
    with pytest.raises(AssertionError):
        test_doubly_reparameterized_of_one_site(True)
