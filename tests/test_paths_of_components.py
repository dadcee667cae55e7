"""The paths of all components of a mixture: what is summed, what it costs, and where it is refused, in both libraries."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as numpyro_dist
import pyro
import pytest
import torch

from pplgrad import (
    ELBO,
    IWAE,
    REBAR,
    ConfigurationError,
    DReG,
    Enumerate,
    EstimatorError,
    Expectation,
    ImplicitReparam,
    LocalExpectation,
    Renyi,
    ScoreFunction,
    StratifiedMixture,
)
from pplgrad.core.draw import Draw
from pplgrad.engine import branches as engine
from pplgrad.estimators import mixtures
from pplgrad.numpyro import TraceGrad_ELBO as NumPyroELBO
from pplgrad.pyro import TraceGrad_ELBO as PyroELBO
from pplgrad.testing import in_pyro
from tests.mixing import HOSTS, Family, Followed, Pair, Program
from tests.test_mixtures import LIBRARIES, PROGRAMS, in_a_plate, one_step, rewritten

ALL, DRAW = StratifiedMixture(paths="all"), StratifiedMixture(paths="draw")


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [ALL, DRAW, ImplicitReparam()], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_exact_where_a_draw_follows(library, estimator):
    assert Followed().error(library, estimator) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [ALL, DRAW, ImplicitReparam()], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_exact_at_two_sites_that_meet(library, estimator):
    assert Pair().error(library, estimator) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_bounds_exact_with_particles_one_by_one(library):
    program = Program(components=2, particles=2, step=0.1)
    options = {"objective": IWAE(), "vectorize_particles": False}
    assert program.error(library, ALL, **options) < 1e-5
    assert program.error(library, DRAW, **options) < 1e-5


OBJECTIVES = {"weight": ELBO(kl_weight=0.3), "renyi": Renyi(0.4), "expectation": Expectation()}


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), list(product(LIBRARIES, OBJECTIVES)))
def test_all_paths_have_the_mean_of_the_path_of_the_draw(library, name):
    program = Program(components=2, particles=2 if name == "renyi" else 1, step=0.1)
    one, other = (program.expected(library, x, objective=OBJECTIVES[name]) for x in (ALL, DRAW))
    for key, x in one.items():
        np.testing.assert_allclose(x, other[key], atol=1e-6 if name == "renyi" else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_differentiated_branches_in_chunks_are_those_at_once(library):
    """Branches of nine elements with three components each, all elements of a plate that the data do not have."""
    host = HOSTS[library]
    h = host.HOST
    start = np.linspace(-1, 1, 27).reshape(9, 3)

    def guide():
        m = h.param("m", h.array(start))
        with h.plate("rows", 9, dim=-1):
            h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=-m), h.dist.Normal(m, 0.7)))

    def model():
        with h.plate("rows", 9, dim=-1):
            x = h.sample("x", h.dist.Normal(h.array(0.0), 1.0))
        h.sample("y", h.dist.Normal(h.xp.sum(h.xp.sin(x), axis=-1, keepdims=True), 1.0), obs=h.array([0.4]))

    host_options = {"max_plate_nesting": 1} if library == "pyro" else {}
    with host.isolated():
        found = [
            np.asarray(
                one_step(library, guide, model, ALL, **{"vectorize_particles": True, **host_options, **options})["m"]
            )
            for options in ({}, {"max_parallel": 7}, {"max_parallel": 1}, {"vectorize_particles": False})
        ]
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, atol=1e-12)


MUTANTS = {
    "the draw's own path counts twice": (
        "numbers", mixtures, "_along_all", "- xp.sum(terms.along_draw * paths.of_draw)", ""
    ),
    "paths are not weighted": ("numbers", mixtures, "_along_all", "xp.sum(weights * slopes", "xp.sum(slopes"),
    "the own component has another's weight": (
        "numbers", mixtures, "_along_all", "weights = xp.reshape(paths.weights,",
        "weights = xp.reshape(xp.flip(paths.weights, axis=-1),",
    ),
    "slopes at another component": (
        "numbers", mixtures, "_along_all", "others = xp.moveaxis(terms.along_points, 1, axis)",
        "others = xp.moveaxis(xp.flip(terms.along_points, axis=1), 1, axis)",
    ),
    "noise of another component": (
        "numbers", mixtures, "_noise_of_all", "_of_component(xp, z, own, ", "_of_component(xp, z, 0 * own, "
    ),
    "slopes of a minibatch are not scaled": (
        "minibatch", mixtures, "_along_all", "return xp.sum(", "return (1 / 3) * xp.sum("
    ),
    "no slope at the draw": (
        "elements", mixtures, "_along_all", "xp.expand_dims(terms.along_draw, axis=axis)", "xp.expand_dims(0 * terms.along_draw, axis=axis)"
    ),
    "elements move at once": (
        "elements", Draw, "changed_one_by_one", "xp.where(here, taken", "xp.where(here | True, taken"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    program, *change = MUTANTS[name]
    rewritten(monkeypatch, *change)
    assert not Program(**PROGRAMS[program]).error("pyro", ALL) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("at_b", [Enumerate(), ScoreFunction(), LocalExpectation()], ids=["sum", "score", "local"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_between_a_parent_and_a_child_that_moves(library, at_b):
    assert Family(smooth=True).z_score(library, {"b": at_b, "x": ALL}) < 4.5


def test_slopes_of_averages_at_a_draw_are_caught(monkeypatch):
    """What a parent sums over does not depend on the draw that follows the parent's own."""
    rewritten(
        monkeypatch,
        engine,
        "_sloped_costs",
        "drawn = run if run.drawn is None else replace(run, costs=run.drawn)",
        "drawn = run",
    )
    assert Family(smooth=True).z_score("pyro", {"b": Enumerate(), "x": ALL}) > 5


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_linear_cost_has_no_variance(library):
    """Each component's location has the gradient −π_k · slope in every step."""
    host = HOSTS[library]
    h = host.HOST

    def guide():
        a, m = h.param("a", h.array([0.3, -0.5, 0.1])), h.param("m", h.array([-1.0, 0.2, 2.0]))
        h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a), h.dist.Normal(m, 0.8)))

    def model():
        x = h.sample("x", h.dist.Normal(h.array(0.0), 1.0))
        h.factor("f", 1.7 * x)

    with host.isolated():
        found = one_step(library, guide, model, StratifiedMixture(), objective=Expectation())
    weights = np.exp([0.3, -0.5, 0.1])
    np.testing.assert_allclose(np.asarray(found["m"]), -1.7 * weights / weights.sum(), atol=1e-12)


@pytest.mark.parametrize("estimator", [ALL, REBAR()], ids=["all", "rebar"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_draw_on_which_no_cost_depends(library, estimator):
    """What is differentiated does not depend on the draw at all."""
    host = HOSTS[library]
    h = host.HOST

    def guide():
        a = h.param("a", h.array([0.3, -0.5]))
        if isinstance(estimator, REBAR):
            h.sample("x", h.dist.Bernoulli(logits=a[0]), infer={"estimator": REBAR(learn=False)})
        else:
            h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a), h.dist.Normal(a, 0.8)))

    def model():
        h.sample(
            "x",
            h.dist.Bernoulli(probs=h.array(0.5)) if isinstance(estimator, REBAR) else h.dist.Normal(h.array(0.0), 1.0),
        )
        h.factor("f", h.array(0.3))

    with host.isolated():
        given = {} if isinstance(estimator, REBAR) else {"x": estimator}
        found = one_step(library, guide, model, given, objective=Expectation())
    assert np.all(np.asarray(found.get("a", 0.0)) == 0)


def test_other_words_for_paths_are_refused():
    with pytest.raises(ConfigurationError, match='paths=.both.*"draw", "all" or "auto"'):
        StratifiedMixture(paths="both")


def scored(h):
    """Return model and guide in which a binary draw follows a mixture."""

    def guide():
        a = h.param("a", h.array([0.3, -0.5]))
        x = h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a), h.dist.Normal(a, 0.8)))
        h.sample("z", h.dist.Bernoulli(logits=x))

    def model():
        x = h.sample("x", h.dist.Normal(h.array(0.0), 1.0))
        h.sample("z", h.dist.Bernoulli(logits=0.3 * x))

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("at_z", [ScoreFunction(), LocalExpectation(), Enumerate()], ids=["score", "local", "sum"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_score_that_follows_is_refused_or_has_the_path_of_the_draw(library, at_z):
    host = HOSTS[library]
    with host.isolated():
        model, guide = scored(host.HOST)
        with pytest.raises(
            EstimatorError, match=r"'z' follows site 'x'.*paths='all'.*use StratifiedMixture\(\) at 'x'"
        ):
            one_step(library, guide, model, {"x": ALL, "z": at_z})
        found, other = (one_step(library, guide, model, {"x": x, "z": at_z}) for x in (StratifiedMixture(), DRAW))
        np.testing.assert_array_equal(np.asarray(found["a"]), np.asarray(other["a"]))


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_of_two_mixtures_the_last_has_all_paths(library):
    """A mixture under `StratifiedMixture` has branches of its own, so that the one before it takes the path of its draw."""
    host = HOSTS[library]
    h = host.HOST

    def guide():
        a = h.param("a", h.array([0.3, -0.5]))
        x = h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a), h.dist.Normal(a, 0.8)))
        h.sample("z", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a), h.dist.Normal(a + x, 0.8)))

    def model():
        x = h.sample("x", h.dist.Normal(h.array(0.0), 1.0))
        h.sample("z", h.dist.Normal(x, 1.0))

    with host.isolated():
        found, other = (
            one_step(library, guide, model, {"x": x, "z": z}) for x, z in ((StratifiedMixture(),) * 2, (DRAW, ALL))
        )
        np.testing.assert_array_equal(np.asarray(found["a"]), np.asarray(other["a"]))
        with pytest.raises(EstimatorError, match="'z' follows site 'x'"):
            one_step(library, guide, model, {"x": ALL, "z": DRAW})
        assert np.all(np.isfinite(np.asarray(one_step(library, guide, model, {"x": ALL, "z": ImplicitReparam()})["a"])))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_cost_that_only_jumps_is_refused_with_all_paths(library):
    host = HOSTS[library]
    h = host.HOST

    def guide():
        a = h.param("a", h.array([0.1, 0.2]))
        h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a), h.dist.Normal(a, 1.0)))

    def model():
        x = h.sample("x", h.dist.Normal(h.array(0.0), 1.0))
        h.sample("y", h.dist.Normal(h.xp.floor(x), 1.0), obs=h.array(0.3))

    with host.isolated(), pytest.raises(EstimatorError, match="'x' takes the derivative along the draw.*ScoreFunction"):
        one_step(library, guide, model, ALL)


@pytest.mark.slow
def test_control_flow_in_numpyro_has_the_path_of_the_draw():
    def guide():
        a = numpyro.param("a", jnp.array([0.1, 0.2]))
        numpyro.sample(
            "x", numpyro_dist.MixtureSameFamily(numpyro_dist.Categorical(logits=a), numpyro_dist.Normal(a, 1.0))
        )

    def model():
        x = numpyro.sample("x", numpyro_dist.Normal(0.0, 1.0))
        numpyro.sample("y", numpyro_dist.Normal(x if x > 0 else 0.5 * x, 1.0), obs=0.3)

    def gradient(estimator):
        elbo, start = NumPyroELBO(estimators={"x": estimator}), {"a": jnp.array([0.1, 0.2])}
        return jax.grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(start)["a"]

    with pytest.raises(EstimatorError, match=r"'x'.*differentiates the program.*use StratifiedMixture\(\) there"):
        gradient(ALL)
    np.testing.assert_array_equal(gradient(StratifiedMixture()), gradient(DRAW))


def test_doubly_reparameterized_parents_are_refused():
    def guide():
        w = pyro.sample("w", pyro.distributions.Normal(pyro.param("l", torch.tensor(0.1)), 1.0))
        a = torch.stack([w, -w])
        pyro.sample(
            "x",
            pyro.distributions.MixtureSameFamily(
                pyro.distributions.Categorical(logits=a), pyro.distributions.Normal(a, 1.0)
            ),
        )

    def model():
        w = pyro.sample("w", pyro.distributions.Normal(0.0, 1.0))
        pyro.sample("x", pyro.distributions.Normal(w, 1.0))

    with pytest.raises(EstimatorError, match="'x' follows site 'w'"):
        one_step("pyro", guide, model, {"w": DReG(), "x": ALL}, num_particles=2, objective=IWAE())


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ELBO(), IWAE()], ids=str)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled_as_eager(backend, objective):
    with in_pyro.isolated():
        model, guide = in_a_plate(in_pyro.HOST)
        found = []
        for options in ({}, {"compile": {"backend": backend}}):
            pyro.clear_param_store()
            elbo = PyroELBO(
                3, vectorize_particles=True, max_plate_nesting=1, estimators={"x": ALL}, objective=objective, **options
            )
            for seed in range(4):
                pyro.set_rng_seed(seed)
                elbo.loss_and_grads(model, guide)
                found.append(in_pyro.gradient())
        for one, other in zip(found[:4], found[4:], strict=True):
            if backend == "eager":
                in_pyro.assert_same(one, other, 1e-12)
            else:
                assert one.keys() == other.keys() and all(np.isfinite(x).all() for x in other.values())
