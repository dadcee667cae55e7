"""Mixtures as guides: the expected gradient is that of the bound by quadrature, in both libraries, and what is refused."""

import inspect
import itertools
import textwrap
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from scipy.special import ndtr

from pplgrad import (
    IWAE,
    Auto,
    DReG,
    Enumerate,
    EstimatorError,
    ImplicitReparam,
    LocalExpectation,
    Reparam,
    ScoreFunction,
    StratifiedMixture,
)
from pplgrad.core.draw import Draw
from pplgrad.core.mixtures import Mixture
from pplgrad.estimators import mixtures
from pplgrad.estimators.mixtures import StratifiedMixture as Stratified
from pplgrad.numpyro import TraceGrad_ELBO as NumPyroELBO
from pplgrad.numpyro._array_ops import OPS as in_jax
from pplgrad.numpyro._mixtures import mixture as in_numpyro_mixture
from pplgrad.pyro import TraceGrad_ELBO as PyroELBO
from pplgrad.pyro._array_ops import OPS as in_torch
from pplgrad.pyro._mixtures import mixture as in_pyro_mixture
from pplgrad.pyro._rerun import interventions
from pplgrad.testing import in_numpyro, in_pyro
from tests.deciding import by_complex_steps
from tests.mixing import HOSTS, LOG_DENSITIES, Family, Program

LIBRARIES = ["pyro", "numpyro"]
DRAW = StratifiedMixture(paths="draw")
BOTH = [DRAW, StratifiedMixture(), ImplicitReparam()]
PROGRAMS = {
    "numbers": dict(step=0.08),
    "logistic": dict(law="Logistic"),
    "gumbel": dict(law="Gumbel"),
    "positive": dict(of_log=True, step=0.08),
    "vectors": dict(dims=2, components=2, step=0.13),
    "positive vectors": dict(dims=2, of_log=True, components=2, step=0.13),
    "correlated": dict(dims=2, components=2, correlated=True, step=0.13),
    "elements": dict(elements=2, components=2, step=0.1),
    "minibatch": dict(components=2, step=0.1, of=3),
    "one component": dict(components=1, step=0.1),
    "kinks": dict(law="Laplace"),
}


def fits(name, estimator):
    """Return whether the expectation is that of a smooth integrand, or the estimator takes the site."""
    return not (
        name == "correlated" and estimator == ImplicitReparam() or name == "kinks" and estimator != ImplicitReparam()
    )


# The mathematics is the same in both libraries, and NumPyro compiles each program for a second or two.
IN_BOTH = ("numbers", "vectors", "correlated", "elements", "minibatch")


def cases():
    """Return libraries, programs and estimators."""
    for library, name, estimator in itertools.product(LIBRARIES, PROGRAMS, BOTH):
        if fits(name, estimator):
            marks = [pytest.mark.exhaustive] if library == "numpyro" and name not in IN_BOTH else []
            yield pytest.param(library, name, estimator, marks=marks, id=f"{library}-{name}-{estimator!r}")


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "estimator"), list(cases()))
def test_exact(library, name, estimator):
    assert Program(**PROGRAMS[name]).error(library, estimator) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("estimator", BOTH, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_importance_weighted_exact(library, estimator):
    program = Program(components=2, particles=2, step=0.08)
    assert program.error(library, estimator, objective=IWAE()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_branches_in_chunks_are_those_one_by_one(library):
    program = Program(elements=2, components=2, step=0.8)
    found = program.expected(library, StratifiedMixture())
    other = program.expected(library, StratifiedMixture(), vectorize_particles=True, max_parallel=1)
    for name, x in found.items():
        np.testing.assert_allclose(x, other[name], atol=1e-12)


def rewritten(monkeypatch, owner, method, old, new):
    """Replace a part of a method's source."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
    assert source.count(old) == 1
    space = dict(vars(inspect.getmodule(owner)))
    exec(source.replace(old, new), space)
    monkeypatch.setattr(owner, method, space[method])


MUTANTS = {
    "weights without gradient": (ImplicitReparam(), "numbers", Mixture, "moved_by_weights", "step = -step", "step = 0 * step"),
    "no density below": (
        ImplicitReparam(), "numbers", Mixture, "moved_by_weights", "* xp.exp(-xp.clip(density, min=tiny))", ""
    ),
    "weights are not conditional": (
        ImplicitReparam(), "vectors", Mixture, "moved_by_weights", "weights + logs[..., d] +", "weights +"
    ),
    "entries before do not move": (
        ImplicitReparam(), "vectors", Mixture, "moved_by_weights", " + slopes[..., d] * step", ""
    ),
    "only the largest component moves": (
        DRAW, "numbers", Mixture, "moved_by_components", "ops.xp.exp(log_r)",
        "ops.xp.exp(log_r) * (log_r == ops.xp.max(log_r, axis=-1, keepdims=True))",
    ),
    "prior weights in place of responsibilities": (
        DRAW, "numbers", Mixture, "log_responsibilities",
        "return found - log_sum(ops, found)", "return ops.stop_gradient(self.log_weights)",
    ),
    "no Jacobian of the exponential": (
        ImplicitReparam(), "positive", Mixture, "moved_by_weights", "found * self.value if", "found if"
    ),
    "components are not weighted": (
        StratifiedMixture(), "numbers", Stratified, "branch_surrogate", "xp.exp(strata.log_weights) *", "strata.log_weights *"
    ),
    "noise of another component": (
        StratifiedMixture(), "numbers", mixtures, "_noise_of_all", "_of_component(xp, z, own, ", "_of_component(xp, z, 0 * own, "
    ),
    "weights of a minibatch are not scaled": (
        StratifiedMixture(), "minibatch", Stratified, "branch_surrogate", "found = xp.sum(", "found = xp.sum((1 / 3) * "
    ),
    "elements take other values at once": (
        StratifiedMixture(), "elements", Draw, "changed_one_by_one", "xp.where(here, taken", "xp.where(here | True, taken"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    estimator, program, *change = MUTANTS[name]
    rewritten(monkeypatch, *change)
    assert not Program(**PROGRAMS[program]).error("pyro", estimator) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("at_b", [Enumerate(), ScoreFunction(), LocalExpectation()], ids=["sum", "score", "local"])
@pytest.mark.parametrize("estimator", BOTH, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_between_a_parent_and_a_child(library, estimator, at_b):
    estimators = {"b": at_b, "x": estimator, "z": ScoreFunction()}
    assert Family().z_score(library, estimators) < 4.5


def test_a_sum_whose_rows_do_not_move_is_caught(monkeypatch):
    """What follows a summed site is drawn again in its rows, with its gradient."""
    monkeypatch.setattr(interventions, "MixturePath", type(None))
    assert Family().z_score("pyro", {"b": Enumerate(), "x": StratifiedMixture(), "z": ScoreFunction()}) > 6


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_tails_are_finite_and_exact(library):
    """Far out in float32, on both sides: ∂x/∂a of 1/2 N(0, 1) + 1/2 N(0, 2) along the logit of the first."""
    for x in (0.5, 8.0, 20.0):
        density = (np.exp(-(x**2) / 2) + np.exp(-(x**2) / 8) / 2) / (2 * np.pi) ** 0.5 / 2
        wanted = (ndtr(-x / 2) - ndtr(-x)) / 4 / density
        assert _slope_of_weights(library, -x) == pytest.approx(wanted, rel=1e-4)
        assert _slope_of_weights(library, x) == pytest.approx(-wanted, rel=1e-4)
    assert np.isfinite([_slope_of_weights(library, x) for x in (-1e4, -30.0, 30.0, 1e4)]).all()


def _slope_of_weights(library, x):
    if library == "pyro":
        a = torch.zeros(2, requires_grad=True)
        components = pyro_dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0]))
        fn = pyro_dist.MixtureSameFamily(pyro_dist.Categorical(logits=a), components)
        ImplicitReparam().moved(in_torch, in_pyro_mixture(fn, torch.tensor(x))).backward()
        return a.grad[0].item()

    def value(a):
        components = numpyro_dist.Normal(jnp.zeros(2, a.dtype), jnp.array([1.0, 2.0], a.dtype))
        fn = numpyro_dist.MixtureSameFamily(numpyro_dist.Categorical(logits=a), components)
        return ImplicitReparam().moved(in_jax, in_numpyro_mixture(fn, jnp.asarray(x, a.dtype)))

    return float(jax.grad(value)(jnp.zeros(2, jnp.float32))[0])


def mixed(h, n=2, event=0, of="Normal"):
    """Return a mixture of a host with n components."""
    ones = h.array(np.ones((n, 2) if event else n))
    components = getattr(h.dist, of)(ones, ones)
    return h.dist.MixtureSameFamily(h.dist.Categorical(logits=h.array(np.zeros(n))), components.to_event(event))


def described(library, law, estimator=None, particles=1, **options):
    """Return the estimator, the number of evaluations and the reason at a site of a law."""
    host = HOSTS[library]
    with host.isolated():

        def program():
            host.HOST.sample("x", law(host.HOST))

        given = {"estimators": None if estimator is None else {"x": estimator}, **options}
        if library == "pyro":
            pyro.clear_param_store()
            return PyroELBO(particles, **given).describe(program, program).rows[0]
        return NumPyroELBO(particles, **given).describe(jax.random.key(0), {}, program, program).rows[0]


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_auto_and_the_default_choose(library):
    auto = described(library, mixed, Auto())
    assert (auto["estimator"], auto["evaluations"]) == ("StratifiedMixture()", 1)
    assert auto["reason"] == "Auto: 1 evaluation for all components, within the budget of 2"
    default = described(library, mixed, particles=2)
    assert (default["estimator"], default["baseline"]) == ("ScoreFunction()", "LeaveOneOut()")
    if library == "numpyro":
        return  # Each description compiles the program anew.
    assert described(library, lambda h: mixed(h, 4), Auto())["estimator"] == "ScoreFunction(samples=3)"
    assert described(library, lambda h: mixed(h, of="StudentT"), Auto())["estimator"] == "ScoreFunction(samples=3)"
    two = described(library, lambda h: mixed(h, 3, 1), StratifiedMixture())
    assert two["evaluations"] == 2


REFUSED = {
    "no mixture": (StratifiedMixture(), lambda h: h.dist.Normal(0.0, 1.0), "Normal is no mixture of .* Reparam"),
    "discrete": (ImplicitReparam(), lambda h: h.dist.Categorical(h.array(np.ones(3) / 3)), "no mixture"),
    "other components": (StratifiedMixture(), lambda h: mixed(h, of="StudentT"), "no mixture of .* ScoreFunction"),
    "correlated": (
        ImplicitReparam(),
        lambda h: h.dist.MixtureSameFamily(
            h.dist.Categorical(logits=h.array(np.zeros(2))),
            h.dist.MultivariateNormal(h.array(np.zeros((2, 2))), h.array(np.eye(2))),
        ),
        "correlated .* use StratifiedMixture",
    ),
    "other law of NumPyro's": (
        StratifiedMixture(),
        lambda h: h.dist.Beta(h.array(1.0), h.array(1.0)),
        "no mixture of .* Reparam",
    ),
    "Reparam": (Reparam(), mixed, "no reparameterized sampler; .*ImplicitReparam.*StratifiedMixture"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("library", LIBRARIES)
def test_refused(library, why):
    estimator, law, words = REFUSED[why]
    with pytest.raises(EstimatorError, match=f"'x'.*{words}"):
        described(library, law, estimator)


@pytest.mark.parametrize("estimator", BOTH, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_cost_that_only_jumps_is_refused(library, estimator):
    host = HOSTS[library]
    h = host.HOST

    def guide():
        a = h.param("a", h.array([0.1, 0.2]))
        h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a), h.dist.Normal(a, 1.0)))

    def model():
        x = h.sample("x", h.dist.Normal(0.0, 1.0))
        h.sample("y", h.dist.Normal(h.xp.floor(x), 1.0), obs=h.array(0.3))

    with host.isolated(), pytest.raises(EstimatorError, match="'x' takes the derivative along the draw.*ScoreFunction"):
        one_step(library, guide, model, estimator)


def one_step(library, guide, model, estimators, **options):
    """Return the gradient of a step, by parameter; NumPyro's parameters are those that the programs start with."""
    estimators = estimators if isinstance(estimators, dict) else {"x": estimators}
    if library == "pyro":
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        PyroELBO(estimators=estimators, **options).loss_and_grads(model, guide)
        return in_pyro.gradient()
    with numpyro.handlers.trace() as sites, numpyro.handlers.seed(rng_seed=0):
        guide()
    params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
    objective = NumPyroELBO(estimators=estimators, **options)
    return jax.jit(jax.grad(lambda p: objective.loss(jax.random.key(0), p, model, guide)))(params)


def in_a_plate(h, mask=None, rows=3):
    """Return model and guide with three draws in a plate, some masked, or a minibatch of fewer rows."""
    data = h.array([0.3, -0.5, 0.8])

    def laws(side):
        with h.plate("data", 3, subsample_size=rows) as index, nullcontext() if mask is None else h.mask(mask):
            side(index)

    def guide():
        a, m = h.param("a", h.array([[0.1, 0.2]] * 3)), h.param("m", h.array([[0.5, -0.6]] * 3))

        def side(index):
            h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a[index]), h.dist.Normal(m[index], 1.0)))

        laws(side)

    def model():
        def side(index):
            x = h.sample("x", h.dist.Normal(0.0, 1.0))
            h.sample("y", h.dist.Normal(x, 1.0), obs=data[index])

        laws(side)

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("estimator", BOTH, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_masked_elements_have_no_gradient_and_the_others_their_own(library, estimator):
    host = HOSTS[library]
    with host.isolated():
        found = []
        for mask in (None, np.array([True, False, True])):
            model, guide = in_a_plate(host.HOST, mask)
            found.append(one_step(library, guide, model, estimator))
        for name, whole in found[0].items():
            kept = np.asarray(whole) * np.array([[1.0], [0.0], [1.0]])
            np.testing.assert_allclose(np.asarray(found[1][name]), kept, atol=1e-12)
            assert np.all(np.abs(kept[::2]) > 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", BOTH, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_row_of_a_minibatch_alone_has_a_gradient(library, estimator):
    """The one row of a minibatch has a gradient, and the others have none."""
    host = HOSTS[library]
    with host.isolated():
        model, guide = in_a_plate(host.HOST, rows=1)
        found = one_step(library, guide, model, estimator)
        moved = np.abs(np.asarray(found["m"])).max(-1) > 0
        assert moved.sum() == 1


@pytest.mark.parametrize("estimator", BOTH, ids=str)
def test_compiled_as_eager(estimator):
    with in_pyro.isolated():
        model, guide = in_a_plate(in_pyro.HOST)
        found = []
        for options in ({}, {"compile": {"backend": "eager"}}):
            pyro.clear_param_store()
            elbo = PyroELBO(3, vectorize_particles=True, max_plate_nesting=1, estimators={"x": estimator}, **options)
            for seed in range(3):
                pyro.set_rng_seed(seed)
                elbo.loss_and_grads(model, guide)
                found.append(in_pyro.gradient())
        for one, other in zip(found[:3], found[3:], strict=True):
            in_pyro.assert_same(one, other, 1e-12)


def test_doubly_reparameterized_parents_are_refused():
    """The mean over what follows DReG is differentiated, and the weights of a stratified mixture have no score there."""

    def guide():
        x = pyro.sample("w", pyro_dist.Normal(pyro.param("l", torch.tensor(0.1)), 1.0))
        a = torch.stack([x, -x])
        pyro.sample("x", pyro_dist.MixtureSameFamily(pyro_dist.Categorical(logits=a), pyro_dist.Normal(a, 1.0)))

    def model():
        w = pyro.sample("w", pyro_dist.Normal(0.0, 1.0))
        pyro.sample("x", pyro_dist.Normal(w, 1.0))

    options = {"num_particles": 2, "objective": IWAE()}
    with pytest.raises(EstimatorError, match="'x' follows site 'w'.*ScoreFunction"):
        one_step("pyro", guide, model, {"w": DReG(), "x": StratifiedMixture()}, **options)
    assert "l" in one_step("pyro", guide, model, {"w": DReG(), "x": ImplicitReparam()}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", BOTH, ids=str)
def test_components_of_several_families(estimator):
    """Components of a family each have noise of their own in branches."""
    start = {"a": np.array([0.3, -0.2]), "m": np.array([-0.7, 0.9]), "s": np.array([-0.2, 0.3])}

    def guide():
        a, m, s = (numpyro.param(name, start[name]) for name in "ams")
        with numpyro.plate("draws", 8_000):
            parts = [
                numpyro_dist.Normal(m[..., 0], jnp.exp(s[..., 0])),
                numpyro_dist.Logistic(m[..., 1], jnp.exp(s[..., 1])),
            ]
            numpyro.sample("x", numpyro_dist.MixtureGeneral(numpyro_dist.Categorical(logits=a), parts))

    def model():
        with numpyro.plate("draws", 8_000):
            x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.5))
            numpyro.sample("y", numpyro_dist.Normal(jnp.sin(x), 0.8), obs=0.4)

    def loss(p):
        normal = LOG_DENSITIES["Normal"]
        x = np.linspace(-60, 60, 6001)
        weights = np.full_like(x, x[1] - x[0])
        z = (x[:, None] - p["m"]) / np.exp(p["s"])
        each = np.stack([normal(z[:, 0]), LOG_DENSITIES["Logistic"](z[:, 1])], -1) - p["s"]
        log_q = np.log(np.exp(each + p["a"] - np.log(np.exp(p["a"]).sum())).sum(-1))
        log_p = normal(x / 1.5) - np.log(1.5) + normal((0.4 - np.sin(x)) / 0.8) - np.log(0.8)
        return np.sum(weights * np.exp(log_q) * (log_q - log_p))

    with in_numpyro.isolated():
        copies = {name: jnp.broadcast_to(x, (8_000, 2)) for name, x in start.items()}
        objective = NumPyroELBO(estimators={"x": estimator})
        found = jax.jit(jax.grad(lambda p: objective.loss(jax.random.key(0), p, model, guide)))(copies)
    for name, exact in by_complex_steps(loss, start).items():
        x = np.asarray(found[name])
        assert np.abs((x.mean(0) - exact) / (x.std(0) / len(x) ** 0.5)).max() < 4.5
