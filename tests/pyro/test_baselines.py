"""Baselines in Pyro: unbiased whatever their state, learned where they should learn, and refused where they would bias."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pplgrad import (
    BaselineError,
    ConfigurationError,
    Constant,
    DecayingAverage,
    FunctionBaseline,
    LeaveOneOut,
    NeuralBaseline,
    OptimalConstant,
    ScoreFunction,
)
from pplgrad.pyro import TraceGrad_ELBO, config_estimators, is_baseline_param, split_optimizer
from pplgrad.testing.in_pyro import HOST, array, assert_same, exact_gradient, expected_gradient, fresh
from pplgrad.testing.programs import CASES
from tests import stacked_baselines
from tests.pyro.compiling import train

STATEFUL = {
    "average": DecayingAverage(0.8),
    "average-per-element": DecayingAverage(0.8, per_element=True),
    "optimal-past": OptimalConstant(decay=0.7),
    "optimal-past-per-element": OptimalConstant(decay=0.7, per_element=True),
    "neural": NeuralBaseline(hidden=(3,)),
    "neural-shared": NeuralBaseline(hidden=(3,), share="loop"),
    "average+neural": DecayingAverage(0.8) + NeuralBaseline(),
    "function": FunctionBaseline(lambda: torch.tensor(0.7)),
}


def warmed_store(case, make_elbo, particles_guide=lambda guide: guide):
    """Train a few steps, and return the baselines' part of the param store."""
    fresh(case)
    model, guide = case.build(HOST)
    svi = SVI(model, particles_guide(guide), Adam({"lr": 0.05}), make_elbo())
    for _ in range(5):
        svi.step()
    store = pyro.get_param_store()
    return {name: value.detach().clone() for name, value in store.items() if is_baseline_param(name)}


@pytest.mark.grid
@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("name", ["single", "hierarchy", "both_kinds_in_one_plate", "subsampled", "scaled"])
def test_unbiased_from_any_state(kind, name):
    case = CASES[name]
    chosen = dict.fromkeys(case.latents, ScoreFunction(STATEFUL[kind]))

    def elbo():
        return TraceGrad_ELBO(estimators=chosen)

    state = warmed_store(case, elbo)
    if kind != "function":
        assert state

    def prepare():
        for key, value in state.items():
            pyro.param(key, value.clone())

    found = expected_gradient(case, elbo, 1, prepare=prepare)
    wanted = exact_gradient(case)
    assert_same({key: found[key] for key in wanted}, wanted)


def test_average_is_of_the_past_only():
    """The first step has no baseline; the second has the first step's cost; the state is bias-corrected."""
    costs = iter([3.0, 5.0, 11.0])

    def model():
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("f", torch.tensor(next(costs)))

    def guide():
        pyro.sample("z", dist.Bernoulli(0.5))

    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(DecayingAverage(0.5))})
    read = []
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
        store = pyro.get_param_store()
        mean = store["pplgrad.baseline.z.0.mean"].item()
        weight = store["pplgrad.baseline.z.0.weight"].item()
        read.append(mean / weight)
    # The factor does not depend on z, and −log q + log p is 0: z's downstream cost is zero at every step.
    assert read == [0.0, 0.0, 0.0]


def test_average_follows_its_formula():
    values = iter([3.0, 5.0, 11.0])

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("f", next(values) + 0.0 * z)

    def guide():
        pyro.sample("z", dist.Bernoulli(0.5))

    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(DecayingAverage(0.5))})
    read = []
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
        store = pyro.get_param_store()
        read.append((store["pplgrad.baseline.z.0.mean"] / store["pplgrad.baseline.z.0.weight"]).item())
    np.testing.assert_allclose(read, [3.0, (1.5 + 5) / 1.5, (0.75 + 2.5 + 11) / 1.75])


def test_per_element_average_scatters_by_index():
    data = torch.arange(5.0)

    def model():
        with pyro.plate("data", 5, subsample=torch.tensor([3, 1])) as index:
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.factor("f", data[index] + 0.0 * z)

    def guide():
        with pyro.plate("data", 5, subsample=torch.tensor([3, 1])):
            pyro.sample("z", dist.Bernoulli(0.5))

    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(DecayingAverage(0.5, per_element=True))})
    elbo.loss_and_grads(model, guide)
    mean = pyro.get_param_store()["pplgrad.baseline.z.0.mean"].detach()
    np.testing.assert_allclose(mean, [0, 0.5 * 2.5 * 1, 0, 0.5 * 2.5 * 3, 0])


@pytest.mark.slow
def test_optimal_constant_reaches_the_least_variance_among_constants():
    """On a Bernoulli with cost f: b* = E[f s²]/E[s²] = f(1)(1 − p) + f(0) p, and the estimate converges to it."""
    p, f0, f1 = 0.3, 2.0, -5.0
    best = f1 * (1 - p) + f0 * p
    scores = {1: 1 - p, 0: -p}

    def variance(b):
        draws = [((f1 - b) * scores[1], p), ((f0 - b) * scores[0], 1 - p)]
        mean = sum(g * w for g, w in draws)
        return sum((g - mean) ** 2 * w for g, w in draws)

    grid = np.linspace(best - 3, best + 3, 61)
    assert abs(grid[np.argmin([variance(b) for b in grid])] - best) < 1e-9

    # Fifty draws a step, all with one constant, of which the past has as much weight as of a thousand steps with one draw.
    def model():
        with pyro.plate("draws", 50):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.factor("f", f0 + (f1 - f0) * z)

    def guide():
        with pyro.plate("draws", 50):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(p).logit())))

    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(OptimalConstant(decay=0.95))})
    for _ in range(120):
        elbo.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    found = (store["pplgrad.baseline.z.0.weighted"] / store["pplgrad.baseline.z.0.square"]).item()
    assert abs(found - best) < 0.35
    assert variance(found) < variance(0.0) and variance(found) < 1.05 * variance(best) + 0.1


def test_categorical_score_is_one_hot_minus_softmax():
    from pplgrad.pyro._distributions import score_squared

    logits = torch.tensor([[0.3, -1.0, 0.8], [2.0, 0.1, -0.4]])
    value = torch.tensor([2, 0])
    wanted = ((torch.nn.functional.one_hot(value, 3) - logits.softmax(-1)) ** 2).sum(-1)
    np.testing.assert_allclose(score_squared("k", dist.Categorical(logits=logits), value), wanted)


def program(n=20):
    x = torch.randn(n, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            w = pyro.sample("w", dist.Bernoulli(0.3 + 0.4 * z))
            pyro.sample("x", dist.Normal(2 * x[:, :1] + z[:, None] + w[:, None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(n))))
            pyro.sample("w", dist.Bernoulli(logits=pyro.param("c", torch.zeros(n)) + z))

    return x, model, guide


def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_network_learns_the_cost(normalize):
    x, model, guide = program()
    network = net()
    baseline = NeuralBaseline(network, inputs=lambda x: x, normalize_variance=normalize)
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction(baseline)})
    before = [p.detach().clone() for p in network.parameters()]
    svi = SVI(model, guide, split_optimizer(Adam({"lr": 1e-9}), Adam({"lr": 3e-2})), elbo)
    for _ in range(400):
        svi.step(x)
    assert any((a != b).any() for a, b in zip(before, network.parameters(), strict=True))
    with torch.no_grad():
        predicted = network(x)[:, 0]
    downstream = -0.5 * ((x - 2 * x[:, :1] - 1) ** 2).sum(-1)
    correlation = np.corrcoef(predicted, downstream)[0, 1]
    assert correlation > 0.7
    names = [n for n in pyro.get_param_store().keys() if is_baseline_param(n)]
    assert any(n.startswith("pplgrad.baseline.z.0") for n in names)
    assert any(n.startswith("pplgrad.baseline.w.0") for n in names)


def test_baseline_gradient_never_reaches_the_program_nor_the_reverse():
    x, model, guide = program()
    learned = {"z": ScoreFunction(NeuralBaseline(net(), inputs=lambda x: x)), "w": ScoreFunction()}
    elbo = TraceGrad_ELBO(estimators=learned)
    pyro.set_rng_seed(1)
    elbo.loss_and_grads(model, guide, x)
    store = pyro.get_param_store()
    grads = {name: p.grad for name, p in store.named_parameters()}
    assert all(g is not None for name, g in grads.items() if "$$$" in name)
    # The same draws with the network's value as a fixed function give the same gradient of the program.
    found = {name: g.clone() for name, g in grads.items() if not is_baseline_param(name)}
    network = elbo._networks.modules["z", "0"]
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    fixed = {"z": ScoreFunction(FunctionBaseline(lambda x: network(x)[:, 0])), "w": ScoreFunction()}
    TraceGrad_ELBO(estimators=fixed).loss_and_grads(model, guide, x)
    for name, g in found.items():
        np.testing.assert_allclose(g, store[name].unconstrained().grad, atol=1e-12)


def test_upstream_values_are_given_and_own_values_refused():
    x, model, guide = program()

    def reads(name):
        return lambda x, sites: torch.cat([x, sites[name].mean(0)[:, None]], -1)

    def estimators(site, name):
        return {site: ScoreFunction(NeuralBaseline(inputs=reads(name)))}

    TraceGrad_ELBO(estimators=estimators("w", "z")).loss_and_grads(model, guide, x)
    for site, name, what in [("z", "z", "its own value"), ("z", "w", "'w', which is computed")]:
        before = dict(pyro.get_param_store().items())
        with pytest.raises(BaselineError, match=f"site '{site}' reads .*{what}"):
            TraceGrad_ELBO(estimators=estimators(site, name)).loss_and_grads(model, guide, x)
        assert pyro.get_param_store().keys() == before.keys()
    with pytest.raises(BaselineError, match="reads site 'nothing'"):
        TraceGrad_ELBO(estimators=estimators("z", "nothing")).loss_and_grads(model, guide, x)


def test_a_value_smuggled_past_the_mapping_is_refused_by_provenance():
    seen = {}

    def guide():
        seen["z"] = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(()))))

    def model():
        pyro.sample("z", dist.Bernoulli(0.5))

    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(FunctionBaseline(lambda: seen["z"] * 2))})
    with pytest.raises(BaselineError, match="computed from the value of site 'z'"):
        elbo.loss_and_grads(model, guide)


class Kept:
    """What a model keeps for whoever looks."""

    number = 0.0
    tensor = torch.zeros(())


def kept(of_this_step):
    """Return a program that keeps the data's log density, or a number that no draw decides."""

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x = pyro.sample("x", dist.Normal(5 * z, 1.0), obs=torch.tensor(1.4))
        if of_this_step:
            Kept.tensor = dist.Normal(5 * z, 1.0).log_prob(x).detach()
            Kept.number = Kept.tensor.item()

    return model, guide


@pytest.mark.grid
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("of_this_step", [False, True])
def test_a_baseline_that_reads_what_the_model_keeps(kind, particles, of_this_step):
    """What the model has just kept is decided by the draw; what nobody changes is not."""
    function = FunctionBaseline((lambda: Kept.number) if kind == "number" else (lambda: Kept.tensor))
    elbo = TraceGrad_ELBO(particles, estimators={"z": ScoreFunction(function)})
    Kept.number, Kept.tensor = 0.0, torch.zeros(())
    if of_this_step:
        with pytest.raises(BaselineError, match="FunctionBaseline at site 'z' was computed from the value of site 'z'"):
            elbo.loss_and_grads(*kept(True))
    else:
        for _ in range(4):
            elbo.loss_and_grads(*kept(False))


def test_wrong_shape_nan_and_wrong_network_are_refused():
    x, model, guide = program()

    def step(baseline):
        TraceGrad_ELBO(estimators={"z": ScoreFunction(baseline)}).loss_and_grads(model, guide, x)

    with pytest.raises(BaselineError, match="at site 'z' returned shape"):
        step(FunctionBaseline(lambda x: x))
    with pytest.raises(BaselineError, match="at site 'z' returned shape"):
        step(NeuralBaseline(torch.nn.Linear(3, 2), inputs=lambda x: x))
    with pytest.raises(BaselineError, match="at site 'z' returned NaN"):
        step(FunctionBaseline(lambda x: x[:, 0] * float("nan")))
    with pytest.raises(ConfigurationError, match="torch.nn.Module"):
        step(NeuralBaseline(lambda x: x, inputs=lambda x: x))
    assert not [n for n in pyro.get_param_store().keys() if n.endswith(("mean", "weight")) and is_baseline_param(n)]


def test_two_baselines_over_particles_are_refused():
    with pytest.raises(ConfigurationError, match="only one baseline"):
        LeaveOneOut() + OptimalConstant()
    with pytest.raises(ConfigurationError, match="only one baseline"):
        LeaveOneOut() + Constant(1.0) + LeaveOneOut()


def test_saved_and_restored_with_the_param_store(tmp_path):
    x, model, guide = program()
    chosen = {"z": ScoreFunction(DecayingAverage(0.9) + NeuralBaseline(hidden=(4,)))}
    svi = SVI(model, guide, Adam({"lr": 0.01}), TraceGrad_ELBO(estimators=chosen))
    for _ in range(3):
        svi.step(x)
    store = pyro.get_param_store()
    saved = {name: value.detach().clone() for name, value in store.items()}
    store.save(tmp_path / "store.pt")
    pyro.clear_param_store()
    store.load(tmp_path / "store.pt")
    elbo = TraceGrad_ELBO(estimators=chosen)
    elbo.loss_and_grads(model, guide, x)
    module = elbo._networks.modules["z", "1"]
    for name, parameter in module.named_parameters():
        np.testing.assert_array_equal(parameter.detach(), saved[f"pplgrad.baseline.z.1$$${name}"])
    assert store["pplgrad.baseline.z.0.weight"] > saved["pplgrad.baseline.z.0.weight"]


def test_split_optimizer_has_two_learning_rates_and_one_state(tmp_path):
    x, model, guide = program()
    network = net()
    chosen = {"z": ScoreFunction(NeuralBaseline(network, inputs=lambda x: x))}
    optimizer = split_optimizer(Adam({"lr": 0.0}), Adam({"lr": 0.1}))
    svi = SVI(model, guide, optimizer, TraceGrad_ELBO(estimators=chosen))
    first = network[0].weight.detach().clone()
    svi.step(x)
    assert (pyro.param("a") == 0).all() and (network[0].weight != first).all()
    optimizer.save(tmp_path / "optimizer.pt")
    again = split_optimizer(Adam({"lr": 0.0}), Adam({"lr": 0.1}))
    again.load(tmp_path / "optimizer.pt")
    SVI(model, guide, again, TraceGrad_ELBO(estimators=chosen)).step(x)
    assert again.get_state().keys() == optimizer.get_state().keys()


def test_module_interface_holds_the_networks():
    class Model(torch.nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(0.5))

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.a = pyro.nn.PyroParam(torch.zeros(20))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.a))

    x = torch.randn(20, 3)
    guide = config_estimators(Guide(), {"z": ScoreFunction(NeuralBaseline(net(), inputs=lambda x: x))})
    loss = TraceGrad_ELBO()(Model(), guide)
    loss(x)
    names = [name for name, _ in loss.named_parameters()]
    assert any("baseline_z_0" in name for name in names) and any(
        name.endswith("a") or "a_unconstrained" in name for name in names
    )
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    before = [p.detach().clone() for p in loss.parameters()]
    optimizer.zero_grad()
    loss(x).backward()
    optimizer.step()
    assert all((a != b).any() for a, b in zip(before, loss.parameters(), strict=True))


def test_pattern_gives_each_site_its_own_network():
    x, model, guide = program()
    network = net()
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction(NeuralBaseline(network, inputs=lambda x: x))})
    elbo.loss_and_grads(model, guide, x)
    modules = elbo._networks.modules
    assert modules["z", "0"] is network
    assert modules["w", "0"] is not network


def test_array_constant(dtype=torch.float32):
    """Float32 programs stay float32."""
    torch.set_default_dtype(dtype)
    x, model, guide = program()
    svi = SVI(model, guide, Adam({"lr": 0.01}), TraceGrad_ELBO())
    for _ in range(3):
        assert np.isfinite(svi.step(x))
    assert all(value.dtype == dtype for _, value in pyro.get_param_store().items())
    assert array(1.0).dtype == torch.float64


def stacked_training(baseline, particles, vectorized, data):
    """Return what training with a baseline at the sites of `tests.stacked_baselines` returns."""
    model, guide, args = stacked_baselines.program(HOST, data)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    estimators = {"*": ScoreFunction(baseline)}
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, max_plate_nesting=1, estimators=estimators)
    seen, _ = train(elbo, model, guide, tuple(map(array, args)), steps=4)
    return seen, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.grid
@pytest.mark.parametrize("data", [True, False], ids=["inputs", "numbers"])
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("kind", stacked_baselines.BASELINES)
def test_several_sites_at_once_are_as_one_by_one(kind, vectorized, data, monkeypatch):
    given = (*stacked_baselines.BASELINES[kind], vectorized, data)
    found = stacked_training(*given)
    stacked_baselines.one_by_one(monkeypatch)
    wanted = stacked_training(*given)
    for one, other in zip(found[0], wanted[0], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-10, atol=1e-12)
    assert found[1].keys() == wanted[1].keys()
    for name in found[1]:
        np.testing.assert_allclose(found[1][name], wanted[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.grid(together="mutants of stacked baselines")
@pytest.mark.parametrize("name", stacked_baselines.MUTANTS)
def test_mutant_of_several_sites_at_once_is_caught(name, monkeypatch):
    given = (*stacked_baselines.BASELINES["shared" if "shared" in name else "average+neural"], True, True)
    wanted = stacked_training(*given)[0][-1]
    stacked_baselines.MUTANTS[name](monkeypatch)
    assert abs(stacked_training(*given)[0][-1]["p"] - wanted["p"]).max() > 1e-6


def test_sites_of_a_loop_share_a_network():
    baseline = NeuralBaseline(hidden=(3,), share="loop")
    _, kept = stacked_training(baseline, 2, True, True)
    assert {name.rsplit("$", 1)[0] for name in kept if is_baseline_param(name)} == {
        "pplgrad.baseline.z*.0$$",
        "pplgrad.baseline.w*.0$$",
    }
    assert (kept["pplgrad.baseline.z*.0$$$2.weight"] != 0).any()


def test_a_network_that_somebody_put_something_into_is_called(monkeypatch):
    """The product of several networks' layers knows nothing of hooks."""
    model, guide, args = stacked_baselines.program(HOST)
    elbo = TraceGrad_ELBO(max_plate_nesting=1, estimators={"*": ScoreFunction(NeuralBaseline(hidden=(3,)))})
    pyro.clear_param_store()
    called = []
    for step in range(8):
        elbo.loss_and_grads(model, guide, *map(array, args))
        if step == 5:
            network = next(iter(elbo._networks.modules.values()))
            network.register_forward_hook(lambda *_: called.append(True))
    assert len(called) == 2


def test_a_layer_that_somebody_replaced_is_that_of_its_network_alone(monkeypatch):
    """The product of several networks' layers takes what has no parameters from the first one."""
    model, guide, args = stacked_baselines.program(HOST)
    found = []
    for one_by_one in (False, True):
        if one_by_one:
            stacked_baselines.one_by_one(monkeypatch)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = TraceGrad_ELBO(max_plate_nesting=1, estimators={"*": ScoreFunction(NeuralBaseline(hidden=(3,)))})
        svi = SVI(model, guide, Adam({"lr": 0.1}), elbo)
        for step in range(8):
            pyro.set_rng_seed(step)
            svi.step(*map(array, args))
            if step == 5:
                elbo._networks.modules["w0", "0"][1] = torch.nn.ReLU()
        found.append({name: x.detach().numpy().copy() for name, x in pyro.get_param_store().items()})
    for name, x in found[1].items():
        np.testing.assert_allclose(found[0][name], x, atol=1e-12)


def test_a_value_for_several_sites_at_once_that_does_not_fit_is_refused():
    with pytest.raises(BaselineError, match=r"MissingAxis.* at site 'w0' returned shape \(2,\)"):
        stacked_training(stacked_baselines.MissingAxis(), 2, True, True)
