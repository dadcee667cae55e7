"""Compiled steps give the gradient of eager ones for every program, estimator and objective."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import (
    IWAE,
    RELAX,
    TVO,
    DecayingAverage,
    DisARM,
    Expectation,
    GumbelSoftmax,
    LocalExpectation,
    MuProp,
    NeuralBaseline,
    Renyi,
    ReweightedWakeSleep,
    ScoreFunction,
)
from pplgrad.core.objectives import ELBO
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._rerun.branches import PyroBranches
from pplgrad.testing.programs import CASES
from tests.fitting import CONTINUOUS, DISCRETE, fitting
from tests.pyro.compiling import CHEAP, assert_like_eager, assert_same_training, graphs, train

BRANCHING = {
    "disarm": DisARM(),
    "disarm-all": DisARM(differentiate="all"),
    "local": LocalExpectation(),
    "muprop": MuProp(),
    "relax": RELAX(),
}
LEARNED = ScoreFunction(DecayingAverage() + NeuralBaseline(hidden=(3,)))


@pytest.fixture
def one_generator(monkeypatch):
    """Let the generator go on in eager branches too, as it does in a graph, but not in what is compared while a step is watched."""
    aside = torch.random.fork_rng
    for name in ("alone", "_compare_second_run"):
        compare = getattr(PyroBranches, name)

        def unseen(self, *given, compare=compare):
            with aside():
                return compare(self, *given)

        monkeypatch.setattr(PyroBranches, name, unseen)
    monkeypatch.setattr("torch.random.fork_rng", lambda devices=None: nullcontext())
    monkeypatch.setattr("pplgrad.pyro._tracing.particle_trace.Traces.restore_rng", lambda self: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_program_with_learned_baselines(name):
    chosen = dict.fromkeys(CASES[name].latents, LEARNED)
    assert_like_eager(CASES[name], estimators=chosen, steps=4)


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [False, True], ids=["looped", "vectorized"])
@pytest.mark.parametrize("name", ["mixed", "subsampled", "both_kinds_in_one_plate"])
def test_several_particles(name, vectorized):
    assert_like_eager(CASES[name], 2, vectorized)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", list(BRANCHING.values()), ids=list(BRANCHING))
def test_branches_one_after_the_other(estimator, one_generator):
    """RELAX and MuProp have slopes, RELAX a learned control variate with learned numbers."""
    assert_like_eager(CASES["hierarchy"], 2, estimators={"*": estimator}, steps=4)


@pytest.mark.slow
def test_relaxations_and_bounds():
    assert_like_eager(CASES["hierarchy"], estimators={"*": GumbelSoftmax(0.5)})
    assert_like_eager(CASES["hierarchy"], 3, objective=IWAE())
    assert_like_eager(CASES["subsampled"], 2, True, objective=IWAE(plates=()))


def normals(model):
    """Return one side of a program of a Normal site above Bernoulli data."""

    def run(x):
        loc = pyro.param("p" if model else "q", torch.tensor([0.3, -0.2], dtype=torch.float64))
        w = pyro.sample("w", dist.Normal(loc[0], 0.8 + 0.1 * loc[1] ** 2))
        with pyro.plate("data", 3):
            if model:
                pyro.sample("x", dist.Bernoulli(logits=loc[1] + w), obs=x)

    return run


def sleepers(model):
    """Return one side of a program of a Bernoulli and a Normal site in a plate, in which the guide sees the data."""

    def run(x):
        p = pyro.param("p" if model else "q", torch.tensor([0.3, -0.2, 0.6], dtype=torch.float64))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(logits=p[0] + (0.0 if model else p[1] * x)))
            w = pyro.sample("w", dist.Normal(p[2] * z, 1.1))
            if model:
                pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    return run


def assert_trains_like_eager(program, particles, **options):
    args = (torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64),)
    results = []
    for given in (False, CHEAP):
        pyro.clear_param_store()
        elbo = TraceGrad_ELBO(particles, vectorize_particles=True, max_plate_nesting=1, compile=given, **options)
        results.append(train(elbo, program(True), program(False), args))
    assert graphs(elbo) == 1
    assert_same_training(*results)


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "objective"), list(fitting(DISCRETE)))
def test_every_estimator_of_discrete_sites(estimator, objective, one_generator):
    assert_like_eager(CASES["hierarchy"], 2, True, steps=4, estimators={"*": estimator}, objective=objective)


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "objective"), list(fitting(CONTINUOUS)))
def test_every_estimator_of_continuous_sites(estimator, objective, one_generator):
    assert_trains_like_eager(normals, 2, estimators={"w": estimator}, objective=objective)


@pytest.mark.parametrize(
    "objective",
    [
        Renyi(0.5, plates=()),
        ReweightedWakeSleep(plates=()),
        TVO(3, plates=()),
        ReweightedWakeSleep(insomnia=0.4, plates=(), dream=lambda drawn, x: (drawn["x"],), dreams=2),
        Expectation(),
        ELBO(kl_weight=0.5),
    ],
    ids=["renyi", "wake", "tvo", "sleep", "expectation", "elbo"],
)
def test_every_objective(objective, one_generator):
    assert_trains_like_eager(sleepers, 3, objective=objective)
