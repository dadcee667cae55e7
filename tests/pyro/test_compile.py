"""Compiled steps give the gradient of eager ones on the same draws, and notice everything that changes."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import constraints

from pplgrad import (
    DecayingAverage,
    FunctionBaseline,
    LocalExpectation,
    NeuralBaseline,
    ScoreFunction,
    Watch,
)
from pplgrad.core.objectives import ELBO
from pplgrad.errors import BaselineError
from pplgrad.pyro import TraceGrad_ELBO, config_estimators
from pplgrad.pyro._compile import broadcast_sinking
from pplgrad.pyro._compile.broadcast_sinking import sink_broadcasts
from pplgrad.testing.in_pyro import HOST, assert_same, fresh, gradient
from pplgrad.testing.programs import CASES
from tests.covering import mostly
from tests.pyro.compiling import CHEAP, assert_drawn_by_the_law, assert_same_training, graphs, train

LEARNED = ScoreFunction(DecayingAverage() + NeuralBaseline(hidden=(3,)))


# Programs of one latent site, a parameter under a constraint, and what they read beside.


def program(read=lambda: torch.tensor(0.7), after=lambda z: None):
    """Return a model that observes `read()`, and its guide."""

    def model(*args):
        scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        after(z)
        pyro.sample("x", dist.Normal(z, scale), obs=read(*args))

    def guide(*args):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.2))))

    return model, guide


def step(elbo, model, guide, *args, seed=0):
    """Return loss and gradient of one step from the same parameters."""
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(model, guide, *args)
    return {"loss": np.array(loss), **gradient()}


def compiled(model, guide, *args, **options):
    """Return an ELBO that has compiled the program, with the other options of its constructor."""
    elbo = TraceGrad_ELBO(**{"estimators": {"*": ScoreFunction()}, "compile": CHEAP, **options})
    for _ in range(4):
        step(elbo, model, guide, *args)
    assert graphs(elbo) >= 1
    return elbo


def assert_right(elbo, model, guide, *args, **options):
    """Compare the next steps with those of a new eager ELBO, until it has compiled again."""
    for _ in range(4):
        wanted = step(TraceGrad_ELBO(estimators={"*": ScoreFunction()}, **options), model, guide, *args)
        assert_same(step(elbo, model, guide, *args), wanted)


def test_svi_trains_as_eagerly():
    ends = []
    for given in (False, CHEAP):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        elbo = TraceGrad_ELBO(estimators={"*": LEARNED}, compile=given)
        svi = SVI(*program(), pyro.optim.Adam({"lr": 0.05}), elbo)
        losses = [svi.step() for _ in range(12)]
        ends.append((losses, {k: v.detach().numpy() for k, v in pyro.get_param_store().named_parameters()}))
    assert graphs(elbo) == 1
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-12)
    assert_same(*(names for _, names in ends))
    assert abs(ends[0][1]["a"] - 0.2) > 0.05


def test_draws_are_fresh_and_seeds_are_honoured():
    case = CASES["subsampled"]
    fresh(case)
    model, guide = case.build(HOST)
    elbo = compiled(model, guide)

    def several():
        return [elbo.loss_and_grads(model, guide) for _ in range(20)]

    pyro.set_rng_seed(5)
    first, second = several(), several()
    pyro.set_rng_seed(5)
    again = several()
    assert first == again and first != second
    # A minibatch of 2 of 3 and two draws of a Bernoulli each give more than two values.
    assert len(set(first)) > 2


def test_gradients_add_up_and_share_no_memory():
    model, guide = program()
    elbo = compiled(model, guide)
    once = step(elbo, model, guide)
    pyro.set_rng_seed(0)
    elbo.loss_and_grads(model, guide)
    leaf = dict(pyro.get_param_store().named_parameters())["a"]
    kept = leaf.grad
    pyro.set_rng_seed(0)
    elbo.loss_and_grads(model, guide)
    assert leaf.grad is kept
    np.testing.assert_allclose(leaf.grad, 2 * once["a"], rtol=1e-12)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_parameters_with_equal_gradients_keep_them_apart(backend):
    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        mean = pyro.param("first", torch.tensor(0.5)) + pyro.param("second", torch.tensor(0.5)) + z
        pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor(0.7))

    _, guide = program()
    elbo = compiled(model, guide, compile={"backend": backend})
    once = step(elbo, model, guide)
    for _ in range(2):
        pyro.set_rng_seed(0)
        elbo.loss_and_grads(model, guide)
    twice = gradient()
    if backend == "eager":
        assert_same(twice, {name: 2 * once[name] for name in twice})
    np.testing.assert_allclose(twice["first"], twice["second"])
    leaves = dict(pyro.get_param_store().named_parameters())
    step(elbo, model, guide)
    elbo.loss_and_grads(model, guide)
    assert leaves["first"].grad.data_ptr() != leaves["second"].grad.data_ptr()


class Holder:
    """Somewhere to keep things."""


def changes():
    """Yield (name, what the program reads, what changes it)."""
    holder, data, inner = Holder(), {"x": torch.tensor(0.7)}, [torch.tensor(0.7)]
    holder.x, holder.number = torch.tensor(0.7), 0.7
    network = torch.nn.BatchNorm1d(1)
    prior = dist.Normal(torch.tensor(0.7), 1.0)
    large, dropout = np.full(2000, 0.7), torch.nn.Dropout(0.5)
    free = torch.nn.Parameter(torch.tensor(0.7))
    cell = torch.tensor(0.7)

    def replace_cell():
        nonlocal cell
        cell = torch.tensor(-0.4)

    yield "in place", lambda: inner[0], lambda: inner[0].mul_(-2)
    yield "attribute", lambda: holder.x, lambda: setattr(holder, "x", torch.tensor(-0.4))
    yield "number", lambda: torch.tensor(holder.number), lambda: setattr(holder, "number", -0.4)
    yield "dict", lambda: data["x"], lambda: data.update(x=torch.tensor(-0.4))
    yield "cell", lambda: cell, replace_cell
    yield "buffer", lambda: network.running_mean[0] + 0.7, lambda: network.running_mean.fill_(2.0)
    yield "distribution", lambda: prior.loc, lambda: setattr(prior, "loc", torch.tensor(-0.4))
    yield "array", lambda: torch.tensor(large[1500]), lambda: large.__setitem__(1500, -0.4)
    yield "rate", lambda: dropout(torch.tensor(0.7)), lambda: setattr(dropout, "p", 0.0)
    yield "mode", lambda: dropout(torch.tensor(0.7)), lambda: dropout.eval()
    yield "shape", lambda: holder.x.sum(), lambda: setattr(holder, "x", torch.ones(3))
    yield "parameter", lambda: free, lambda: free.data.fill_(3.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, *_ in changes()])
def test_what_a_program_reads_is_never_stale(name):
    read, change = {each: found for each, *found in changes()}[name]
    model, guide = program(read)
    elbo = compiled(model, guide)
    before = step(elbo, model, guide)
    change()
    assert_right(elbo, model, guide)
    assert not np.isclose(step(elbo, model, guide)["loss"], before["loss"])


def test_an_argument_that_is_also_read_by_the_program():
    data = torch.tensor(0.7)
    model, guide = program(lambda x: x + data)
    elbo = compiled(model, guide, data)
    assert_right(elbo, model, guide, torch.tensor(-1.0))
    assert_right(elbo, model, guide, data)


def test_arguments_of_any_layout():
    model, guide = program(lambda x, more: (x["rows"] @ x["rows"].mT).sum() + more[0])
    elbo = compiled(model, guide, {"rows": torch.randn(3, 2)}, [torch.tensor(1.0)])
    assert_right(elbo, model, guide, {"rows": torch.randn(2, 3).mT}, [torch.tensor(2.0)])
    assert elbo._compiler.graphs_made == 1


def test_tensors_of_numbers_like_another():
    model, guide = program(lambda x: (x.new_tensor([0.3, 0.4]) * x).sum())
    elbo = compiled(model, guide, torch.tensor(0.7))
    assert_right(elbo, model, guide, torch.tensor(-0.2))


def test_autocast_around_several_steps():
    """Autocast keeps the parameters that it has cast; a recorded step casts them as they are."""
    weight = torch.tensor([[0.3, -0.2], [0.5, 0.4]], dtype=torch.float32)

    def model(x):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3)).to_event(1))
        pyro.sample("x", dist.Normal((z.float() @ pyro.param("w", weight)).float(), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(2))).to_event(1))

    x = torch.tensor([0.5, 1.5], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        elbo = compiled(model, guide, x)
    with torch.no_grad():
        dict(pyro.get_param_store().named_parameters())["w"].add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(elbo, model, guide, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(found, step(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), model, guide, x))


def test_objectives_and_baselines_may_read_tensors_and_numbers():
    weight, offset = [0.5], [torch.tensor(1.0)]
    chosen = {"z": ScoreFunction(FunctionBaseline(lambda: offset[0]))}
    options = {"objective": ELBO(kl_weight=lambda: weight[0]), "estimators": chosen}
    model, guide = program()
    elbo = compiled(model, guide, **options)
    weight[0] = 0.1
    for _ in range(4):
        assert_same(step(elbo, model, guide), step(TraceGrad_ELBO(**options), model, guide))
    offset[0] = torch.tensor(-7.0)
    assert_same(step(elbo, model, guide), step(TraceGrad_ELBO(**options), model, guide))
    offset[0] = torch.tensor(np.inf)
    with pytest.raises(BaselineError, match="'z'"):
        step(elbo, model, guide)


def test_parameters_that_vanish_or_change():
    model, guide = program()
    elbo = compiled(model, guide)
    pyro.clear_param_store()
    assert_right(elbo, model, guide)
    assert elbo._compiler.graphs_made == 1
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(0.4), constraint=constraints.greater_than(0.1))
    pyro.param("a", torch.tensor(-0.3))
    assert_right(elbo, model, guide)
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor([0.4]), constraint=constraints.positive)
    assert_right(elbo, model, guide)


def test_modules_and_autoguides():
    network = torch.nn.Linear(1, 1)

    def model():
        pyro.module("network", network)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(network(w[..., None])[..., 0], 1.0), obs=torch.tensor(0.3))

    guide = AutoNormal(model)
    guide()
    elbo = TraceGrad_ELBO(compile=CHEAP)
    for seed in range(6):
        assert_same(step(elbo, model, guide, seed=seed), step(TraceGrad_ELBO(), model, guide, seed=seed))
    assert graphs(elbo) == 1
    assert pyro.get_param_store().get_state()["params"]["network$$$weight"] is network.weight


class Regression(PyroModule):
    """Weights with a prior, a constrained parameter, a buffer, a minibatch; its prior checks values."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[torch.nn.Linear](2, 1)
        self.net.weight = PyroSample(dist.Normal(0.0, 1.0, validate_args=True).expand([1, 2]).to_event(2))
        self.noise = PyroParam(torch.tensor(1.0), constraint=constraints.positive)
        self.register_buffer("offset", torch.tensor(0.1))

    def forward(self, x, y):
        mean = self.net(x)[..., 0] + self.offset
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("y", dist.Normal(mean[index], self.noise), obs=y[index])


def test_pyro_modules_under_svi():
    x, y = torch.randn(6, 2), torch.randn(6)
    ends = []
    for given in (False, CHEAP):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Regression()
        elbo = TraceGrad_ELBO(compile=given)
        svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), elbo)
        losses = [svi.step(x, y) for _ in range(8)]
        ends.append((losses, {k: v.detach().numpy().copy() for k, v in pyro.get_param_store().named_parameters()}))
    assert graphs(elbo) == 1
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=1e-12)
    assert_same(ends[1][1], ends[0][1])


def test_writes_into_lists_and_into_what_a_view_shows():
    def after(z):
        row = torch.zeros(2)
        view = row[0]
        torch._foreach_add_([row], [z * torch.ones(2)])
        pyro.factor("f", view + row[1])

    model, guide = program(after=after)
    elbo = compiled(model, guide)
    for seed in range(4):
        wanted = step(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), model, guide, seed=seed)
        assert_same(step(elbo, model, guide, seed=seed), wanted)


def test_a_network_with_state_of_its_own():
    """Batch normalisation writes into its buffers; the graph does so too."""
    ends = []
    for given in (False, CHEAP):
        pyro.clear_param_store()
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        x = torch.randn(4, 2)

        def model(x, network=network):
            pyro.module("network", network)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(0.4))
                pyro.sample("x", dist.Normal(network(x) + z[:, None], 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(len(x)))))

        elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()}, compile=given)
        seen, store = train(elbo, model, guide, (x,))
        ends.append((seen, store, {name: b.numpy().copy() for name, b in network.named_buffers()}))
    assert graphs(elbo) == 1
    for wanted, found in zip(ends[0][0], ends[1][0], strict=True):
        assert_same(found, wanted)
    assert_same(ends[1][1], ends[0][1])
    assert_same(ends[1][2], ends[0][2])
    assert ends[1][2]["1.num_batches_tracked"] == 5


def test_a_watch_sees_every_step():
    model, guide = program()
    seen = []
    guide = config_estimators(guide, {"z": ScoreFunction()}, watch=Watch(seen.append, every=1))
    elbo = TraceGrad_ELBO(compile=CHEAP)
    for _ in range(6):
        step(elbo, model, guide)
    assert graphs(elbo) == 1 and len(seen) == 6


def test_new_shapes_are_compiled_until_there_are_too_many():
    model, guide = program(lambda x: x.mean())
    elbo = compiled(model, guide, torch.ones(2), compile={**CHEAP, "graphs": 3})
    for size in (3, 4):
        assert_right(elbo, model, guide, torch.ones(size))
    assert elbo._compiler.graphs_made == 3
    with pytest.warns(UserWarning, match="has compiled 3 graphs"):
        assert_right(elbo, model, guide, torch.ones(5))
    assert_right(elbo, model, guide, torch.ones(6))
    assert_right(elbo, model, guide, torch.ones(4))
    assert elbo._compiler.graphs_made == 3


def test_a_number_that_is_another_at_every_step_is_told():
    model, guide = program(lambda x: torch.tensor(x))
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile={**CHEAP, "graphs": 1})
    with pytest.warns(UserWarning, match="another kind at almost every step"):
        for i in range(8):
            step(elbo, model, guide, float(i))


# What only the real compiler can show.


@pytest.mark.slow
def test_inductor_draws_afresh_and_without_bias():
    """One compilation: repeatable after a seed, other numbers at each call, and the exact gradient on average."""
    model, guide = program(lambda: torch.tensor([0.7, -0.4]).sum())
    elbo = compiled(model, guide, compile=True)
    pyro.set_rng_seed(5)
    first = [elbo.loss_and_grads(model, guide) for _ in range(30)]
    pyro.set_rng_seed(5)
    assert first == [elbo.loss_and_grads(model, guide) for _ in range(30)] and len(set(first)) == 2
    gradient()
    assert_drawn_by_the_law(elbo, model, guide, ["z"], ["a", "scale"])


@pytest.mark.slow
def test_inductor_computes_a_chain_in_one_kernel_without_bias():
    """Sites that depend on each other, one kernel for all: other draws at each call, and the exact gradient on average."""

    def model():
        z = torch.tensor(0.0)
        for t in range(3):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=pyro.param("b", torch.tensor([0.4, -0.6]))[int(t > 0)] + z))
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=torch.tensor(0.9 - t))

    def guide():
        q, z = pyro.param("q", torch.tensor([0.2, -0.3, 0.5])), torch.tensor(0.0)
        for t in range(3):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=q[t] - 0.7 * z))

    elbo = compiled(model, guide, compile=True)
    pyro.set_rng_seed(7)
    assert_drawn_by_the_law(elbo, model, guide, ["z0", "z1", "z2"], ["q", "b"])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_inductor_takes_large_draws_from_the_generator(one_thread, monkeypatch):
    """The numbers that torch gives eagerly, one after the other, and the gradient of the recorded operations."""
    sunk = []
    monkeypatch.setattr(broadcast_sinking, "sink_broadcasts", lambda graph: sunk.append(sink_broadcasts(graph)))
    rows = torch.linspace(-2, 2, 600, dtype=torch.float64)

    def model():
        with pyro.plate("rows", 600), poutine.scale(scale=1 / 600):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=rows)

    def guide():
        with pyro.plate("rows", 600), poutine.scale(scale=1 / 600):
            z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.2))))
            pyro.sample("w", dist.Normal(pyro.param("b", torch.tensor(0.1)) + z, 1.0))

    results = []
    for backend in (drawn_as_the_inductor_does, "inductor"):
        pyro.clear_param_store()
        elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()}, compile={"backend": backend})
        with torch._inductor.config.patch(force_disable_caches=True):
            results.append(train(elbo, model, guide, steps=8))
        assert graphs(elbo) == 1
    assert_same_training(*results)
    assert len(sunk) == 1
    seen = [elbo.loss_and_grads(model, guide) for _ in range(20)]
    assert len(set(seen)) == 20


@pytest.mark.slow
def test_inductor_gives_the_gradient_of_eager_steps():
    """Summed over both values of the site, the gradient does not depend on the draw: the same to rounding."""
    model, guide = program()
    chosen = {"estimators": {"z": LocalExpectation()}}
    elbo = compiled(model, guide, compile=True, **chosen)
    for seed in range(3):
        wanted = step(TraceGrad_ELBO(**chosen), model, guide, seed=seed)
        found = step(elbo, model, guide, seed=seed)
        np.testing.assert_allclose(found["a"], wanted["a"], rtol=1e-12)
        assert abs(found["a"]) > 1e-3


def drawn_as_the_inductor_does(graph, inputs):
    """Return a graph that runs operation by operation, with the inductor's way to draw from a Bernoulli."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.bernoulli.default:
            node.target = lambda p: (torch.rand_like(p, dtype=torch.float32) < p).to(p.dtype)
    graph.recompile()
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(["chain", "mixed"], ["chain", "five", "mixed", "categorical_index"]))
def test_inductor_computes_what_was_recorded(name):
    """Told to take its random numbers from torch's generator, it gives the gradient of the recorded operations."""
    results = []
    for backend in (drawn_as_the_inductor_does, "inductor"):
        fresh(CASES[name])
        with torch._inductor.config.patch(fallback_random=True):
            elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile={"backend": backend})
            results.append(train(elbo, *CASES[name].build(HOST), steps=8))
        assert graphs(elbo) == 1
    assert_same_training(*results)


@pytest.mark.parametrize("change", ["hook", "forward", "hook of a layer"])
def test_what_is_put_into_a_default_network_is_seen(change):
    """Its parameters alone are found in the param store: the guard does not go through the modules of all sites."""
    from pplgrad import NeuralBaseline, ScoreFunction

    model, guide = CASES["chain"].build(HOST)
    fresh(CASES["chain"])
    chosen = {"*": ScoreFunction(NeuralBaseline())}
    elbo = TraceGrad_ELBO(compile=CHEAP, max_plate_nesting=0, estimators=chosen)

    def gradients(elbo):
        pyro.set_rng_seed(1)
        elbo.loss_and_grads(model, guide)
        return gradient()

    for _ in range(3):
        before = gradients(elbo)
    assert graphs(elbo) == 1
    network = next(iter(elbo._networks.modules.values()))
    if change == "hook":
        network.register_forward_hook(lambda module, x, out: out + 3.0)
    elif change == "forward":
        network.forward = lambda x: x.new_full((*x.shape[:-1], 1), 3.0) + network[0](x)
    else:
        network[0].register_forward_hook(lambda module, x, out: out + 3.0)
    after = gradients(elbo)
    assert any(abs(after[name] - before[name]).max() > 1e-3 for name in after if "baseline" not in name)
