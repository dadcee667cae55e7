"""`config_estimators` used wrongly, in both libraries: arguments in the wrong order, and a guide that another ELBO trains."""

import warnings

import pytest

from pplgrad import DisARM
from pplgrad.errors import ConfigurationError

NO_EFFECT = "Trace_ELBO does not read the estimators"


class InPyro:
    """A small program of Pyro's, and what trains it."""

    def __init__(self):
        import pyro
        import torch
        from pyro.infer import SVI, Predictive, Trace_ELBO
        from pyro.optim import Adam

        import pplgrad.pyro as plugin

        self.plugin, self.host_elbo, self.dist = plugin, Trace_ELBO, pyro.distributions
        pyro.clear_param_store()

        def model(x=None):
            z = pyro.sample("z", pyro.distributions.Bernoulli(0.3))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=torch.tensor(1.0))

        def guide(x=None):
            pyro.sample("z", pyro.distributions.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))

        self.model, self.guide = model, guide
        self.train = lambda guide, elbo: [SVI(model, guide, Adam({"lr": 0.1}), elbo).step() for _ in range(3)]
        self.evaluate = lambda guide, elbo: SVI(model, guide, Adam({"lr": 0.1}), elbo).evaluate_loss()
        self.look = lambda guide: Predictive(model, guide=guide, num_samples=2)()
        self.module = lambda guide: _module(torch, guide)


def _module(torch, guide):
    class Guide(torch.nn.Module):
        def forward(self, *args):
            return guide(*args)

    return Guide()


class InNumPyro:
    """The same of NumPyro's."""

    def __init__(self):
        import jax
        import numpyro
        from numpyro.infer import SVI, Predictive, Trace_ELBO
        from numpyro.optim import Adam

        import pplgrad.numpyro as plugin

        self.plugin, self.host_elbo = plugin, Trace_ELBO
        key = jax.random.key(0)

        def model(x=None):
            z = numpyro.sample("z", numpyro.distributions.Bernoulli(0.3))
            numpyro.sample("x", numpyro.distributions.Normal(z, 1.0), obs=1.0)

        def guide(x=None):
            numpyro.sample("z", numpyro.distributions.Bernoulli(logits=numpyro.param("a", 0.5)))

        self.model, self.guide = model, guide
        self.train = lambda guide, elbo: SVI(model, guide, Adam(0.1), elbo).run(key, 3, progress_bar=False)

        def evaluate(guide, elbo):
            svi = SVI(model, guide, Adam(0.1), elbo)
            return svi.evaluate(svi.init(key))

        self.evaluate = evaluate
        self.look = lambda guide: Predictive(model, guide=guide, params={"a": 0.5}, num_samples=2)(key)
        self.module = lambda guide: guide


# NumPyro's own warning that its Trace_ELBO ignores discrete latents.
pytestmark = pytest.mark.filterwarnings("ignore:Currently, SVI with Trace_ELBO")


@pytest.fixture(params=[InPyro, InNumPyro], ids=["pyro", "numpyro"])
def host(request):
    return request.param()


def test_swapped_arguments_are_refused_at_once(host):
    wrap = host.plugin.config_estimators
    with pytest.raises(ConfigurationError, match=r"guide goes first: write config_estimators\(guide, \{\.\.\.\}\)"):
        wrap({"z": DisARM()}, host.guide)
    with pytest.raises(ConfigurationError, match="two mappings and no guide"):
        wrap({"z": DisARM()}, {"w": DisARM()})
    with pytest.raises(ConfigurationError, match="takes a guide, a callable; got dict"):
        wrap({"z": DisARM()})({"w": DisARM()})
    # What is allowed stays allowed.
    assert callable(wrap({"z": DisARM()})(host.guide)) and callable(wrap(estimators={"z": DisARM()})(host.guide))


def test_a_choice_that_the_hosts_elbo_does_not_read_is_told_once(host):
    guide = host.plugin.config_estimators(host.module(host.guide), {"z": DisARM()})
    with pytest.warns(UserWarning, match=NO_EFFECT) as seen:
        warnings.filterwarnings("ignore", "Currently, SVI")
        host.train(guide, host.host_elbo())
        host.train(guide, host.host_elbo())
    (told,) = [str(w.message) for w in seen if NO_EFFECT in str(w.message)]
    assert "names 'z'" in told and "has no effect" in told and "TraceGrad_ELBO" in told


@pytest.mark.slow
def test_what_reads_the_choice_or_trains_nothing_is_not_warned_of(host):
    guide = host.plugin.config_estimators(host.guide, {"z": DisARM()})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Currently, SVI")
        host.train(guide, host.plugin.TraceGrad_ELBO(2))
        host.evaluate(guide, host.plugin.TraceGrad_ELBO(2))
        # The bound is the same under any estimator.
        host.evaluate(guide, host.host_elbo(2))
        host.look(guide)
        host.train(host.plugin.config_estimators(host.guide), host.host_elbo())
    assert not [w for w in seen if NO_EFFECT in str(w.message)]


@pytest.mark.slow
@pytest.mark.parametrize("of", ["grad", "jit of grad", "grad of jit", "value_and_grad"])
def test_a_hosts_elbo_that_is_differentiated_without_svi_is_told_too(of):
    import jax
    import jax.numpy as jnp

    host = InNumPyro()
    guide = host.plugin.config_estimators(host.guide, {"z": DisARM()})
    key = jax.random.key(0)

    def of_loss(elbo):
        # A parameter may be a whole number: nobody differentiates that one.
        return lambda a: elbo.loss(key, {"a": a, "n": jnp.ones((), int)}, host.model, guide)

    made = {
        "grad": jax.grad,
        "jit of grad": lambda f: jax.jit(jax.grad(f)),
        "grad of jit": lambda f: jax.grad(jax.jit(f)),
        "value_and_grad": lambda f: lambda a: jax.value_and_grad(f)(a)[1],
    }[of]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loss = of_loss(host.host_elbo(2))
        for value in (loss(0.5), jax.jit(loss)(0.5)):
            assert value == host.host_elbo(2).loss(key, {"a": 0.5}, host.model, host.guide)
        made(of_loss(host.plugin.TraceGrad_ELBO(2)))(0.5)
        assert not [w for w in seen if NO_EFFECT in str(w.message)]
        found = made(loss)(0.5)
        made(loss)(0.5)
    assert len([w for w in seen if NO_EFFECT in str(w.message)]) == 1
    assert found == jax.grad(lambda a: host.host_elbo(2).loss(key, {"a": a}, host.model, host.guide))(0.5)
