"""Trains a few steps on one device and on two, and prints how far apart they end, as JSON. Run by test_sharding.py."""

import json
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI

from pplgrad import (
    ARMS,
    ELBO,
    IWAE,
    REBAR,
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
KEY = jax.random.key(1)
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
    "beside a summed site": ({"z": ScoreFunction(DecayingAverage(0.8)), "y": DisARM()}, 1, ELBO(), 8),
    "IWAE": ({"z": VIMCO(), "y": ScoreFunction(NeuralBaseline())}, 3, IWAE(), 8),
}


# What is run inside shard_map, by its name: the program, and whether its key is given or a constant.
SHARD_MAPPED = {
    f"shard_map {name}{', key given' * given}": (name, given)
    for name in ("DisARM, local expectation", "loop", "scan")
    for given in (False, True)
}


def model(x, size, summed=False):
    w = numpyro.param("w", jnp.linspace(-1.0, 1.0, 6).reshape(2, 3))
    with numpyro.plate("data", len(x), subsample_size=size) as rows:
        z = numpyro.sample("z", dist.Bernoulli(0.4 * jnp.ones(2)).to_event(1))
        y = numpyro.sample("y", dist.Bernoulli(logits=z.sum(-1) - 1.0))
        if summed:
            y = y + numpyro.sample("k", dist.Bernoulli(logits=0.3 - y), infer={"enumerate": "parallel"})
        numpyro.sample("x", dist.Normal(z @ w + y[..., None], 1.0).to_event(1), obs=x[rows])


def guide(x, size):
    e, b = numpyro.param("e", jnp.linspace(-0.5, 0.6, 6).reshape(3, 2)), numpyro.param("b", 0.2)
    with numpyro.plate("data", len(x), subsample_size=size) as rows:
        z = numpyro.sample("z", dist.Bernoulli(logits=x[rows] @ e).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=z.sum(-1) * b + x[rows, 0]))


def svi_of(name):
    estimators, particles, objective, size = CASES[name]
    wrapped = config_estimators(guide, estimators)
    own = partial(model, summed=name == "beside a summed site")
    return SVI(own, wrapped, numpyro.optim.SGD(0.05), TraceGrad_ELBO(particles, objective=objective), size=size)


@cache
def started(name):
    """Return a case's SVI and its state before the first step, which one device and two begin with."""
    svi = svi_of(name)
    return svi, svi.init(jax.random.key(0), jnp.asarray(DATA))


def trained(name, mesh):
    """Return the losses of three steps and the last state; the data is split over the mesh if there is one."""
    (svi, state), x = started(name), jnp.asarray(DATA)
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


def chain(w, z, x):
    z = numpyro.sample("z", dist.Bernoulli(logits=w * z - 0.2))
    numpyro.sample("x", dist.Normal(z * w, 1.0), obs=x)
    return 1.0 * z


STEPS = 2
"""Of the loop, of which every step is compiled by itself."""


def loop_model(x):
    w, z = numpyro.param("w", 0.3), 0.0
    with numpyro.plate("data", len(x)):
        for t, column in enumerate(x.T[:STEPS]):
            with numpyro.handlers.scope(prefix=str(t)):
                z = chain(w, z, column)


def loop_guide(x):
    e, z = numpyro.param("e", jnp.linspace(-0.4, 0.5, STEPS)), 0.0
    with numpyro.plate("data", len(x)):
        for t, column in enumerate(x.T[:STEPS]):
            z = numpyro.sample(f"{t}/z", dist.Bernoulli(logits=e[t] + 0.3 * z + 0.1 * column))


def scan_model(x):
    w = numpyro.param("w", 0.3)

    def step(z, column):
        with numpyro.plate("data", len(x)):
            return chain(w, z, column), None

    scan(step, 0.0 * x[:, 0], x.T)


def scan_guide(x):
    e = numpyro.param("e", 0.2)

    def step(z, column):
        with numpyro.plate("data", len(x)):
            return 1.0 * numpyro.sample("z", dist.Bernoulli(logits=e + 0.3 * z + 0.1 * column)), None

    scan(step, 0.0 * x[:, 0], x.T)


@cache
def program_of(name):
    """Return an ELBO, a model and a guide for data, and the parameters that the two have."""
    if name in CASES:
        svi, state = started(name)
        params = svi.get_params(state) | (state.mutable_state or {})
        return svi.loss, partial(model, size=4), partial(svi.guide, size=4), params
    own, other = (loop_model, loop_guide) if name == "loop" else (scan_model, scan_guide)
    svi = SVI(own, other, numpyro.optim.SGD(0.05), TraceGrad_ELBO(2))
    return svi.loss, own, other, svi.get_params(svi.init(jax.random.key(0), jnp.asarray(DATA)))


def gradient_of(name):
    """Return a function from data, parameters and a key to their gradient, and the parameters."""
    elbo, own, other, params = program_of(name)
    learned = {k: v for k, v in params.items() if isinstance(v, jax.Array)}

    def gradient(x, learned, key=KEY):
        loss = elbo.loss_with_mutable_state
        return jax.grad(lambda p: loss(key, params | p, own, other, x)["loss"])(learned)

    return gradient, learned


@cache
def sum_of_halves(name):
    """Return the sum of the gradients of both halves of the data, each of them alone."""
    gradient, learned = gradient_of(name)
    alone = jax.jit(gradient)
    return jax.tree.map(jnp.add, *(alone(half, learned) for half in (DATA[:4], DATA[4:])))


def shard_mapped(name, mesh, given):
    """Return what becomes of a step inside shard_map: the sum of the gradients, or the refusal; its key is given or a constant."""
    gradient, learned = gradient_of(name)
    x = jnp.asarray(DATA)
    keys = [KEY] if given else []
    try:
        split = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P(), *(P() for _ in keys)), out_specs=P())
        found = jax.jit(split)(x, learned, *keys)
    except ConfigurationError as error:
        return {"refused": str(error)}
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, sum_of_halves(name))
    return {"difference": max(jax.tree.leaves(apart))}


# Estimators whose branches are split over devices: five flips on two devices are three each.
BRANCHES = {
    "flips": LocalExpectation(),
    "flips, without fusion": LocalExpectation(),
    "partners": ARMS(4),
    "relaxed": REBAR(),
}


def wide_model():
    w = numpyro.param("w", jnp.linspace(-1.0, 1.0, 5 * 64).reshape(5, 64))
    z = numpyro.sample("z", dist.Bernoulli(0.4 * jnp.ones(5)).to_event(1))
    numpyro.sample("x", dist.Normal(jnp.tanh(jnp.tanh(z @ w) @ w.T), 1.0).to_event(1), obs=jnp.ones(5))


def wide_guide():
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("l", jnp.linspace(-1.0, 1.0, 5))).to_event(1))


def split_branches(name, mesh):
    """Return how far the gradient is from one device's where branches are split, and the operations of a device of one."""
    found = []
    for sharding in (None, NamedSharding(mesh, P("data"))):
        elbo = TraceGrad_ELBO(2, branch_sharding=sharding, fuse="without" not in name)
        wrapped = config_estimators(wide_guide, {"z": BRANCHES[name]})
        svi = SVI(wide_model, wrapped, numpyro.optim.SGD(0.1), elbo)
        params = svi.get_params(svi.init(KEY))
        step = jax.jit(jax.value_and_grad(lambda p, elbo=elbo, wrapped=wrapped: elbo.loss(KEY, p, wide_model, wrapped)))
        compiled = step.lower(params).compile()
        found.append((compiled(params), compiled.cost_analysis()["flops"]))
    (one, alone), (two, each) = found
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one, two)
    return {"difference": max(jax.tree.leaves(apart)), "operations": each / alone}


def jobs(mesh):
    """Return what there is to find, by its name."""
    made = {name: partial(compared, name, mesh) for name in CASES}
    made |= {job: partial(shard_mapped, name, mesh, given) for job, (name, given) in SHARD_MAPPED.items()}
    made |= {f"branches {name}": partial(split_branches, name, mesh) for name in BRANCHES}
    made["shard_map with state"] = partial(shard_mapped, "average, average per element", mesh, False)
    return made


def main(*names):
    jax.config.update("jax_enable_x64", True)
    made = jobs(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)))
    json.dump({name: made[name]() for name in names}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
