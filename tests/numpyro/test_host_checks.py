"""What NumPyro's own ELBOs accept and refuse, this one does: programs without a site, shapes, plates, warnings."""

import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO

from pplgrad import (
    ELBO,
    IWAE,
    RELAX,
    RODEO,
    BaselineError,
    EstimatorError,
    Expectation,
    FunctionBaseline,
    ImpossibleValueError,
    NeuralBaseline,
    PplgradError,
    ProgramError,
    Renyi,
    ScoreFunction,
)
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators


def nothing():
    pass


def observed():
    numpyro.sample("x", dist.Normal(numpyro.param("m", jnp.array(0.5)), 1.0), obs=jnp.array(1.0))


@pytest.mark.grid
@pytest.mark.parametrize("objective", [ELBO(), Expectation(), IWAE(), Renyi(0.5)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
def test_a_program_without_a_site_has_loss_0(objective, particles, vectorized):
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, objective=objective)
    for guide in (nothing, config_estimators(nothing, {})):
        result = SVI(nothing, guide, numpyro.optim.Adam(0.1), elbo).run(jax.random.key(0), 3, progress_bar=False)
        assert (result.losses == 0).all()
        assert elbo.describe(jax.random.key(0), {}, nothing, guide).rows == []
        elbo.diagnose(jax.random.key(0), {}, nothing, guide)


@pytest.mark.grid
@pytest.mark.parametrize("objective", [ELBO(), Expectation(), IWAE(), Renyi(0.5)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
def test_a_guide_without_a_site_has_the_loss_of_the_data(objective, particles, vectorized):
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, objective=objective)
    run = jax.value_and_grad(lambda params: elbo.loss(jax.random.key(0), params, observed, nothing))
    loss, gradient = run({"m": jnp.array(0.5)})
    assert loss == pytest.approx(-dist.Normal(0.5, 1.0).log_prob(1.0), rel=1e-5)
    assert gradient["m"] == pytest.approx(-0.5)


def at(shape, events):
    def program():
        numpyro.sample("x", dist.Normal(jnp.zeros(shape), 1.0).to_event(events))

    return program


def plain_z():
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.array(0.5))))


REFUSED = {
    "events": (at((2,), 1), at((2, 1), 2), "event_dims disagree at site 'x'"),
    "shapes": (at((1, 2), 2), at((2, 1), 2), "shapes disagree at site 'x'"),
    "batches": (at((2,), 1), at((3, 2), 1), "shapes disagree at site 'x'"),
}


@pytest.mark.grid
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("particles", [1, 2])
def test_a_guide_of_another_shape_is_refused(case, particles):
    model, guide, message = REFUSED[case]
    with pytest.raises(ProgramError, match=message):
        TraceGrad_ELBO(particles).loss(jax.random.key(0), {}, model, guide)


def test_a_plate_of_the_guide_that_the_model_has_not_is_warned_of():
    def guide():
        with numpyro.plate("p", 2):
            pass
        plain_z()

    with pytest.warns(UserWarning, match="Found plate statements in guide but not model"):
        TraceGrad_ELBO().loss(jax.random.key(0), {}, lambda: numpyro.sample("z", dist.Bernoulli(0.5)), guide)


@pytest.mark.grid
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
def test_mutable_state_of_several_particles_is_warned_of(particles, vectorized):
    def model():
        count = numpyro.primitives.mutable("count", {"n": jnp.zeros(())})
        count["n"] = count["n"] + 1
        numpyro.sample("z", dist.Bernoulli(0.5))

    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized)
    svi = SVI(model, config_estimators(plain_z), numpyro.optim.Adam(0.1), elbo)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        svi.run(jax.random.key(0), 2, progress_bar=False)
    assert any("mutable state ('count')" in str(x.message) for x in seen) == (particles > 1)


class Own(dist.Normal):
    """A density of the user's own that fails in its own way, or has Python control flow."""

    def __init__(self, loc, what=""):
        self.what = what
        super().__init__(loc, 1.0)

    def log_prob(self, value, intermediates=None):
        if self.what == "error":
            raise ValueError("the user's own")
        if self.what == "shape":
            return jnp.zeros(2) + jnp.zeros(3)
        if self.what == "carry":
            raise TypeError("scan body: carry of another type")
        return super().log_prob(value) - (1.0 if self.loc > 1 else 0.0)


def own(what):
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", Own(2.0 * z, what), obs=jnp.array(1.0))

    return model


@pytest.mark.parametrize("what", ["error", "shape", "carry"])
def test_an_error_of_the_users_own_density_passes_as_it_is(what):
    with pytest.raises((ValueError, TypeError)) as caught:
        TraceGrad_ELBO().loss(jax.random.key(0), {}, own(what), plain_z)
    assert not isinstance(caught.value, PplgradError)
    assert "log_prob" in [entry.name for entry in caught.traceback]


def integers():
    n = numpyro.sample("z", dist.Bernoulli(0.4))
    numpyro.sample("x", dist.Binomial(n + 3, 0.4), obs=2)  # NumPyro checks a Python number with NumPy.


def listed():
    n = numpyro.sample("z", dist.Bernoulli(0.4))
    numpyro.sample("x", dist.Normal([0.0, 2.0][n], 1.0), obs=1.0)


@pytest.mark.grid
@pytest.mark.parametrize("model", [own(""), integers, listed], ids=["own", "integers", "listed"])
@pytest.mark.parametrize("particles", [1, 3])
def test_python_control_flow_in_a_density_is_followed(model, particles):
    """The loss and the gradient are those of the plain path, exactly those that the host's ELBO has of a fixed draw."""
    runs = []
    for elbo in (Trace_ELBO(), TraceGrad_ELBO(particles, vectorize_particles=False)):
        keys = (
            [jax.random.key(1)] if particles == 1 or elbo.num_particles > 1 else jax.random.split(jax.random.key(1), 3)
        )
        runs.append(np.mean([float(elbo.loss(key, {"a": jnp.array(0.5)}, model, plain_z)) for key in keys]))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    with pytest.raises(ProgramError, match="Python control flow"):
        TraceGrad_ELBO(3).loss(jax.random.key(1), {"a": jnp.array(0.5)}, model, plain_z)


def test_a_shape_that_does_not_fit_is_named():
    def model():
        plain_z_model = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(jnp.zeros(3) + plain_z_model, 1.0), obs=jnp.zeros(2))

    with pytest.raises((ImpossibleValueError, ValueError), match="site 'x'|shape"):
        TraceGrad_ELBO().loss(jax.random.key(0), {}, model, plain_z)


def score(hidden, size):
    return ScoreFunction(NeuralBaseline(inputs=lambda: jnp.ones(size), hidden=(hidden,)))


LEARNED = {
    "RELAX of another size": (RELAX(hidden=32), RELAX(hidden=8)),
    "RELAX then RODEO": (RELAX(), RODEO()),
    "a network of another size": (score(8, 3), score(4, 3)),
    "a network with other inputs": (score(8, 3), score(8, 2)),
    "inputs where there were none": (ScoreFunction(NeuralBaseline()), score(8, 2)),
}


def bernoulli_model():
    z = numpyro.sample("z", dist.Bernoulli(0.4))
    numpyro.sample("x", dist.Normal(2 * z, 1.0), obs=1.3)


def svi_of(estimator):
    guide = config_estimators(plain_z, {} if estimator is None else {"z": estimator})
    return SVI(bernoulli_model, guide, numpyro.optim.Adam(0.02), TraceGrad_ELBO())


@pytest.mark.slow
@pytest.mark.parametrize("case", LEARNED)
def test_what_another_estimator_has_learned_is_refused(case):
    first, second = (svi_of(estimator) for estimator in LEARNED[case])
    params = first.get_params(first.init(jax.random.key(0)))
    with pytest.raises((EstimatorError, BaselineError), match="at site 'z' learns .*begin with svi.init"):
        second.loss.loss(jax.random.key(0), params, second.model, second.guide)
    jax.jit(second.update)(second.init(jax.random.key(0)))  # The remedy.


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [None, RELAX(), score(8, 3)], ids=["default", "relax", "network"])
def test_the_state_can_be_saved(estimator, tmp_path):
    svi = svi_of(estimator)
    update = jax.jit(svi.update)
    state, _ = update(svi.init(jax.random.PRNGKey(0)))
    assert all(x.size for x in jax.tree.leaves(state))
    _, wanted = update(state)
    _, found = update(pickle.loads(pickle.dumps(state)))
    assert found == wanted
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        _, found = update(saver.restore(tmp_path / "state", state))
    assert found == wanted
    flax = pytest.importorskip("flax.serialization")
    params = svi.get_params(state)
    back = flax.from_bytes(params, flax.to_bytes(params))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, back))


def test_state_that_was_saved_with_an_empty_weight_goes_on():
    svi = svi_of(None)
    state = svi.init(jax.random.key(0))
    params = dict(svi.get_params(state))
    old = [{"weight": jnp.zeros((0, 1)), "bias": params["z$pplgrad.1"][0]["bias"] + 0.5}]
    loss = lambda params: svi.loss.loss(jax.random.key(1), {**params, **state.mutable_state}, svi.model, svi.guide)  # noqa: E731
    assert jnp.isfinite(loss({**params, "z$pplgrad.1": old}))


def in_scan(name, logits, plates):
    def program():
        value = logits()

        def body(carry, _):
            if plates:
                with numpyro.plate("d", 3):
                    z = numpyro.sample(name, dist.Bernoulli(logits=value * jnp.ones(3)))
            else:
                z = numpyro.sample(name, dist.Bernoulli(logits=value))
            return z.sum(), z

        scan(body, jnp.array(0), None, length=5)

    return program


def scanned_gradient(baseline, plates):
    model = in_scan("z", lambda: 0.3, plates)
    guide = in_scan("z", lambda: numpyro.param("a", jnp.array(0.2)), plates)
    elbo = TraceGrad_ELBO(2)
    guide = config_estimators(guide, {"z": ScoreFunction(baseline)})
    svi = SVI(model, guide, numpyro.optim.Adam(0.1), elbo)
    params = svi.get_params(svi.init(jax.random.key(0)))
    return jax.jit(jax.grad(lambda p: elbo.loss(jax.random.key(1), p, model, guide)))(params)["a"]


@pytest.mark.slow
@pytest.mark.parametrize("plates", [False, True])
def test_a_baseline_inside_scan_has_a_number_for_each_step(plates):
    """In its own shapes, and in those that the values of sites have there: the same gradient."""
    numbers = jnp.arange(15.0).reshape(5, 3) if plates else jnp.arange(5.0)
    wide = numbers.reshape(5, *(1,) * 6, -1)
    own = scanned_gradient(FunctionBaseline(lambda: numbers), plates)
    assert own == scanned_gradient(FunctionBaseline(lambda: wide), plates)
    assert own == scanned_gradient(FunctionBaseline(lambda: jnp.stack([numbers, numbers])), plates)
    assert own != scanned_gradient(None, plates)


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("plates", [False, True])
@pytest.mark.parametrize("shape", [(4,), (5, 7), (2, 5, 1, 1, 1, 1, 1, 1, 7)])
def test_an_error_about_a_baseline_inside_scan_has_the_users_shapes(plates, shape):
    known = "\\(2, 5, 3\\)" if plates else "\\(2, 5\\)"
    with pytest.raises(BaselineError, match=f"at site 'z' .* the site's shape {known} \\(particles, steps") as caught:
        scanned_gradient(FunctionBaseline(lambda: jnp.ones(shape)), plates)
    assert "1, 1, 1" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("plates", [False, True])
def test_an_error_about_a_network_inside_scan_has_the_users_shapes(plates):
    net = (lambda key, x: jnp.zeros(1), lambda params, x: x)
    inputs = jnp.ones((5, 3, 2) if plates else (5, 2))
    for given in (lambda: inputs, lambda sites: inputs.reshape(5, *(1,) * 6, -1, 2)):
        with pytest.raises(BaselineError, match="returned shape") as caught:
            scanned_gradient(NeuralBaseline(net, inputs=given), plates)
        assert "1, 1, 1" not in str(caught.value)
