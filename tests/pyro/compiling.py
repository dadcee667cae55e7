"""Training with compiled steps beside training with eager ones."""

import numpy as np
import pyro
import torch
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._compile.broadcast_sinking import sink_broadcasts
from pplgrad.pyro._compile.scalarization import scalarize
from pplgrad.testing.in_pyro import HOST, fresh, gradient

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
