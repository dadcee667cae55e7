"""The works in plain JAX, as one who needs no library would write them: same draws, same gradient as `TraceGrad_ELBO`.

As in by_hand_torch.py each function returns (loss, surrogate), but for one particle, over which `estimate` maps. A chain is a Python
loop where the measured program is one, and a `scan` where that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.example_libraries.optimizers import adam  # NumPyro's own Adam is this one.
from jax.lax import stop_gradient

from benchmarks.works import Work

Arrays = dict[str, jax.Array]
Drawn = tuple[jax.Array, jax.Array]


def estimate(work: Work, params: Arrays, data: Arrays, key: jax.Array, draws: Arrays | None = None) -> Drawn:
    """Return the loss and the surrogate of a work, on given draws by site (particles first) or on fresh ones."""
    one = {"sbn": _sbn, "plate": _plate}.get(work.kind, _chain)
    if draws is not None:
        found = jax.vmap(lambda drawn: one(work, params, data, key, drawn))(draws)
    elif work.particles == 1:
        return one(work, params, data, key, None)
    else:
        found = jax.vmap(lambda key: one(work, params, data, key, None))(jax.random.split(key, work.particles))
    return found[0].mean(), found[1].mean()


def arrays(data: dict, dtype: Any = jnp.float32) -> Arrays:
    """Return NumPy's arrays as JAX's, with what the hand-written versions compute of them once."""
    found = {name: jnp.asarray(value, dtype) for name, value in data.items()}
    if "train" in found:
        found["centred"] = 2.0 * (found["x"] - found.pop("train").mean(0))
    return found


Estimate = Callable[[Arrays, Arrays, jax.Array], Drawn]


def gradient_and_loss(
    work: Work, params: Arrays, data: Arrays, key: jax.Array, of: Estimate | None = None
) -> tuple[Arrays, jax.Array]:
    """Return the gradient estimate and the loss, by the score function or as `of` estimates it."""

    def surrogate(params: Arrays) -> Drawn:
        loss, surrogate = estimate(work, params, data, key) if of is None else of(params, data, key)
        return surrogate, loss

    return jax.grad(surrogate, has_aux=True)(params)


def update(work: Work, of: Estimate | None = None) -> tuple[Callable, Callable]:
    """Return `start(params, key)`, which gives a state, and `step(state, data)`, which gives the next one and the loss."""
    initial, advance, current = adam(1e-6)

    def start(params: Arrays, key: jax.Array) -> tuple:
        return jnp.zeros((), jnp.int32), initial(params), key

    def step(state: tuple, data: Arrays) -> tuple[tuple, jax.Array]:
        number, optimized, key = state
        key, now = jax.random.split(key)
        gradient, loss = gradient_and_loss(work, current(optimized), data, now, of)
        return (number + 1, advance(number, gradient, optimized), key), loss

    return start, step


def _log_bernoulli(logits: jax.Array, value: jax.Array) -> jax.Array:
    return value * logits - jax.nn.softplus(logits)


def _sbn(work: Work, p: Arrays, data: Arrays, key: jax.Array, draws: Arrays | None) -> Drawn:
    def layer(name: str, h: jax.Array) -> jax.Array:
        return h @ p[f"{name}_w0"] + p[f"{name}_b0"]

    h, signs, log_q = data["centred"], [], []
    for i in range(1, work.layers + 1):
        logits = layer(f"encode{i}", h)
        if draws is None:
            key, now = jax.random.split(key)
            z = jax.random.bernoulli(now, jax.nn.sigmoid(stop_gradient(logits))).astype(logits.dtype)
        else:
            z = draws[f"z{i}"]
        log_q.append(_log_bernoulli(logits, z).sum(-1))
        h = 2.0 * z - 1.0
        signs.append((z, h))
    # Costs in the order of the guide's draws: cost i depends on draws 0 to i, and on no later one.
    costs = [_log_bernoulli(layer("decode0", signs[0][1]), data["x"]).sum(-1) - stop_gradient(log_q[0])]
    for i in range(1, work.layers):
        costs.append(
            _log_bernoulli(layer(f"decode{i}", signs[i][1]), signs[i - 1][0]).sum(-1) - stop_gradient(log_q[i])
        )
    costs[-1] = costs[-1] + _log_bernoulli(p["prior"], signs[-1][0]).sum(-1)
    total = sum(costs)
    surrogate, downstream = total, stop_gradient(total)
    for cost, score in zip(costs, log_q, strict=True):
        surrogate = surrogate + score * downstream
        downstream = downstream - stop_gradient(cost)
    return -stop_gradient(total).sum(), -surrogate.sum()


def _uniforms(work: Work, key: jax.Array, dtype: Any) -> jax.Array:
    """Return a uniform number for each site, all of one key."""
    return jax.random.uniform(key, (work.size,), dtype)


def _uniforms_of_hosts_keys(work: Work, key: jax.Array, dtype: Any) -> jax.Array:
    """Return a uniform number for each site, each of its own key: those under which `seed` and `scan` let the sites draw."""
    if work.kind == "scan":
        # The handler gives the scan a key; each step splits what the one before has left, and its handler once more.
        key = jax.random.split(key)[1]

    def split(key: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        left, now = jax.random.split(key)
        return left, now

    _, keys = jax.lax.scan(split, key, None, length=work.size)
    if work.kind == "scan":
        keys = jax.vmap(lambda key: jax.random.split(key)[1])(keys)
    return jax.vmap(lambda key: jax.random.uniform(key, (), dtype))(keys)


def _uniforms_of_independent_keys(work: Work, key: jax.Array, dtype: Any) -> jax.Array:
    """Return a uniform number for each site, each of its own key: those that `pplgrad.numpyro.independent_keys` gives them."""
    key = jax.random.split(key)[1]
    if work.kind == "scan":
        key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    keys = jax.vmap(lambda t: jax.random.fold_in(key, t))(jnp.arange(work.size))
    return jax.vmap(lambda key: jax.random.uniform(key, (), dtype))(keys)


KEYS = {"host": _uniforms_of_hosts_keys, "independent": _uniforms_of_independent_keys}


def _sampled(work: Work, q: jax.Array, uniform: jax.Array) -> jax.Array:
    """Return a chain, drawn one site after the other from numbers that are drawn before."""
    after_zero, after_one = uniform < jax.nn.sigmoid(q[0]), uniform < jax.nn.sigmoid(q[0] + q[1])
    if work.kind == "scan":

        def step(z: jax.Array, after: tuple) -> tuple[jax.Array, jax.Array]:
            z = jnp.where(z, after[1], after[0])
            return z, z

        return jax.lax.scan(step, jnp.zeros((), bool), (after_zero, after_one))[1].astype(q.dtype)
    found = [after_zero[0]]
    for t in range(1, work.size):
        found.append(jnp.where(found[-1], after_one[t], after_zero[t]))
    return jnp.stack(found).astype(q.dtype)


def with_keys(work: Work, keys: str) -> Estimate:
    """Return the estimate of a chain that is drawn with other keys than one: the "host"'s, split one after the other, or "independent" ones."""
    return lambda params, data, key: _chain(work, params, data, key, None, KEYS[keys])


def _chain(
    work: Work,
    params: Arrays,
    data: Arrays,
    key: jax.Array,
    draws: Arrays | None,
    uniforms: Callable[[Work, jax.Array, Any], jax.Array] = _uniforms,
) -> Drawn:
    p, q = params["p"], params["q"]
    if draws is None:
        z = _sampled(work, stop_gradient(q), uniforms(work, key, q.dtype))
    else:
        z = draws["z"] if work.kind == "scan" else jnp.stack([draws[f"z{t}"] for t in range(work.size)])
    before = jnp.concatenate([jnp.zeros_like(z[:1]), z[:-1]])
    log_q = _log_bernoulli(q[0] + q[1] * before, z)
    log_x = -0.5 * (data["x"] - p[2] * z) ** 2 - 0.5 * math.log(2.0 * math.pi)
    costs = _log_bernoulli(p[0] + p[1] * before, z) + log_x - stop_gradient(log_q)
    downstream = jax.lax.cumsum(stop_gradient(costs), reverse=True)
    return -downstream[0], -(costs + log_q * downstream).sum()


def _plate(work: Work, p: Arrays, data: Arrays, key: jax.Array, draws: Arrays | None) -> Drawn:
    x = data["x"]
    logits = p["intercept"] + p["slope"] * x
    if draws is None:
        z = jax.random.bernoulli(key, jax.nn.sigmoid(stop_gradient(logits))).astype(logits.dtype)
    else:
        z = draws["z"]
    log_q = _log_bernoulli(logits, z)
    log_x = -0.5 * (x - p["mean"] * z) ** 2 - 0.5 * math.log(2.0 * math.pi)
    costs = _log_bernoulli(p["prior"], z) + log_x - stop_gradient(log_q)
    signal = stop_gradient(costs)
    return -signal.sum(), -(costs + log_q * signal).sum()
