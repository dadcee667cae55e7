"""The benchmarks' hand-written versions are honest: on the same draws they give the gradient of `TraceGrad_ELBO`."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch

from benchmarks import by_hand_torch, works
from pplgrad import ScoreFunction

WORKS = [
    works.Work("sbn", 5, particles=3, batch=4),
    works.Work("sbn", 5, layers=2, particles=2, batch=4),
    works.Work("chain", 6, particles=3),
    works.Work("scan", 6, particles=3),
    works.Work("plate", 3, particles=2, batch=4),
]
NAMES = [work.name for work in WORKS]
PLAIN = {"*": ScoreFunction()}


@pytest.fixture(params=WORKS, ids=NAMES)
def work(request):
    return request.param


def in_pyro(work, data):
    """Return draws, particles first, with the loss and the gradient that Pyro's plug-in finds on them."""
    from pyro import poutine

    from pplgrad.pyro import TraceGrad_ELBO

    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    model, guide, args = works.pyro_program(work, data, 0, double=True)
    losses, draws, gradients = [], [], []
    for _ in range(work.particles):
        trace = poutine.trace(guide).get_trace(*args)
        draws.append({n: trace.nodes[n]["value"].detach() for n in trace.stochastic_nodes if n.startswith("z")})
        losses.append(TraceGrad_ELBO(estimators=PLAIN).loss_and_grads(model, poutine.replay(guide, trace=trace), *args))
    for name, leaf in pyro.get_param_store().named_parameters():
        gradients.append((name, leaf.grad / work.particles))
    return {n: torch.stack([d[n] for d in draws]) for n in draws[0]}, np.mean(losses), dict(gradients)


def by_hand(work, data, draws, estimate=by_hand_torch.estimate):
    params = by_hand_torch.tensors(works.start(work, data, 0), torch.float64)
    for leaf in params.values():
        leaf.requires_grad_()
    loss, surrogate = estimate(work, params, by_hand_torch.tensors(data, torch.float64), draws)
    surrogate.backward()
    return loss.item(), {name: leaf.grad for name, leaf in params.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(value), rtol=1e-10, atol=1e-10, err_msg=name)


def test_pytorch(work):
    data = works.arrays(work, 0)
    draws, loss, gradient = in_pyro(work, data)
    found_loss, found = by_hand(work, data, draws)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert_same(found, gradient)


def test_pytorch_draws_from_the_guide(work):
    """The chance of each value, not only the gradient at a given one, is the guide's."""
    data = works.arrays(work, 0)
    torch.manual_seed(0)
    params = by_hand_torch.tensors(works.start(work, data, 0), torch.float64)
    many = works.Work(work.kind, work.size, work.layers, 4000, work.batch)
    tensors = by_hand_torch.tensors(data, torch.float64)
    loss = by_hand_torch.estimate(many, params, tensors)[0].item()
    pyro.clear_param_store()
    model, guide, args = works.pyro_program(work, data, 0, double=True)
    elbo = pyro.infer.Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=work.plates)
    assert loss == pytest.approx(elbo.loss(model, guide, *args), rel=2e-2)


def test_jax(work):
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp
    import numpyro

    from benchmarks import by_hand_jax
    from pplgrad.numpyro import TraceGrad_ELBO

    with jax.enable_x64(True):
        data = works.arrays(work, 0)
        model, guide, args = works.numpyro_program(work, data, 0, double=True)
        # Off zero, where NumPyro 0.22 differentiates a Bernoulli's logits wrongly.
        params = {name: jnp.asarray(value + 0.1) for name, value in works.start(work, data, 0).items()}
        draws, losses, gradients = [], [], []
        for i in range(work.particles):
            trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, i)).get_trace(*args)
            values = {n: s["value"] for n, s in trace.items() if s["type"] == "sample"}
            forced = numpyro.handlers.substitute(guide, data=values)
            elbo = TraceGrad_ELBO(estimators=PLAIN)
            loss, gradient = jax.value_and_grad(lambda p: elbo.loss(jax.random.key(9), p, model, forced, *args))(params)
            draws.append({n: v.astype(float) for n, v in values.items()})
            losses.append(loss)
            gradients.append(gradient)
        together = {n: jnp.stack([d[n] for d in draws]) for n in draws[0]}
        arrays = by_hand_jax.arrays(data, jnp.float64)

        def surrogate(params):
            loss, surrogate = by_hand_jax.estimate(work, params, arrays, jax.random.key(0), together)
            return surrogate, loss

        found, loss = jax.grad(surrogate, has_aux=True)(params)
        assert float(loss) == pytest.approx(float(np.mean(losses)), rel=1e-12)
        assert_same(found, {name: sum(g[name] for g in gradients) / work.particles for name in params})
