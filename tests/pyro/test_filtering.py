"""Particle filters through `pyro.markov`: exact over all draws and all ancestors of a hidden Markov model."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad.pyro import TraceGrad_ELBO, _filter
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
