"""Watching a run in Pyro: the numbers are right, training is as without, and files can be read."""

import copy
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger

from pplgrad import (
    IWAE,
    REBAR,
    TVO,
    ConfigurationError,
    DecayingAverage,
    FunctionBaseline,
    GumbelSoftmax,
    NeuralBaseline,
    ReweightedWakeSleep,
    ScoreFunction,
    Watch,
)
from pplgrad.pyro import TraceGrad_ELBO, config_estimators
from tests import watching

X = torch.tensor(watching.X)
MODEL, GUIDE = watching.program(pyro, dist, torch.tensor)


def train(steps, estimators=None, watch=None, lr=0.05, model=MODEL, guide=GUIDE, elbo=None):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    wrapped = config_estimators(guide, estimators or {}, watch=watch)
    svi = SVI(model, wrapped, Adam({"lr": lr}), elbo or TraceGrad_ELBO())
    return [svi.step(X) for _ in range(steps)]


class Strata(Messenger):
    """Makes each site's draws, one after the other, the middles of equally likely parts: few of them have the moments of many random ones."""

    only_draws = True

    def __init__(self, count):
        super().__init__()
        self.count, self.orders, self.visits = count, {}, {}

    def _pyro_sample(self, msg):
        name, fn = msg["name"], msg["fn"]
        if name not in ("z", "w") or msg["is_observed"] or msg["done"]:
            return
        # An order of its own for each site, or the sites would depend on each other.
        order = self.orders.setdefault(name, np.random.default_rng(ord(name)).permutation(self.count))
        turn = self.visits[name] = self.visits.get(name, -1) + 1
        below = torch.tensor((order[turn % self.count] + 0.5) / self.count)
        normal = isinstance(fn, dist.Normal)
        msg["value"] = fn.loc + fn.scale * torch.special.ndtri(below) if normal else (below < fn.probs).to(below.dtype)
        msg["done"] = True


@pytest.mark.slow
def test_numbers_are_those_of_enumeration():
    records = []
    baseline = FunctionBaseline(lambda x: torch.tensor(watching.LEVELS))
    with Strata(300):
        train(1, {"z": ScoreFunction(baseline)}, Watch(records.append, draws=300))
    watching.check(records[0], watching.LEVELS)
    # Nothing is left to chance.
    for name, value in watching.expected(watching.LEVELS).items():
        np.testing.assert_allclose(records[0]["sites"]["z"][name], value, rtol=0.01, err_msg=name)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_particles_looped_and_vectorized_are_watched_alike():
    baseline = FunctionBaseline(lambda x: torch.tensor(watching.LEVELS))
    for vectorize in (False, True):
        records = []
        elbo = TraceGrad_ELBO(4, vectorize_particles=vectorize, max_plate_nesting=1)
        train(1, {"z": ScoreFunction(baseline)}, Watch(records.append, draws=1500), elbo=elbo)
        found, wanted = records[0]["sites"]["z"], watching.expected(watching.LEVELS)
        np.testing.assert_allclose(found["gradient_variance"], wanted["gradient_variance"] / 4, rtol=0.1)
        np.testing.assert_allclose(found["signal_to_noise"], wanted["signal_to_noise"] * 2, rtol=0.1)
        np.testing.assert_allclose(found["explained_variance"], wanted["explained_variance"], atol=0.03)


def test_training_is_the_same_with_and_without():
    estimators = {"z": ScoreFunction(DecayingAverage() + NeuralBaseline())}
    seen = []
    watched = train(7, estimators, Watch(seen.append, every=3))
    state = {name: x.detach().clone() for name, x in pyro.get_param_store().items()}
    assert [record["step"] for record in seen] == [0, 3, 6]
    np.testing.assert_allclose(watched, train(7, estimators), rtol=1e-12)
    for name, x in pyro.get_param_store().items():
        np.testing.assert_allclose(x.detach(), state[name], rtol=1e-12)


def test_what_estimators_are_set_to_and_what_they_learn():
    seen = []
    train(3, {"z": REBAR(temperature=0.5, scale=2.0)}, Watch(seen.append, every=1))
    numbers = [record["sites"]["z"] for record in seen]
    assert numbers[0]["temperature"] == pytest.approx(0.5) and numbers[0]["scale"] == 2.0
    assert numbers[2]["temperature"] != pytest.approx(0.5) and "log_temperature" not in numbers[0]
    step = iter(range(100))
    train(2, {"z": GumbelSoftmax(lambda x: 0.5 + 0.1 * (next(step) > 8))}, Watch(seen.append, every=1))
    assert seen[-2]["sites"]["z"]["temperature"] == 0.5 and seen[-1]["sites"]["z"]["temperature"] == 0.6


def test_a_collapsing_site_shows():
    """Without data the posterior is the prior, and a prior of almost one value has almost no entropy."""

    def model(x):
        pyro.sample("z", dist.Bernoulli(0.01))

    def guide(x):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.0))))

    seen = []
    train(120, {}, Watch(seen.append, every=40), 0.2, model, guide, TraceGrad_ELBO(8))
    entropies = [record["sites"]["z"]["entropy"] for record in seen]
    assert entropies[0] == pytest.approx(np.log(2)) and entropies[2] < 0.2


def test_event_files_hold_what_the_callback_gets(tmp_path):
    seen = []
    train(5, {}, Watch(seen.append, tensorboard=tmp_path, every=2))
    found = watching.written(tmp_path)
    for tag, value in watching.flat(seen[1]).items():
        assert [step for step, _ in found[tag]] == [0, 2, 4]
        assert found[tag][1][1] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", watching.FITTING, ids=lambda e: type(e).__name__)
def test_every_estimator_can_be_watched(estimator):
    seen = []
    train(2, {"z": estimator}, Watch(seen.append, every=1), elbo=TraceGrad_ELBO(2))
    # A sum over both values has no variance, and infinitely more signal than noise.
    assert not np.isnan(list(watching.flat(seen[1]).values())).any(), seen[1]


def test_other_objectives():
    for objective in (IWAE(plates=()), ReweightedWakeSleep(plates=()), TVO(plates=())):
        seen = []
        train(1, {}, Watch(seen.append), elbo=TraceGrad_ELBO(3, objective=objective))
        assert np.isfinite(list(watching.flat(seen[0]).values())).all()


def test_a_copied_guide_is_a_run_of_its_own():
    seen = []
    guide = config_estimators(GUIDE, watch=Watch(seen.append, every=2))
    for one in (guide, copy.deepcopy(guide)):
        TraceGrad_ELBO().loss_and_grads(MODEL, one, X)
    assert [record["step"] for record in seen] == [0, 0]


def test_refusals(monkeypatch):
    with pytest.raises(ConfigurationError, match="give a callback, or a folder"):
        Watch()
    with pytest.raises(ConfigurationError, match=r"Watch\(every=0\)"):
        Watch(print, every=0)
    with pytest.raises(ConfigurationError, match=r"Watch\(draws=1\)"):
        Watch(print, draws=1)
    with pytest.raises(ConfigurationError, match="function of a dict; got str"):
        Watch("runs")
    with pytest.raises(ConfigurationError, match="takes a Watch, such as"):
        config_estimators(GUIDE, watch=print)
    twice = config_estimators(config_estimators(GUIDE, watch=Watch(print)), watch=Watch(print))
    with pytest.raises(ConfigurationError, match="Two wrappers of the guide have a watch"):
        TraceGrad_ELBO().loss_and_grads(MODEL, twice, X)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'pplgrad\[watch\]'"):
        Watch(tensorboard="runs")


class Difficult:
    """An object that answers a question for what it does not have with another error than `AttributeError`, as Pydantic's do."""

    __slots__ = ()

    def __getattr__(self, name):
        raise RuntimeError("not now")


def test_objects_that_raise_when_they_are_looked_at():
    difficult, shown = Difficult(), []

    def callback(record):
        shown.append(record["step"])
        return difficult

    train(3, {}, Watch(callback, every=2))
    assert shown == [0, 2]

    def guide(x):
        return GUIDE(x) if difficult is not None else None

    assert len(train(3, guide=guide)) == 3
