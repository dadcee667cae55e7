"""Particle filters through `pyro.markov`: exact over all draws and all ancestors of a hidden Markov model."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pplgrad import (
    FIVO,
    VIMCO,
    ConfigurationError,
    DisARM,
    Enumerate,
    EstimatorError,
    ImpossibleValueError,
    LeaveOneOut,
    ProgramError,
    ScoreFunction,
    Watch,
)
from pplgrad.pyro import TraceGrad_ELBO, _filter, check_gradients, config_estimators
from pplgrad.testing.in_pyro import Force, array, gradient
from tests import filtering as shared


def parameter(name):
    return pyro.param(name, array(shared.PARAMS[name]).clone())


def chain(kind="discrete"):
    """Return model and guide."""
    before, normals = shared.KINDS[kind]

    def model(xs):
        t, e, _ = parameter("t"), parameter("e"), parameter("g")
        w = pyro.sample("w", dist.Bernoulli(logits=t[0])) if before else 0.0
        z = 0.0
        for i in pyro.markov(range(len(xs))):
            move = t[0] + t[1] * z + 0.7 * w
            z = pyro.sample(f"z{i}", dist.Normal(move, 1.0) if normals else dist.Bernoulli(logits=move))
            mean = e[1] * z if normals else torch.where(z == 1, e[1], e[0])
            pyro.sample(f"x{i}", dist.Normal(mean, 1.0), obs=xs[i])

    def guide(xs):
        g = parameter("g")
        w = pyro.sample("w", dist.Bernoulli(logits=g[0])) if before else 0.0
        z = 0.0
        for i in pyro.markov(range(len(xs))):
            move = g[0] + g[1] * z + g[2] * xs[i] - 0.4 * w
            z = pyro.sample(f"z{i}", dist.Normal(move, 0.8) if normals else dist.Bernoulli(logits=move))

    return model, guide


def run_in(patch, steps=3):
    """Return what runs one filter for each outcome."""

    def run(objective, kind, draws, uniforms):
        before, normals = shared.KINDS[kind]
        particles = draws.shape[1]
        model, guide = chain(kind)
        names = [f"z{i}" for i in range(steps)]
        forced = dict(zip(names, draws[1:].astype(float), strict=True))
        noise = {name: np.array(shared.NOISE)[draws[i + 1]] for i, name in enumerate(names)} if normals else {}
        if before:
            forced["w"] = draws[0].astype(float)
        rows = [{name: value[k] for name, value in forced.items()} for k in range(particles)]
        turn = iter(uniforms[1:])
        pyro.clear_param_store()
        elbo = TraceGrad_ELBO(particles, vectorize_particles=True, max_plate_nesting=0, objective=objective)
        with patch.context() as inner, Force(rows, noise):
            inner.setattr(_filter, "uniforms", lambda shape, like: array(next(turn)).reshape(shape))
            loss = elbo.loss_and_grads(model, guide, array(shared.X[:steps]))
        return loss, gradient()

    return run


@pytest.mark.parametrize("short", ["score", "drop", "sometimes", "never", "systematic"])
def test_exact(short, monkeypatch):
    shared.assert_exact(run_in(monkeypatch), monkeypatch, short)


@pytest.mark.grid
@pytest.mark.parametrize("short", ["score", "systematic"])
@pytest.mark.parametrize("kind", ["global", "mixed"])
def test_sites_before_the_loop_and_reparameterized_ones_exact(kind, short, monkeypatch):
    shared.assert_exact(run_in(monkeypatch, 2), monkeypatch, short, 2, kind)


@pytest.mark.parametrize("short", ["stop-gradient", "stop-gradient systematic"])
def test_evidence_exact(short, monkeypatch):
    shared.assert_evidence_exact(run_in(monkeypatch), monkeypatch, short)


@pytest.mark.parametrize("name", shared.MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    apply, short, check, kind = shared.MUTANTS[name]
    apply(monkeypatch)
    with pytest.raises(AssertionError):
        check(run_in(monkeypatch, 2), monkeypatch, short, 2, kind)


def test_mutant_values_that_follow_no_ancestor_is_caught(monkeypatch):
    """The weights follow the ancestors, the values do not: the program has other densities when it runs again."""
    monkeypatch.setattr(_filter.Filtered, "_descended", lambda self, values, flat: values)
    with pytest.raises(ProgramError, match="other log densities"):
        run_in(monkeypatch, 3)(shared.OBJECTIVES["score"], "discrete", *shared.table(shared.OBJECTIVES["score"])[:2])


def elbo_of(particles=4, objective=FIVO(), **given):  # noqa: B008
    given = {"vectorize_particles": True} | given
    return TraceGrad_ELBO(particles, objective=objective, **given)


XS = array([0.4, -0.3])


def refused(error, words, model=None, guide=None, elbo=None):
    model, guide = (given or plain for given, plain in zip((model, guide), chain(), strict=True))
    pyro.clear_param_store()
    with pytest.raises(error, match=words):
        (elbo or elbo_of()).loss_and_grads(model, guide, XS)
    assert not dict(pyro.get_param_store())


def test_options_are_refused():
    for words, given in {
        "vectorize_particles=False": {"vectorize_particles": False},
        "does not go with compile": {"compile": True},
        "does not go with max_parallel": {"max_parallel": 4},
        "does not go with closed_form": {"closed_form": {"z0": "kl"}},
    }.items():
        refused(ConfigurationError, words, elbo=elbo_of(**given))
    with pytest.raises(ConfigurationError, match="drop higher_order=True"):
        elbo_of(higher_order=True)
    with pytest.raises(ConfigurationError, match="combines 3 particles"):
        elbo_of(4, FIVO(samples=3))
    with pytest.raises(ConfigurationError, match="nothing can be checked"):
        check_gradients(*chain(), XS, elbo=elbo_of())
    watched = config_estimators(chain()[1], watch=Watch(print))
    refused(ConfigurationError, "watch", guide=watched)


def test_estimators_are_refused():
    for estimator in (DisARM(), VIMCO(), ScoreFunction(LeaveOneOut()), Enumerate()):
        words = "brings baselines of its own.*use ScoreFunction"
        refused(EstimatorError, words, elbo=elbo_of(estimators={"z*": estimator}))
    refused(ConfigurationError, "nobody", elbo=elbo_of(estimators={"nobody": ScoreFunction()}))
    refused(
        ConfigurationError,
        "'g' is the guide's alone.*'score' or 'drop'",
        model=without("g"),
        elbo=elbo_of(4, FIVO(resampling_gradient="stop-gradient")),
    )


def without(name):
    """Return the model of `chain` without a parameter that it does not read."""

    def model(xs):
        with poutine.block(hide=[name]):
            chain()[0](xs)

    return model


def test_programs_are_refused():
    def no_loop(xs):
        pyro.sample("z0", dist.Bernoulli(array(0.5)))

    def after(xs):
        chain()[1](xs)
        pyro.sample("late", dist.Bernoulli(array(0.5)))

    def twice(xs):
        for part in (range(1), range(1, len(xs))):
            for i in pyro.markov(part):
                pyro.sample(f"z{i}", dist.Bernoulli(array(0.5)))

    def unnamed(xs):
        for _ in pyro.markov(range(len(xs))):
            pyro.sample("z", dist.Bernoulli(array(0.5)))

    def shorter(xs):
        chain()[1](xs[:1])

    def subsampled(xs):
        for i in pyro.markov(range(len(xs))):
            with pyro.plate(f"data{i}", 3, subsample_size=2):
                pyro.sample(f"z{i}", dist.Bernoulli(array(0.5)))

    def mixing(xs):
        z = array(0.0)
        for i in pyro.markov(range(len(xs) + 2)):
            z = pyro.sample(f"z{i}", dist.Normal(z.mean() + 0 * z, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=array(0.4))

    def random(xs):
        for i in pyro.markov(range(len(xs))):
            z = pyro.sample(f"z{i}", dist.Bernoulli(array(0.5)))
            pyro.sample(f"x{i}", dist.Normal(z + torch.randn(()), 1.0), obs=xs[i])

    def as_the_mixing(xs):
        for i in pyro.markov(range(len(xs) + 2)):
            pyro.sample(f"z{i}", dist.Normal(array(0.0), 1.0))

    def impossible(xs):
        for i in pyro.markov(range(len(xs))):
            z = pyro.sample(f"z{i}", dist.Bernoulli(array(0.5)))
            pyro.factor(f"x{i}", (-math.inf if i else 0.0) * (1 + z))

    def narrow(xs):
        for i in pyro.markov(range(len(xs))):
            pyro.sample(f"z{i}", dist.Bernoulli(array(0.5)))

    def wider(xs):
        for i in pyro.markov(range(len(xs))):
            with pyro.plate(f"data{i}", 2):
                pyro.sample(f"z{i}", dist.Bernoulli(array(0.5)))

    def in_no_loop(xs):
        @pyro.markov
        def step(i):
            pyro.sample(f"z{i}", dist.Bernoulli(array(0.5)))

        for i in range(len(xs)):
            step(i)

    def of_numbers(xs):
        for i in pyro.markov(range(len(xs))):
            float(pyro.sample(f"z{i}", dist.Bernoulli(array(0.5))))

    def with_hint(xs):
        pyro.sample("z0", dist.Bernoulli(array(0.5)), infer={"estimator": ScoreFunction()})

    refused(ProgramError, "The guide has no pyro.markov loop", guide=no_loop)
    refused(ProgramError, "The model has no pyro.markov loop", model=no_loop)
    refused(ProgramError, "The guide has no pyro.markov loop", in_no_loop, in_no_loop)
    refused(ProgramError, "'late' of the guide stands after the loop", guide=after)
    refused(ProgramError, "'z1' of the model stands after the loop over time, or in another one", model=twice)
    refused(ProgramError, "several sites named 'z'", unnamed, unnamed, elbo=elbo_of(max_plate_nesting=0))
    refused(ProgramError, r"'z1' of the model is drawn in step 1 .* not there in the guide", guide=shorter)
    refused(ProgramError, "Plate 'data0' is subsampled", subsampled, subsampled)
    refused(ProgramError, "shapes disagree at site 'z[01]'", wider, guide=narrow, elbo=elbo_of(max_plate_nesting=1))
    refused(ProgramError, "other log densities", model=mixing, guide=as_the_mixing)
    refused(ProgramError, "other log densities", model=random)
    refused(ImpossibleValueError, "in step 1 ", model=impossible)
    refused(EstimatorError, "estimators belong to the latent", model=with_hint)
    refused(ProgramError, r"write it so that it broadcasts\. \(", guide=of_numbers, elbo=elbo_of(max_plate_nesting=0))


@pytest.mark.grid
@pytest.mark.parametrize("objective", [FIVO(), FIVO(threshold=0), FIVO(samples=1)])
@pytest.mark.parametrize("read", [lambda z: z.reshape(-1)[0], lambda z: z.mean(), lambda z: z.roll(1, 0)])
def test_particles_that_read_each_other_are_refused_whoever_their_ancestors_are(read, objective):
    def program(side):
        def run(xs):
            z = array(0.0)
            for i in pyro.markov(range(5)):
                z = pyro.sample(f"z{i}", dist.Normal(read(z) if side == "guide" and i else z, 1.0))
                if side == "model":
                    pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=xs[0])

        return run

    for seed in range(3):
        pyro.set_rng_seed(seed)
        elbo = elbo_of(20, objective, max_plate_nesting=0)
        refused(ProgramError, "other log densities", program("model"), program("guide"), elbo)


def test_densities_of_several_precisions():
    """What single precision rounds is no other density."""

    def program(side):
        def run(xs):
            z = array(0.0)
            for i in pyro.markov(range(len(xs))):
                z = pyro.sample(f"z{i}", dist.Normal(0.3 * (z.float() if i else z), 1.0))
                if side == "model":
                    pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=xs[i].to(z.dtype))

        return run

    loss = elbo_of(50, max_plate_nesting=0).loss(program("model"), program("guide"), array(np.linspace(-3, 3, 20)))
    assert math.isfinite(loss)


def test_steps_without_sites_weigh_nothing_and_deterministic_sites_stand_anywhere():
    """The guide is the posterior, so that each weight is the density of an observation."""
    seen = (1, 3)

    def model(xs):
        for i in pyro.markov(range(5)):
            if i in seen:
                z = pyro.sample(f"z{i}", dist.Normal(array(0.0), 1.0))
                pyro.deterministic(f"twice{i}", 2 * z)
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=xs[i // 2])
        pyro.deterministic("last", z)

    def guide(xs):
        for i in pyro.markov(range(5)):
            if i in seen:
                pyro.sample(f"z{i}", dist.Normal(xs[i // 2] / 2, array(0.5).sqrt()))

    exact = dist.Normal(array(0.0), array(2.0).sqrt()).log_prob(XS).sum()
    np.testing.assert_allclose(elbo_of(max_plate_nesting=0).loss(model, guide, XS), -exact)


def test_losses_agree_and_second_derivatives_are_refused():
    model, guide = chain()
    found = []
    for method in ("loss", "loss_and_grads", "differentiable_loss"):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        found.append(torch.as_tensor(getattr(elbo_of(max_plate_nesting=0), method)(model, guide, XS)).item())
    np.testing.assert_allclose(found, found[0])
    loss = elbo_of().differentiable_loss(model, guide, XS)
    with pytest.raises(EstimatorError, match="first ones alone"):
        torch.autograd.grad(loss, [pyro.get_param_store()["g"]], create_graph=True)


def test_one_particle_is_the_elbo():
    model, guide = chain("mixed")
    losses = []
    for given in ({"objective": FIVO()}, {}):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        losses.append(TraceGrad_ELBO(1, estimators={"w": ScoreFunction()}, **given).loss_and_grads(model, guide, XS))
    np.testing.assert_allclose(*losses)


@pytest.mark.parametrize("mask", [False, True])
def test_sequences_in_a_plate_and_of_several_lengths(mask):
    """A step that is masked changes no weight: the bound is that of the shorter sequence."""
    lengths = torch.tensor([3, 1])

    def program(observed):
        def run(xs, steps):
            z = torch.zeros(())
            with pyro.plate("sequences", 2):
                for i in pyro.markov(range(steps)):
                    with poutine.mask(mask=i < lengths if mask else True):
                        z = pyro.sample(f"z{i}", dist.Normal(0.5 * z, 1.0))
                        if observed:
                            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=xs[:, i])

        return run

    xs = torch.ones(2, 5)
    losses = []
    for steps in (3, 5):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        losses.append(elbo_of(6, FIVO(threshold=0), max_plate_nesting=1).loss(program(True), program(False), xs, steps))
    assert (abs(losses[0] - losses[1]) < 1e-5) == mask


def test_described_and_trained():
    model, guide = chain("mixed")
    elbo = elbo_of(8, FIVO(samples=4, resampling_gradient="drop"))
    pyro.clear_param_store()
    rows = {row["site"]: row for row in elbo.describe(model, guide, XS).rows}
    assert rows["w"]["estimator"] == "ScoreFunction()" and rows["z0"]["estimator"] == "Reparam()"
    assert "biased: FIVO(" in rows["w"]["reason"]
    rows = {row["site"]: row for row in elbo_of(8, FIVO(threshold=0.5)).describe(model, guide, XS).rows}
    assert "biased" in rows["z0"]["reason"] and "biased" not in rows["w"]["reason"]
    svi = pyro.infer.SVI(model, config_estimators(guide, {"w": ScoreFunction()}), pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(XS) for _ in range(60)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


def test_gradient_of_a_module_is_the_slope_along_the_draws():
    """A recurrent network before the loop, a global draw, masks, and Python state that the steps count on."""
    masks = torch.arange(4)[:, None] < torch.tensor([4, 2])

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.ahead = torch.nn.GRU(2, 2).double()

        def forward(self, xs):
            s = pyro.sample("s", dist.LogNormal(array(0.1), 0.6))
            found, z = self.ahead(xs)[0], array(np.zeros(2))
            for i in pyro.markov(range(len(xs))):
                with pyro.plate(f"series{i}", 2), poutine.mask(mask=masks[i]):
                    z = pyro.sample(f"z{i}", dist.Normal(0.3 * z + found[i] / s, 1.0))

    def model(xs):
        s, z = pyro.sample("s", dist.LogNormal(array(0.0), 1.0)), array(np.zeros(2))
        for i in pyro.markov(range(len(xs))):
            with pyro.plate(f"series{i}", 2), poutine.mask(mask=masks[i]):
                z = pyro.sample(f"z{i}", dist.Normal(pyro.param("m", array(0.3)) * z + 0.1 * i, 1.0))
                pyro.sample(f"x{i}", dist.Normal(z, s), obs=xs[i])

    pyro.clear_param_store()
    torch.manual_seed(0)
    guide, xs = Guide(), array(np.linspace(-1, 1, 8).reshape(4, 2))
    elbo = elbo_of(8, FIVO(4, "systematic", 0.5, "drop"), max_plate_nesting=1)

    def loss(method="loss"):
        pyro.set_rng_seed(3)
        return getattr(elbo, method)(model, guide, xs)

    first = loss("differentiable_loss")
    leaves = [pyro.param("m").unconstrained(), *guide.parameters()]
    for leaf, slope in zip(leaves, torch.autograd.grad(first, leaves), strict=True):
        ends = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                leaf += step
            ends.append(loss())
        with torch.no_grad():
            leaf += 1e-6
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope.sum(), atol=1e-6)
