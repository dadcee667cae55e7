"""Trains a few steps on one device and on two, and prints how far apart they end, as JSON. Run by test_sharding.py."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro.infer import SVI

from pplgrad import (
    ELBO,
    IWAE,
    VIMCO,
    ConfigurationError,
    DecayingAverage,
    DisARM,
    LeaveOneOut,
    LocalExpectation,
    NeuralBaseline,
    OptimalConstant,
    ScoreFunction,
)
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

DATA = np.random.default_rng(0).normal(size=(8, 3))
# Estimators of the two sites, particles, objective, elements of the data in a step.
CASES = {
    "leave-one-out, neural": ({"z": ScoreFunction(LeaveOneOut()), "y": ScoreFunction(NeuralBaseline())}, 3, ELBO(), 8),
    "average, average per element": (
        {"z": ScoreFunction(DecayingAverage(0.8)), "y": ScoreFunction(DecayingAverage(0.8, per_element=True))},
        1,
        ELBO(),
        8,
    ),
    "minibatch": (
        {
            "z": ScoreFunction(DecayingAverage(0.8, per_element=True) + NeuralBaseline()),
            "y": ScoreFunction(OptimalConstant(0.8)),
        },
        1,
        ELBO(),
        4,
    ),
    "DisARM, local expectation": ({"z": DisARM(), "y": LocalExpectation()}, 1, ELBO(), 8),
    "IWAE": ({"z": VIMCO(), "y": ScoreFunction(NeuralBaseline())}, 3, IWAE(), 8),
}


def model(x, size):
    w = numpyro.param("w", jnp.linspace(-1.0, 1.0, 6).reshape(2, 3))
    with numpyro.plate("data", len(x), subsample_size=size) as rows:
        z = numpyro.sample("z", dist.Bernoulli(0.4 * jnp.ones(2)).to_event(1))
        y = numpyro.sample("y", dist.Bernoulli(logits=z.sum(-1) - 1.0))
        numpyro.sample("x", dist.Normal(z @ w + y[:, None], 1.0).to_event(1), obs=x[rows])


def guide(x, size):
    e, b = numpyro.param("e", jnp.linspace(-0.5, 0.6, 6).reshape(3, 2)), numpyro.param("b", 0.2)
    with numpyro.plate("data", len(x), subsample_size=size) as rows:
        z = numpyro.sample("z", dist.Bernoulli(logits=x[rows] @ e).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=z.sum(-1) * b + x[rows, 0]))


def svi_of(name):
    estimators, particles, objective, size = CASES[name]
    wrapped = config_estimators(guide, estimators)
    return SVI(model, wrapped, numpyro.optim.SGD(0.05), TraceGrad_ELBO(particles, objective=objective), size=size)


def trained(name, mesh):
    """Return the losses of three steps and the last state; the data is split over the mesh if there is one."""
    svi, x = svi_of(name), jnp.asarray(DATA)
    state = svi.init(jax.random.key(0), x)
    if mesh is not None:
        state, x = jax.device_put(state, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("data")))
    update, losses = jax.jit(svi.update), []
    for _ in range(3):
        state, loss = update(state, x)
        losses.append(loss)
    return losses, state


def compared(name, mesh):
    (losses, one), (others, two) = trained(name, None), trained(name, mesh)
    pairs = [
        jax.tree.leaves((x, state.optim_state, state.mutable_state)) for x, state in ((losses, one), (others, two))
    ]
    difference = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(*pairs, strict=True))
    kept = all(x.sharding.is_equivalent_to(NamedSharding(mesh, P()), x.ndim) for x in jax.tree.leaves(two))
    return {
        "difference": difference,
        "kept": kept,
        "devices": len(jax.tree.leaves(two)[0].sharding.device_set),
    }


def shard_mapped(name, mesh):
    """Return what becomes of a step inside shard_map: the sum of the gradients, or the refusal."""
    svi, x = svi_of(name), jnp.asarray(DATA)
    state = svi.init(jax.random.key(0), x)
    params, key = svi.get_params(state), jax.random.key(1)

    def gradient(x, params):
        merged = params | (state.mutable_state or {})
        loss = svi.loss.loss_with_mutable_state
        return jax.grad(lambda p: loss(key, merged | p, model, svi.guide, x, size=4)["loss"])(params)

    try:
        split = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
        found = jax.jit(split)(x, params)
    except ConfigurationError as error:
        return {"refused": str(error)}
    halves = [gradient(half, params) for half in (x[:4], x[4:])]
    expected = jax.tree.map(jnp.add, *halves)
    return {"difference": max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, expected)))}


def main():
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    found = {name: compared(name, mesh) for name in CASES}
    found["shard_map"] = shard_mapped("DisARM, local expectation", mesh)
    found["shard_map with state"] = shard_mapped("average, average per element", mesh)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
