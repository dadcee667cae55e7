"""Training with compiled steps beside training with eager ones."""

import itertools

import numpy as np
import pyro
import torch
from pyro import poutine
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from pplgrad import ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._compile.broadcast_sinking import sink_broadcasts
from pplgrad.pyro._compile.scalarization import scalarize
from pplgrad.testing.in_pyro import HOST, Force, fresh, gradient

CHEAP = {"backend": "eager"}


def taken_apart(graph, inputs):
    """Return a graph as the inductor is given it on a CPU, to be run operation by operation."""
    scalarize(graph)
    return graph


def prepared(graph, inputs):
    """Return a graph as the inductor's loops are made of it on a CPU, to be run operation by operation."""
    functional = torch.func.functionalize(taken_apart(graph, inputs))
    found = make_fx(functional, get_decompositions(DECOMPOSED), tracing_mode="fake")(*inputs)
    sink_broadcasts(found.graph)
    found.recompile()
    return found


DECOMPOSED = [torch.ops.aten.binary_cross_entropy_with_logits, torch.ops.aten.log_sigmoid_forward]
PREPARED = {"backend": prepared}


def train(elbo, model, guide, args=(), steps=5):
    """Take steps of plain descent, each from its own seed, and return losses, gradients and the store at the end."""
    seen = []
    for step in range(steps):
        pyro.set_rng_seed(step)
        loss = elbo.loss_and_grads(model, guide, *args)
        found = gradient()
        seen.append({"loss": np.array(loss), **found})
        with torch.no_grad():
            for name, leaf in pyro.get_param_store().named_parameters():
                leaf.sub_(0.05 * torch.as_tensor(found[name]))
    return seen, {name: leaf.detach().cpu().numpy().copy() for name, leaf in pyro.get_param_store().named_parameters()}


def graphs(elbo):
    """Return how many graphs an ELBO holds."""
    return sum(known.compiled is not None for known in elbo._structures._known.values())


def assert_like_eager(case, particles=1, vectorized=False, steps=5, **options):
    """Compare compiled training with eager training, to rounding."""
    results = []
    for given in (False, PREPARED):
        fresh(case)
        model, guide = case.build(HOST)
        elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, compile=given, **options)
        results.append(train(elbo, model, guide, steps=steps))
    assert graphs(elbo) == 1
    assert_same_training(*results)


def assert_same_training(eager, compiled):
    """Compare what two trainings returned, to rounding."""
    (steps, ends), (compiled_steps, compiled_ends) = eager, compiled
    for wanted, found in zip(steps, compiled_steps, strict=True):
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12)
    for name, value in ends.items():
        np.testing.assert_allclose(compiled_ends[name], value, rtol=1e-12, atol=1e-12)


def assert_drawn_by_the_law(elbo, model, guide, names, params):
    """Draws of the gradient are those of the outcomes of the sites, which are as frequent as the guide says: the mean is the exact gradient."""

    def of(elbo):
        elbo.loss_and_grads(model, guide)
        found = gradient()
        return np.concatenate([np.ravel(found[name]) for name in params])

    rows, chances, loss = [], [], 0.0
    for values in itertools.product((0.0, 1.0), repeat=len(names)):
        with Force([dict(zip(names, map(np.array, values), strict=True))], {}):
            rows.append(of(TraceGrad_ELBO(estimators={"*": ScoreFunction()})))
        held = {name: torch.tensor(value) for name, value in zip(names, values, strict=True)}
        q, p = (poutine.trace(poutine.condition(f, data=held)).get_trace().log_prob_sum() for f in (guide, model))
        chances.append(float(q.detach().exp()))
        loss = loss - q.exp() * (p - q)
    rows, chances = np.array(rows), np.array(chances)
    loss.backward()
    exact = gradient()
    np.testing.assert_allclose(chances @ rows, np.concatenate([np.ravel(exact[name]) for name in params]), atol=1e-9)
    draws = np.array([of(elbo) for _ in range(5000)])
    distances = np.abs(draws[:, None] - rows).max(-1)
    assert distances.min(1).max() < 1e-9
    counts = np.bincount(distances.argmin(1), minlength=len(rows))
    errors = (counts - len(draws) * chances) / np.sqrt(len(draws) * chances * (1 - chances))
    assert np.abs(errors).max() < 3.5 and counts.all()
