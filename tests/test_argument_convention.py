"""`describe`, `check_gradients` and `choose_estimators` take a program's arguments alike in both libraries."""

import numpy as np
import pytest

from pplgrad import DecayingAverage, NeuralBaseline, ScoreFunction
from pplgrad.errors import ConfigurationError


def in_pyro():
    import pyro
    import torch

    import pplgrad.pyro as plugin

    pyro.clear_param_store()
    return plugin, *program(pyro, torch.tensor), torch.tensor([0.5, 1.0, 2.0])


def in_numpyro():
    import jax.numpy as jnp
    import numpyro

    import pplgrad.numpyro as plugin

    return plugin, *program(numpyro, jnp.asarray), jnp.asarray([0.5, 1.0, 2.0])


def program(ppl, array):
    def model(x, scale=1.0):
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", ppl.distributions.Bernoulli(array(0.3)))
            ppl.sample("x", ppl.distributions.Normal(z, scale), obs=x)

    def guide(x, scale=1.0):
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", ppl.distributions.Bernoulli(logits=ppl.param("a", array(0.5)) * x))

    return model, guide


@pytest.fixture(params=[in_pyro, in_numpyro], ids=["pyro", "numpyro"])
def host(request):
    return request.param()


@pytest.mark.slow
def test_one_way_to_give_the_programs_arguments(host):
    plugin, model, guide, x = host
    (row,) = plugin.TraceGrad_ELBO(2).describe(model, guide, x, scale=2.0).rows
    assert row["site"] == "z" and row["baseline"] == "LeaveOneOut()"
    assert plugin.check_gradients(model, guide, (x,), {"scale": 2.0}, draws=100, tolerance=5.0).rows
    found = plugin.choose_estimators(model, guide, [x], {"scale": 2.0}, seconds=0.05, candidates=[ScoreFunction()])
    assert list(found.estimators) == ["z"]


def test_describe_starts_the_program_where_it_needs_parameters(host):
    plugin, model, guide, x = host
    learned = plugin.config_estimators(
        guide, {"z": ScoreFunction(DecayingAverage(0.9) + NeuralBaseline(inputs=lambda x, scale=1.0: x[:, None]))}
    )
    (row,) = plugin.TraceGrad_ELBO().describe(model, learned, x).rows
    assert "NeuralBaseline" in row["baseline"]


@pytest.mark.parametrize("name", ["check_gradients", "choose_estimators"])
def test_an_argument_without_its_tuple_is_refused(host, name):
    """The rows of an array would be taken for the program's arguments."""
    plugin, model, guide, x = host
    with pytest.raises(
        ConfigurationError, match=rf"{name}\(model, guide, args\) takes a tuple .* got \w+; write \(x,\)"
    ):
        getattr(plugin, name)(model, guide, x)
    with pytest.raises(ConfigurationError, match="takes the program's keyword arguments as a mapping; got"):
        getattr(plugin, name)(model, guide, (x,), x)


@pytest.mark.slow
def test_numpyros_own_form_of_describe_stays():
    import jax

    plugin, model, guide, x = in_numpyro()
    elbo, key = plugin.TraceGrad_ELBO(2), jax.random.key(0)
    rows = elbo.describe(key, {"a": np.float32(0.1)}, model, guide, x).rows
    assert (
        rows
        == elbo.describe(model, guide, x).rows
        == elbo.describe(rng_key=key, param_map={"a": np.float32(0.1)}, model=model, guide=guide, x=x).rows
    )
    with pytest.raises(ConfigurationError, match=r"describe\(model, guide, \*args\)"):
        elbo.describe(x, guide)
