"""Continuous sites that only the model draws: a warning, and the loss and gradient that Pyro's own ELBOs have."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO

from pplgrad import IWAE, DisARM, LocalExpectation, MuProp, PplgradError, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO, check_gradients
from pplgrad.pyro._tracing import particle_trace
from pplgrad.pyro._tracing.provenance import Provenance
from pplgrad.testing.in_pyro import (
    assert_same,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    fresh,
    gradient,
    worst,
)
from pplgrad.testing.programs import Case
from tests.pyro.compiling import assert_like_eager

FOUND = "Found vars in model but not guide"


@pytest.fixture(autouse=True)
def expected_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", FOUND)
        yield


def p(name):
    return pyro.param(name)


def at(*noise):
    """Return a normal distribution that draws from the same standard noise every time."""
    noise = (
        list(noise) if len(noise) > 1 else noise[0]
    )  # Numbers: a tensor that no argument holds could not be followed.
    return type(
        "Normal", (dist.Normal,), {"rsample": lambda self, shape=(): self.loc + self.scale * torch.tensor(noise)}
    )


def local(at=at):
    """A draw of the model's in a plate, between a discrete draw of the guide's and data; another one outside of it."""
    x, of_w, of_z = torch.tensor([0.3, -1.1, 2.0]), at(0.4), at(-0.3, 1.1, 0.2)

    def model():
        b = pyro.sample("b", dist.Bernoulli(logits=p("l")[0]))
        w = pyro.sample("w", of_w(p("m") + b, 0.7))
        with pyro.plate("data", 3):
            c = pyro.sample("c", dist.Bernoulli(logits=p("l")[1] + w))
            z = pyro.sample("z", of_z(p("m") * c - b, p("s").exp()))
            pyro.sample("x", dist.Normal(z * w + c, 1.0), obs=x)

    def guide():
        pyro.sample("b", dist.Bernoulli(logits=p("a")[0]))
        with pyro.plate("data", 3):
            pyro.sample("c", dist.Bernoulli(logits=p("a")[1:]))

    params = {"a": np.array([0.3, -0.2, 0.5, 0.1]), "l": np.array([0.7, -0.4]), "m": np.array(0.6), "s": np.array(-0.3)}
    noise = {"w": np.array(0.4), "z": np.array([-0.3, 1.1, 0.2])}
    return Case("draws of the model", params, {"b": ((), 2), "c": ((3,), 2)}, lambda host: (model, guide), noise)


ESTIMATORS = {
    "score": ScoreFunction(),
    "leave-one-out": ScoreFunction(samples=2),
    "local": LocalExpectation(),
    "disarm": DisARM(),
    "muprop": MuProp(),
}


def made(estimator, particles=1, vectorized=False, **given):
    names = dict.fromkeys(("b", "c"), estimator)
    return lambda: TraceGrad_ELBO(
        particles, estimators=names, vectorize_particles=vectorized, max_plate_nesting=1, **given
    )


@pytest.mark.parametrize("short", ESTIMATORS)
def test_exact(short):
    """The expected gradient at fixed noise of the model's draws is that of the enumerated loss, which has their log densities in it."""
    case, estimator = local(), ESTIMATORS[short]
    over = expected_gradient_over_cells if estimator.uses_branches else expected_gradient
    assert_same(over(case, made(estimator), 1), exact_gradient(case))


def test_exact_with_branches_at_once():
    case = local()
    assert_same(expected_gradient_over_cells(case, made(LocalExpectation(), 1, True)), exact_gradient(case))


def continuous():
    """A program of which every draw is reparameterized: nothing is left to the estimator."""
    u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Gamma(p("s").exp(), 1.0 + u**2))
        pyro.sample("x", dist.Normal(z + u * p("m"), 1.0), obs=torch.tensor([0.3, -1.1, 2.0]))


def continuous_guide():
    pyro.sample("u", dist.Normal(p("m"), p("s").exp()))


@pytest.mark.grid
@pytest.mark.parametrize("host", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("particles", [1, 3])
def test_the_same_draws_give_the_hosts_loss_and_gradient(host, particles):
    results = []
    for elbo in (host(particles), TraceGrad_ELBO(particles)):
        pyro.clear_param_store()
        pyro.param("m", torch.tensor(0.4))
        pyro.param("s", torch.tensor(0.2))
        pyro.set_rng_seed(3)
        results.append({"loss": np.array(elbo.loss_and_grads(continuous, continuous_guide)), **gradient()})
        pyro.set_rng_seed(3)
        np.testing.assert_allclose(elbo.loss(continuous, continuous_guide), results[-1]["loss"], rtol=1e-12)
    assert_same(*results)


def test_closed_form():
    """A draw z ~ N(m, s²) counts as E[log N(z; m, s) + log N(x; z, 1)], of which the first term is the negative entropy."""

    noise = [0.0]
    law = type(
        "Normal", (dist.Normal,), {"rsample": lambda self, shape=(): self.loc + self.scale * torch.tensor(noise[0])}
    )

    def model():
        z = pyro.sample("z", law(p("m"), p("s").exp()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    pyro.param("m", torch.tensor(0.4))
    pyro.param("s", torch.tensor(0.2))
    loss, found = 0.0, {"m": 0.0, "s": 0.0}
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)  # Exact for polynomials of degree 7.
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        noise[0] = float(node)
        with pytest.warns(UserWarning, match=FOUND):
            loss += weight * TraceGrad_ELBO().loss_and_grads(model, lambda: None)
        found = {name: found[name] + weight * x for name, x in gradient().items()}
    m, s = 0.4, np.exp(0.2)
    entropy = 0.2 + 0.5 * np.log(2 * np.pi * np.e)
    wanted = {"loss": entropy + 0.5 * ((2 - m) ** 2 + s**2) + 0.5 * np.log(2 * np.pi), "m": m - 2, "s": 1 + s**2}
    assert_same({"loss": loss, **found}, wanted)


def test_particles_together_stay_together():
    """Particles that run together are no reason to run them one by one, and each has its own draw."""
    case = local()
    fresh(case)
    model, guide = case.build(None)
    drawn = []

    def noted():
        trace = poutine.trace(model).get_trace()
        drawn.append(trace.nodes["z"]["value"].shape)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", FOUND)
        elbo = made(DisARM(), 3, True)()
        for _ in range(3):
            elbo.loss_and_grads(noted, guide)
    assert drawn[0] == (3, 3)


def test_bounds_weigh_it_as_a_prior():
    """At fixed draws of the guide's a bound of two particles is log-mean-exp of their costs, those of the model's draws among them."""
    pyro.param("m", torch.tensor(0.4))
    pyro.param("s", torch.tensor(0.2))

    def model():
        z = pyro.sample("z", dist.Normal(p("m"), p("s").exp()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    pyro.set_rng_seed(5)
    loss = TraceGrad_ELBO(2, objective=IWAE()).loss_and_grads(model, lambda: None)
    found = gradient()
    pyro.set_rng_seed(5)
    logs = torch.stack([poutine.trace(model).get_trace().log_prob_sum() for _ in range(2)])
    wanted = np.log(2) - logs.logsumexp(0)
    wanted.backward()
    assert_same({"loss": np.array(loss), **found}, {"loss": wanted.detach().numpy(), **gradient()})


@pytest.mark.slow
def test_training_and_checks():
    case = local()
    fresh(case)
    model, guide = case.build(None)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceGrad_ELBO())
    assert all(np.isfinite(svi.step()) for _ in range(5))
    assert check_gradients(model, guide, draws=200, warm_up=0, tolerance=0.5).status != "biased"


@pytest.mark.slow
def test_a_compiled_step_is_an_eager_one():
    assert_like_eager(local())
    assert_like_eager(local(lambda *noise: dist.Normal))  # Its draws are new ones in each step.


def of(law, read=lambda z: z, **infer):
    def model():
        z = pyro.sample("z", law(), infer=infer)
        pyro.sample("x", dist.Normal(read(z).to(torch.get_default_dtype()), 1.0), obs=torch.tensor(0.3))

    return model


def given_a_sum():
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    z = pyro.sample("z", dist.Normal(k, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))


REFUSED = {
    "discrete": (of(lambda: dist.Bernoulli(0.5)), "'z' is in the model but not in the guide.*sum it out.*enumerate"),
    "sequential": (of(lambda: dist.Bernoulli(0.5), enumerate="sequential"), "'z' is in the model but not in the guide"),
    "a count": (of(lambda: dist.Poisson(p("m").exp())), "'z' is in the model but not in the guide"),
    "no rsample": (
        of(lambda: dist.VonMises(p("m"), 1.0)),
        "'z' is in the model but not in the guide.*draw it in the guide",
    ),
    "a step": (
        of(lambda: dist.Normal(p("m"), 1.0), lambda z: (z > 0).double()),
        "'z' is drawn in the model alone.*'x' depends.*no derivative",
    ),
    "no gradient": (
        of(lambda: dist.Normal(p("m"), 1.0), lambda z: z.detach() ** 2),
        "'z' is drawn in the model alone.*'x' depends",
    ),
    "given a sum": (given_a_sum, "'z' is drawn in the model alone, given a site that is summed out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_biased_is_refused(name):
    model, words = REFUSED[name]
    pyro.param("m", torch.tensor(0.4))
    with pytest.raises(PplgradError, match=words):
        TraceGrad_ELBO(max_plate_nesting=0).loss_and_grads(model, lambda: None)


def test_a_draw_without_a_parameter_may_be_compared():
    """Where no gradient goes through a draw, none can be lost."""
    a = pyro.param("a", torch.tensor(0.3))

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal((z > 0).double() + b, 1.0), obs=torch.tensor(0.3))

    TraceGrad_ELBO().loss_and_grads(model, lambda: pyro.sample("b", dist.Bernoulli(logits=a)))
    assert np.isfinite(gradient()["a"])


def what_it_read_is_forgotten(monkeypatch):
    plain = Provenance.tag
    monkeypatch.setattr(Provenance, "tag", lambda self, *args, made=False, **given: plain(self, *args, **given))


def without_its_density(monkeypatch):
    plain = particle_trace.cost_of
    monkeypatch.setattr(particle_trace, "cost_of", lambda name, *args: plain(name, *args) * (0 if name == "z" else 1))


def without_its_derivative(monkeypatch):
    plain = Provenance.tag

    def tag(self, name, value, *args, **given):
        return plain(self, name, value.detach() if given.get("made") and name == "w" else value, *args, **given)

    monkeypatch.setattr(Provenance, "tag", tag)


@pytest.mark.parametrize(
    "mutant", [what_it_read_is_forgotten, without_its_density, without_its_derivative], ids=lambda x: x.__name__
)
def test_mutant_is_caught(mutant, monkeypatch):
    case = local()
    wanted = exact_gradient(case)
    mutant(monkeypatch)
    assert worst(expected_gradient(case, made(ScoreFunction()), 1), wanted) > 1e-6
