"""The networks that a neural baseline accepts in NumPyro, each as a pair (init, apply)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.errors import ConfigurationError


@dataclass(frozen=True)
class Network:
    """`init(key, x)` makes the parameters, `apply(parameters, x)` maps (*batch, features) to (*batch, 1) or (*batch,)."""

    init: Callable[[jax.Array, jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


def network(net: Any, hidden: Sequence[int], site: str) -> Network:
    """Return a network of whatever kind as a pair of functions."""
    if net is None:
        return _perceptron(tuple(hidden))
    kinds = {base.__module__.partition(".")[0]: base.__module__ for base in type(net).__mro__}
    if "equinox" in kinds:
        return _equinox(net)
    if any(base.__module__.startswith("flax.nnx") for base in type(net).__mro__):
        return _nnx(net)
    if callable(getattr(net, "init", None)) and callable(getattr(net, "apply", None)):
        return Network(net.init, net.apply)
    if isinstance(net, tuple) and len(net) == 2 and all(map(callable, net)):
        return Network(*net)
    raise ConfigurationError(
        f"NeuralBaseline(net=...) at site '{site}' takes a flax linen or nnx module, an equinox module, or a pair "
        f"(init, apply) in NumPyro; got {type(net).__name__}."
    )


def _perceptron(hidden: tuple[int, ...]) -> Network:
    """Return dense layers with tanh between them; the last starts at zero, and is all there is without inputs."""

    def init(key: jax.Array, x: jax.Array) -> list[dict[str, jax.Array]]:
        sizes = [x.shape[-1], *(hidden if x.shape[-1] else ())]
        layers = []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            key, sub = jax.random.split(key)
            bound = 1.0 / max(before, 1) ** 0.5
            weight = jax.random.uniform(sub, (before, after), x.dtype, -bound, bound)
            layers.append({"weight": weight, "bias": jnp.zeros(after, x.dtype)})
        last = {"bias": jnp.zeros(1, x.dtype)}
        if x.shape[-1]:  # Some ways to save arrays refuse those without a number.
            last["weight"] = jnp.zeros((sizes[-1], 1), x.dtype)
        return [*layers, last]

    def apply(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        for layer in layers[:-1]:
            x = jnp.tanh(x @ layer["weight"] + layer["bias"])
        if not x.shape[-1]:
            return jnp.broadcast_to(layers[-1]["bias"], (*x.shape[:-1], 1))
        return x @ layers[-1]["weight"] + layers[-1]["bias"]

    return Network(init, apply)


def _nnx(net: Any) -> Network:
    from flax import nnx

    definition, params, rest = nnx.split(net, nnx.Param, ...)

    def apply(values: Any, x: jax.Array) -> jax.Array:
        state = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(state, values)
        return nnx.merge(definition, state, rest, copy=True)(x)

    return Network(lambda key, x: nnx.to_pure_dict(params), apply)


def _equinox(net: Any) -> Network:
    import equinox

    params, static = equinox.partition(net, equinox.is_inexact_array)

    def apply(values: Any, x: jax.Array) -> jax.Array:
        # An equinox module takes one example.
        flat = jax.vmap(equinox.combine(values, static))(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], *flat.shape[1:])

    return Network(lambda key, x: params, apply)
