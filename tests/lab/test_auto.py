"""`Auto(measure=True)`: it measures once, for its own sites alone, and what it chooses is trained and described."""

import jax
import jax.numpy as jnp
import numpyro
import pyro
import pytest
import torch

from pplgrad import (
    REBAR,
    Auto,
    ConfigurationError,
    DisARM,
    LocalExpectation,
    ScoreFunction,
    Watch,
)
from pplgrad import numpyro as in_numpyro
from pplgrad import pyro as in_pyro
from pplgrad.diagnostics import choosing

# One Bernoulli draw, whose sum over both values is exact: of these the first alone has no variance.
OFFERED = [LocalExpectation(), DisARM(), ScoreFunction()]


@pytest.fixture(autouse=True)
def fresh():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def offered(sites, given):
    return {name: OFFERED[::-1] for name in sites}


def program(ppl, array):
    dist = ppl.distributions

    def model():
        ppl.sample("z", dist.Bernoulli(array(0.3)))
        ppl.sample("w", dist.Bernoulli(array(0.6)))

    def guide():
        ppl.sample("z", dist.Bernoulli(logits=ppl.param("a", array(0.4))))
        ppl.sample("w", dist.Bernoulli(logits=ppl.param("b", array(0.1))))

    return model, guide


@pytest.mark.slow
def test_pyro_measures_at_the_first_step(monkeypatch):
    monkeypatch.setattr(choosing, "candidates", offered)
    model, guide = program(pyro, torch.tensor)
    auto, told = Auto(measure=True, seconds=8.0), []
    guide = in_pyro.config_estimators(guide, {"z": auto, "w": LocalExpectation()}, watch=Watch(told.append, every=1))
    elbo = in_pyro.TraceGrad_ELBO(2)
    before = elbo.describe(model, guide)
    assert before.rows[0]["reason"].endswith("(not measured yet)") and not auto.measured
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    svi.step()
    (chosen,) = auto.measured.values()
    assert chosen == LocalExpectation()
    after = elbo.describe(model, guide).rows
    assert after[0]["reason"] == "Auto: the best of those measured on this program"
    assert after[1]["estimator"] == "LocalExpectation()" and after[1]["reason"] == "named by the guide"
    # Measuring is no step of the run, and happens once.
    assert [record["step"] for record in told] == [0]
    auto.measured["z"] = DisARM()
    svi.step()
    assert auto.measured["z"] == DisARM() and [record["step"] for record in told] == [0, 1]
    assert set(pyro.get_param_store().keys()) == {"a", "b"}


@pytest.mark.slow
def test_numpyro_measures_when_it_is_told_to(monkeypatch):
    monkeypatch.setattr(choosing, "candidates", offered)
    model, guide = program(numpyro, jnp.asarray)
    auto = Auto(measure=True, seconds=12.0)
    guide = in_numpyro.config_estimators(guide, {"z": auto, "w": LocalExpectation()})
    elbo = in_numpyro.TraceGrad_ELBO(2)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.01), elbo)
    with pytest.raises(ConfigurationError, match="at site 'z' has not measured anything yet; call elbo.measure"):
        svi.run(jax.random.key(0), 2, progress_bar=False)
    with pytest.raises(ConfigurationError, match="cannot be measured inside jit"):
        jax.jit(lambda key: elbo.measure(key, {}, model, guide).confidence)(jax.random.key(0))
    with pytest.raises(ConfigurationError, match="cannot be measured inside jit"):  # With a key in numbers, too.
        jax.jit(lambda x: x * elbo.measure(jax.random.key(0), {}, model, guide).confidence)(1.0)
    with pytest.raises(
        ConfigurationError, match="cannot be measured inside jit"
    ):  # Nor under vmap, where only the keys are traced.
        jax.vmap(lambda key: elbo.measure(key, {}, model, guide).confidence)(jax.random.split(jax.random.key(0), 2))
    choice = elbo.measure(jax.random.key(0), {}, model, guide)
    assert auto.measured == {"z": choice.estimators["z"]} and auto.measured["z"] == LocalExpectation()
    assert choice.estimators["w"] == LocalExpectation()
    assert svi.run(jax.random.key(0), 2, progress_bar=False).losses.shape == (2,)


@pytest.mark.slow
def test_what_a_choice_learns_is_registered_in_numpyro(monkeypatch):
    """Where the guide's wrapper knows of the Auto; on the ELBO alone nothing that learns is offered."""
    monkeypatch.setattr(choosing, "candidates", lambda sites, given: {name: [REBAR(), DisARM()] for name in sites})
    monkeypatch.setattr(choosing, "_halve", lambda draws_of, runs, *rest: _tried(draws_of, runs))
    model, guide = program(numpyro, jnp.asarray)
    wrapped = in_numpyro.config_estimators(guide, {"z": Auto(measure=True)})
    elbo = in_numpyro.TraceGrad_ELBO()
    assert elbo.measure(jax.random.key(0), {}, model, wrapped).estimators["z"] == REBAR()
    result = numpyro.infer.SVI(model, wrapped, numpyro.optim.Adam(0.01), elbo).run(
        jax.random.key(0), 3, progress_bar=False
    )
    assert any("log_temperature" in name for name in result.params)
    elbo = in_numpyro.TraceGrad_ELBO(estimators={"z": Auto(measure=True)})
    assert elbo.measure(jax.random.key(0), {}, model, wrapped).estimators["z"] == DisARM()


def _tried(draws_of, runs):
    """Draw every candidate a little, and keep their order."""
    for run in runs:
        run.add(draws_of(run.estimators)(8, 0))
    return runs


def test_refusals():
    model, guide = program(pyro, torch.tensor)
    with pytest.raises(ConfigurationError, match="No site has Auto"):
        in_pyro.TraceGrad_ELBO().measure(model, guide)
    with pytest.raises(ConfigurationError, match=r"Auto\(seconds=0\)"):
        Auto(measure=True, seconds=0)
    with pytest.raises(ConfigurationError, match="write True or False"):
        Auto(measure="yes")
