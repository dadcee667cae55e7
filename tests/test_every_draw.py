"""`differentiate="all"`: the costs are differentiated at every draw that an estimator evaluates, in both libraries."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch

import pplgrad as pg
from pplgrad.diagnostics.code import code
from pplgrad.numpyro import TraceGrad_ELBO as NumPyroELBO
from pplgrad.pyro import TraceGrad_ELBO as PyroELBO
from pplgrad.testing import in_numpyro, in_pyro
from pplgrad.testing.programs import CASES, Case, bernoulli, case, values

HOSTS = {"pyro": in_pyro, "numpyro": in_numpyro}
MORE: dict[str, Case] = {}
ALL = partial(pg.DisARM, differentiate="all")
CHOICES = {
    "disarm": ALL(),
    "samples": pg.ScoreFunction(samples=2, differentiate="all"),
    "stick": pg.StickBreakingDisARM(differentiate="all"),
}


@case({"z": ((), 2), "w": ((2,), 2)}, {"a": (5,), "b": (3,)}, into=MORE)
def learned_scale(h):
    """The guide's densities count as much as a parameter says, which is learned with them."""

    def model():
        b = values("learned_scale", h)["b"]
        z = h.sample("z", bernoulli(h, b[0]))
        with h.plate("data", 2):
            w = h.sample("w", bernoulli(h, b[1] * z))
            h.sample("x", h.dist.Normal(b[2] * w * (1 + z), 1.0), obs=h.array([0.3, -0.6]))

    def guide():
        a = values("learned_scale", h)["a"]
        with h.scale(h.xp.exp(a[3])):
            z = h.sample("z", bernoulli(h, a[0]))
        with h.plate("data", 2), h.scale(h.xp.exp(a[4] * z)):
            h.sample("w", bernoulli(h, a[1:3] + 0.4 * z))

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("short", CHOICES)
@pytest.mark.parametrize("library", HOSTS)
def test_exact_where_a_scale_is_learned(library, short):
    host = HOSTS[library]
    with host.isolated():
        assert host.gradient_error(MORE["learned_scale"], CHOICES[short], 1, False) < 1e-9


@pytest.mark.parametrize("library", HOSTS)
def test_exact_with_another_estimator_beside(library):
    """One site is differentiated at all draws, the other at its own."""
    host = HOSTS[library]
    with host.isolated():
        case = CASES["hierarchy"]
        first, *rest = case.latents
        mapping = {first: ALL(), **dict.fromkeys(rest, pg.LocalExpectation())}
        if library == "pyro":
            found = host.expected_gradient_over_cells(case, lambda: PyroELBO(estimators=mapping))
        else:
            found = host.expected_gradient_over_cells(case, NumPyroELBO(estimators=mapping), 1)
        assert host.worst(found, host.exact_gradient(case)) < 1e-9


def model_gradient(library, z, estimator=None, seed=0):
    """Return the derivative of the loss along a parameter of the model: at a value of z, or as an estimator has it."""
    chosen = {"z": estimator or pg.ScoreFunction()}
    if library == "pyro":
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)

        def guide():
            given = {} if z is None else {"obs": torch.tensor(float(z), dtype=torch.float64)}
            pyro.sample("z", pyro.distributions.Bernoulli(torch.tensor(0.4, dtype=torch.float64)), infer={}, **given)

        def model():
            b = pyro.param("b", torch.tensor(0.7, dtype=torch.float64))
            drawn = pyro.sample("z", pyro.distributions.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            pyro.sample("x", pyro.distributions.Normal(b * (1 + drawn), 1.0), obs=torch.tensor(0.5))

        if z is not None:
            held = pyro.poutine.condition(model, {"z": torch.tensor(float(z), dtype=torch.float64)})
            pyro.infer.Trace_ELBO().loss_and_grads(held, lambda: None)
        else:
            PyroELBO(estimators=chosen).loss_and_grads(model, guide)
        return float(pyro.param("b").grad)

    def loss(b):
        def model():
            drawn = numpyro.sample("z", numpyro.distributions.Bernoulli(jnp.asarray(0.3)))
            numpyro.sample("x", numpyro.distributions.Normal(b * (1 + drawn), 1.0), obs=0.5)

        def guide():
            numpyro.sample("z", numpyro.distributions.Bernoulli(jnp.asarray(0.4)))

        if z is not None:
            return numpyro.infer.Trace_ELBO().loss(
                jax.random.key(0), {}, numpyro.handlers.condition(model, {"z": z}), lambda: None
            )
        return NumPyroELBO(estimators=chosen).loss(jax.random.key(seed), {}, model, guide)

    return float(jax.grad(loss)(0.7))


@pytest.mark.slow
@pytest.mark.parametrize("short", ["disarm", "samples"])
@pytest.mark.parametrize("library", HOSTS)
def test_the_gradient_is_the_mean_of_those_at_the_draws(library, short):
    """A parameter of the model has the mean of its derivatives at 0 and at 1 wherever the two draws differ."""
    with HOSTS[library].isolated():
        at = [model_gradient(library, z) for z in (0, 1)]
        mean = sum(at) / 2
        found = [model_gradient(library, None, CHOICES[short], seed) for seed in range(20)]
        own = [model_gradient(library, None, replace(CHOICES[short], differentiate="own"), seed) for seed in range(20)]
    which = [int(np.argmin([abs(x - y) for y in (*at, mean)])) for x in found]
    np.testing.assert_allclose(found, [(*at, mean)[i] for i in which], rtol=1e-5)
    assert which.count(2) >= 5
    assert not any(np.isclose(x, mean, rtol=1e-5) for x in own)


@pytest.mark.parametrize(
    ("beside", "settings", "words"),
    [
        (pg.ScoreFunction(), {"num_particles": 2, "objective": pg.IWAE()}, "combines several particles"),
        (pg.Enumerate(), {}, r"site 'z2' is under Enumerate\(\)"),
    ],
    ids=["bound", "sum"],
)
@pytest.mark.parametrize("library", HOSTS)
def test_what_it_cannot_do_is_refused(library, beside, settings, words):
    host, chosen = HOSTS[library], CASES["hierarchy"]
    given = {"estimators": {"z1": ALL(), "z2": beside}, **settings}
    with host.isolated(), pytest.raises(pg.EstimatorError, match=f"site 'z1' .*{words}.*differentiate='own' at 'z1'"):
        model, guide = chosen.build(host.HOST)
        if library == "pyro":
            host.fresh(chosen)
            PyroELBO(**given).loss_and_grads(model, guide)
        else:
            NumPyroELBO(**given).loss(jax.random.key(0), host.parameters(chosen), model, guide)


@pytest.mark.parametrize(
    "kind",
    [
        pg.ARM,
        pg.DisARM,
        pg.ARMS,
        pg.CARMS,
        pg.TreeDisARM,
        pg.StickBreakingDisARM,
        pg.DoubleCV,
        pg.RODEO,
        pg.ScoreFunction,
    ],
)
def test_the_choice_is_one_of_two(kind):
    with pytest.raises(pg.ConfigurationError, match=r"differentiate='each'.*'own', or 'all'"):
        kind(differentiate="each")
    assert "differentiate" not in repr(kind())
    given = {"samples": 2} if kind is pg.ScoreFunction else {}
    chosen = kind(differentiate="all", **given)
    assert repr(chosen).endswith("differentiate='all')") and eval(repr(chosen), vars(pg)) == chosen != kind(**given)
    assert all(eval(code(x), vars(pg)) == x for x in (chosen, kind(**given), kind()))


def test_one_draw_has_no_others():
    with pytest.raises(pg.ConfigurationError, match="one draw.*samples=2"):
        pg.ScoreFunction(differentiate="all")


def deciding(library, estimator, how):
    """Return the gradient of a program in which z decides the scale of y, by Python's `if` or by arithmetic, or whether there is a site x."""
    if library == "pyro":
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        dist, sample, number = pyro.distributions, pyro.sample, partial(torch.tensor, dtype=torch.float64)
        param = lambda name, at: pyro.param(name, number(at))  # noqa: E731
    else:
        dist, sample, number = numpyro.distributions, numpyro.sample, jnp.asarray
        param = numpyro.param

    def guide():
        sample("z", dist.Bernoulli(logits=param("a", 0.3)))

    def model():
        b, z = param("b", 0.9), sample("z", dist.Bernoulli(number(0.4)))
        scale = 1.0 + z if how == "arithmetic" else 2.0 if z > 0 else 1.0
        sample("y", dist.Normal(b, scale), obs=number(0.3))
        if how == "site" and z > 0:
            sample("x", dist.Normal(b, 1.0), obs=number(0.3))

    if library == "pyro":
        PyroELBO(estimators={"z": estimator}).loss_and_grads(model, guide)
        return [float(pyro.param(name).grad) for name in "ab"]
    loss = NumPyroELBO(estimators={"z": estimator}).loss
    found = jax.grad(lambda p: loss(jax.random.key(0), p, model, guide))({"a": jnp.array(0.3), "b": jnp.array(0.9)})
    return [float(found[name]) for name in "ab"]


@pytest.mark.slow
@pytest.mark.parametrize("library", HOSTS)
def test_python_control_flow(library):
    """Lines that depend on the value run as they should; a site that exists or not has no derivative at the other draw."""
    with HOSTS[library].isolated():
        np.testing.assert_allclose(deciding(library, ALL(), "if"), deciding(library, ALL(), "arithmetic"), rtol=1e-6)
        with pytest.raises(pg.ProgramError, match="Site 'x' exists or not .*differentiate='own' at 'z'"):
            deciding(library, ALL(), "site")
        deciding(library, pg.DisARM(), "site")
