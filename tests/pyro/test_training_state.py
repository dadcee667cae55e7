"""A training that was saved and goes on in new objects gives the losses of the uninterrupted one, bit for bit."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ClippedAdam, RMSprop

from pplgrad import Auto, ConfigurationError, Watch
from pplgrad.pyro import (
    TraceGrad_ELBO,
    config_estimators,
    joint_optimizer,
    load_training_state,
    split_optimizer,
    training_state,
)
from pplgrad.pyro._reuse import dependency_structure
from tests.pyro.compiling import CHEAP
from tests.resuming import CHOICES, DATA, chosen, program

X = torch.tensor(DATA)


def made(choice, watch=None, seed=0, optimizer=None, **options):
    """Return an `SVI` as a new process would make it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = program(pyro, dist, lambda x: torch.as_tensor(x, dtype=torch.float64), torch.exp)
    optimizer = split_optimizer(Adam({"lr": 0.05}), Adam({"lr": 0.1})) if optimizer is None else optimizer()
    return SVI(model, config_estimators(guide, chosen(choice), watch=watch), optimizer, TraceGrad_ELBO(**options))


def saved(svi):
    """Return the state as a file would give it back."""
    file = io.BytesIO()
    torch.save(training_state(svi), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def interrupted(make, before, after, change=lambda state: None):
    """Return the losses of an uninterrupted training, and of one that goes on in new objects, with the parameters of both."""
    svi = make(seed=0)
    for _ in range(before):
        svi.step(X)
    state = saved(svi)
    losses = [[svi.step(X) for _ in range(after)]]
    params = [{name: x.detach().clone() for name, x in pyro.get_param_store().items()}]
    change(state)
    svi = make(seed=99)
    load_training_state(svi, state, X)
    losses.append([svi.step(X) for _ in range(after)])
    params.append(dict(pyro.get_param_store().items()))
    return losses, params


def assert_same(losses, params):
    assert losses[0] == losses[1]
    assert params[0].keys() == params[1].keys()
    for name, x in params[0].items():
        assert torch.equal(x, params[1][name]), name


HOW = {
    "one": {},
    "looped": {"num_particles": 2},
    "vectorized": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
    "watched": {"reuse_structure": False},
    "compiled": {"compile": CHEAP},
    "compiled particles": {
        "num_particles": 2,
        "vectorize_particles": True,
        "max_plate_nesting": 1,
        "compile": CHEAP,
    },
}


@pytest.mark.grid
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("before", [1, 2, 3, 4, 9])
def test_goes_on_with_the_same_bits(choice, how, before):
    # Long enough for steps that are watched anew (the 2nd, 4th, 8th and 16th use), before and after.
    assert_same(*interrupted(lambda seed: made(choice, seed=seed, **HOW[how]), before, 14))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["optimizer"].clear(),
        lambda state: state["random"].update(torch={"cpu": torch.Generator().manual_seed(3).get_state()}),
        lambda state: [x.zero_() for name, x in state["params"].items() if "baseline" in name and x.dim() == 1],
        lambda state: state["params"]["logits"].add_(1e-12),
        lambda state: state["structures"]["uses"].clear(),
    ],
    ids=["optimizer", "random numbers", "averages", "parameters", "structure"],
)
def test_every_part_of_the_state_is_needed(change):
    # Networks that are watched are evaluated one by one, and those of a known program in one product: other bits.
    losses, params = interrupted(lambda seed: made("average + network per element", seed=seed), 9, 14, change)
    with pytest.raises(AssertionError):
        assert_same(losses, params)


def batches(svi, steps, start=0):
    """Take steps whose last one of three has fewer rows, with a bound now and then, and return what was computed."""
    found = []
    for step in range(start, start + steps):
        found.append(svi.step(X[:10] if step % 3 == 2 else X))
        if step % 4 == 1:
            found.append(svi.evaluate_loss(X))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one", "vectorized", "compiled", "compiled particles"])
@pytest.mark.parametrize("choice", ["networks", "REBAR", "every value"])
def test_batches_of_other_sizes_go_on_too(choice, how):
    svi = made(choice, **HOW[how])
    batches(svi, 13)
    state = saved(svi)
    wanted = batches(svi, 14, 13)
    svi = made(choice, seed=99, **HOW[how])
    # At arguments of one kind; the other is found when it comes.
    load_training_state(svi, state, X)
    # A training that is saved again before it has met the other kind knows of both.
    assert svi.loss.__self__._structures.resumed
    assert saved(svi)["structures"]["uses"].keys() == state["structures"]["uses"].keys()
    assert batches(svi, 14, 13) == wanted


def test_a_watch_goes_on_where_it_was():
    records = []

    def make(seed):
        return made("average", Watch(records.append, every=4, draws=2), seed)

    losses, params = interrupted(make, 6, 10)
    assert_same(losses, params)
    assert [record["step"] for record in records] == [0, 4, 8, 12, 8, 12]
    assert records[2:4] == records[4:]
    # Without a watch other steps find the structure anew, which is a matter of rounding.
    plain, _ = interrupted(lambda seed: made("average", seed=seed), 6, 10)
    assert losses[0] == pytest.approx(plain[0], rel=1e-9)


class Net(torch.nn.Module):
    """A network with statistics of batches, and random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.3))
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.layers(x)).sum(-1)


def svi_of(net, **options):
    """Return an `SVI` whose guide is a function that registers a network."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=net(x)))

    return SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO(**options))


@pytest.mark.parametrize("how", ["one", "compiled"])
def test_modules_and_their_statistics_go_on(how):
    nets = []

    def make(seed):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        nets.append(Net())
        return svi_of(nets[-1], **HOW[how])

    svi = make(0)
    for _ in range(5):
        svi.step(X)
    state = copy.deepcopy(training_state(svi, modules={"net": nets[0]}))
    wanted = [svi.step(X) for _ in range(8)]
    svi = make(99)
    load_training_state(svi, state, X, modules={"net": nets[1]})
    assert [svi.step(X) for _ in range(8)] == wanted
    for x, y in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(x, y)
    svi = make(99)
    with pytest.raises(ConfigurationError, match="the buffers of modules net"):
        load_training_state(svi, state, X, modules={"net": torch.nn.Linear(2, 2)})


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: Adam({"lr": 0.05}, {"clip_norm": 1.0}),
        lambda: joint_optimizer(ClippedAdam({"lr": 0.05, "lrd": 0.9})),
        lambda: pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-3}, "gamma": 0.9}),
        lambda: split_optimizer(RMSprop({"lr": 0.01}), pyro.optim.AdagradRMSProp({"eta": 0.5})),
    ],
    ids=["clipped", "joint", "schedule", "split"],
)
def test_every_optimizer_goes_on(optimizer):
    assert_same(*interrupted(lambda seed: made("networks", seed=seed, optimizer=optimizer), 5, 8))


def test_an_autoguide_goes_on():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=x[:, 0])

    def make(seed):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        return SVI(model, config_estimators(AutoNormal(model)), Adam({"lr": 0.05}), TraceGrad_ELBO())

    assert_same(*interrupted(make, 5, 8))


def test_what_does_not_fit_is_refused():
    svi = made("average")
    with pytest.raises(ConfigurationError, match="take a step before you save"):
        training_state(svi)
    svi.step(X)
    state = saved(svi)
    with pytest.raises(ConfigurationError, match="the loss of svi is no TraceGrad_ELBO"):
        training_state(SVI(svi.model, svi.guide, svi.optim, pyro.infer.Trace_ELBO()))
    with pytest.raises(ConfigurationError, match=r"not one that training_state\(svi\) returned"):
        load_training_state(svi, {}, X)
    other = made("networks")
    with pytest.raises(ConfigurationError, match=r"the saved training has 'pplgrad.baseline.z_1.0.mean'"):
        load_training_state(other, state, X)
    state["params"] = {name: x for name, x in state["params"].items() if "baseline" not in name}
    with pytest.raises(
        ConfigurationError, match=r"the program registers .*'pplgrad.baseline.z_1.0.mean'.* does not have"
    ):
        load_training_state(made("average"), state, X)
    state = {**state, "params": {**state["params"], "loc": torch.zeros(2)}}
    with pytest.raises(ConfigurationError, match=r"parameter 'loc' has shape \(3,\)"):
        load_training_state(made("every value"), state, X)


@pytest.mark.slow
def test_a_choice_by_time_is_refused():
    model, guide = program(pyro, dist, lambda x: torch.as_tensor(x, dtype=torch.float64), torch.exp)
    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO(2, estimators={"z_1": Auto(measure=True, seconds=0.2)}))
    svi.step(X)
    with pytest.raises(ConfigurationError, match=r"site 'z_1' is under Auto\(measure=True\)"):
        training_state(svi)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal draws", "statistics"])
def test_how_often_time_allows_to_look_moves_no_bit(kind, monkeypatch):
    """A compiled step is looked at again as far as time allows; whether it was is not seen in the losses."""

    def losses(share):
        monkeypatch.setattr(dependency_structure, "_SHARE", share)
        if kind == "normal draws":
            svi = made("average", compile=True)
        else:
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            svi = svi_of(Net(), compile=True)
        return [svi.step(X) for _ in range(40)]

    assert losses(0.0) == losses(1e9)
