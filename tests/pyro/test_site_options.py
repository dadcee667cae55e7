"""Pyro's own options of a site in the guide: infer={"baseline": ...} as under TraceGraph_ELBO, and infer={"enumerate": ...}."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceGraph_ELBO, config_enumerate
from pyro.optim import Adam

from pplgrad import BaselineError, ConfigurationError, ScoreFunction
from pplgrad.core.baseline import Evaluation
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._tracing.site_options import SiteBaseline
from pplgrad.testing.in_pyro import array, assert_same, exact_gradient, expected_gradient, fresh, gradient, worst
from pplgrad.testing.programs import Case

NET = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1), torch.nn.Flatten(-2)).double()
FEATURES = torch.tensor([[0.3, -1.0], [0.5, 0.2], [-0.7, 0.9]], dtype=torch.double)


def options(kind):
    found = {
        "average": {"use_decaying_avg_baseline": True, "baseline_beta": 0.8},
        "network": {"nn_baseline": NET, "nn_baseline_input": FEATURES},
        "value": {"baseline_value": 0.4 * FEATURES.sum(-1)},
        "number": {"baseline_value": 0.7},
        "both": {"use_decaying_avg_baseline": True, "nn_baseline": NET, "nn_baseline_input": FEATURES},
    }
    return found[kind]


def program(kind):
    """Return a plate of binary sites under a global one."""

    def model():
        w = pyro.sample("w", dist.Bernoulli(array(0.4)))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(logits=w - 0.3))
            pyro.sample("x", dist.Normal(z * 2 - w, 1.0), obs=array([0.3, -1.1, 2.0]))

    def guide():
        infer = {"baseline": options(kind)} if kind else {}
        w = pyro.sample("w", dist.Bernoulli(logits=pyro.param("a")))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("b") + w), infer=infer)

    params = {"a": np.array(0.3), "b": np.array([0.2, -0.5, 0.1])}
    return Case("own", params, {"w": ((), 2), "z": ((3,), 2)}, lambda host: (model, guide))


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("kind", ["average", "network", "value", "number", "both"])
@pytest.mark.grid
def test_unbiased(kind, particles, vectorized):
    case = program(kind)
    found = expected_gradient(
        case, lambda: TraceGrad_ELBO(particles, vectorize_particles=vectorized, max_plate_nesting=1), particles
    )
    assert_same(found, exact_gradient(case))


def subsampled(kind):
    """Return a subsampled plate under a global site; the options are those of the elements that were drawn."""

    def side(logit, inner):
        w = pyro.sample("w", dist.Bernoulli(logits=logit))
        with pyro.plate("data", 3, subsample_size=2) as index:
            given = {name: x[index] if torch.is_tensor(x) else x for name, x in options(kind).items()}
            inner(w, index, given)

    def model():
        def inner(w, index, given):
            z = pyro.sample("z", dist.Bernoulli(logits=w - 0.3))
            pyro.sample("x", dist.Normal(z * 2 - w, 1.0), obs=array([0.3, -1.1, 2.0])[index])

        side(array(-0.4), inner)

    def guide():
        def inner(w, index, given):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("b")[index] + w), infer={"baseline": given})

        side(pyro.param("a"), inner)

    params = {"a": np.array(0.3), "b": np.array([0.2, -0.5, 0.1])}
    latents = {"w": ((), 2), "z": ((2,), 2)}
    return Case("own", params, latents, lambda host: (model, guide), {}, {"data": (3, 2)})


@pytest.mark.parametrize("kind", ["average", "network", "value"])
def test_unbiased_in_a_subsampled_plate(kind):
    case = subsampled(kind)
    assert_same(expected_gradient(case, TraceGrad_ELBO, 1), exact_gradient(case))


@pytest.mark.parametrize("make", [program, subsampled])
def test_a_baseline_that_sees_the_draw_is_caught(make, monkeypatch):
    """A mutant whose value sees the draw, through the cost."""

    def evaluate(self, terms):
        predicted = terms.predict() * (1 + terms.cost - terms.cost.mean())
        return Evaluation(predicted.detach(), None, {})

    monkeypatch.setattr(SiteBaseline, "evaluate", evaluate)
    case = make("value")
    assert worst(expected_gradient(case, TraceGrad_ELBO, 1), exact_gradient(case)) > 1e-3


def test_describe_shows_what_they_became():
    case = program("both")
    fresh(case)
    row = TraceGrad_ELBO().describe(*case.build(None)).rows[1]
    assert row["estimator"] == "ScoreFunction()" and row["reason"] == "named by the guide"
    assert row["baseline"] == "DecayingAverage(per_element=True) + SiteBaseline(option='nn_baseline')"


class Number(torch.nn.Module):
    """A network with one number for each row."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x)[..., 0]


@pytest.mark.slow
def test_a_network_learns_the_cost_as_under_tracegraph_elbo():
    """Under a constant cost the network's output is that cost, and the site's gradient is gone."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("f", 3 + 0 * z)

    def guide():
        net = pyro.module("net", network)
        infer = {"baseline": {"nn_baseline": net, "nn_baseline_input": torch.ones(1)}}
        pyro.sample("z", dist.Bernoulli(logits=torch.zeros(())), infer=infer)

    for elbo in (TraceGraph_ELBO(), TraceGrad_ELBO()):
        pyro.clear_param_store()
        network = Number()
        svi = SVI(model, guide, Adam({"lr": 0.05}), elbo)
        for _ in range(300):
            svi.step()
        assert float(network(torch.ones(1)).detach()) == pytest.approx(3.0, abs=0.05)


def test_a_baseline_that_reads_its_own_draw_is_refused():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    def guide():
        options = {"baseline_value": torch.zeros(())}
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(()))), infer={"baseline": options})
        options["baseline_value"] = 2 * z

    with pytest.raises(BaselineError, match="at site 'z' was computed from the value of site 'z'"):
        TraceGrad_ELBO().loss_and_grads(model, guide)


REFUSED = {
    "unknown": ({"use_average": True}, "unknown options 'use_average'"),
    "two": ({"nn_baseline": NET, "nn_baseline_input": FEATURES, "baseline_value": 1.0}, "leave out one"),
    "without input": ({"nn_baseline": NET}, "without nn_baseline_input"),
    "nothing": ({"use_decaying_avg_baseline": False}, "asks for no baseline"),
    "no dict": (3.0, "takes a dict; got float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_misfits_are_refused(name):
    given, words = REFUSED[name]

    def run():
        pyro.sample("z", dist.Bernoulli(0.5), infer={"baseline": given})

    with pytest.raises(ConfigurationError, match=f"Site 'z': infer.*{words}"):
        TraceGrad_ELBO().loss_and_grads(run, run)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_an_enumerated_site_of_the_guide_is_summed_over(how):
    """All sites here have no draw left beside their own, so that one step has the exact gradient."""
    case = program(None)
    model, guide = case.build(None)
    seen = []
    for seed in range(2):
        fresh(case)
        pyro.set_rng_seed(seed)
        wrapped = config_enumerate(guide, how)
        elbo = TraceGrad_ELBO(estimators={"w": ScoreFunction()})
        elbo.loss_and_grads(model, wrapped)
        seen.append(gradient()["b"])
        assert [row["estimator"] for row in elbo.describe(model, wrapped).rows] == [
            "ScoreFunction()",
            "Enumerate()",
        ]

    def alone():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("b")), infer={"enumerate": how})

    def alone_model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=array([0.3, -1.1, 2.0]))

    single = Case("alone", {"b": case.params["b"]}, {"z": ((3,), 2)}, lambda host: (alone_model, alone))
    fresh(single)
    TraceGrad_ELBO().loss_and_grads(alone_model, alone)
    assert_same(gradient(), exact_gradient(single))


def test_several_enumerated_samples_are_refused_with_what_stands_for_them():
    def run():
        pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel", "num_samples": 7})

    with pytest.raises(ConfigurationError, match=r"'z'.*ScoreFunction\(samples=7\)"):
        TraceGrad_ELBO().loss_and_grads(run, run)


def test_the_estimators_argument_goes_before():
    def run():
        pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()})
    assert elbo.describe(run, run).rows[0]["estimator"] == "ScoreFunction()"


@pytest.mark.parametrize(
    ("key", "meant"), [("estimater", "estimator"), ("enumarate", "enumerate"), ("base_line", "baseline")]
)
def test_a_misspelt_option_is_refused(key, meant):
    def run():
        pyro.sample("z", dist.Bernoulli(0.3), infer={key: "parallel"})

    with pytest.raises(ConfigurationError, match=f"'z'.*'{key}'.*did you mean '{meant}'"):
        TraceGrad_ELBO().loss_and_grads(lambda: pyro.sample("z", dist.Bernoulli(0.3)), run)
