"""JAX's default random numbers written out: the same numbers, in less time on a CPU.

JAX computes its counter-based generator, Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 3), in a loop of rounds over arrays where it compiles for a CPU, which costs several times what the rounds cost written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplgrad.numpyro._compat_jax import alone, counts_in_parts, host_primitives, is_threefry, under

# More numbers of one key are left to JAX: their kernel is fused into all that read them, and computed for each.
FEW = 16

# By how many bits each of eight rounds rotates, and what the third word of the key is made with.
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)


def _hashed(key: tuple[jax.Array, jax.Array], x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two words of two counters, under a key of two words."""
    words = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = x + words[0], y + words[1]
    for number in range(20):
        turn = _ROTATIONS[number % 8]
        x = x + y
        y = x ^ ((y << turn) | (y >> (32 - turn)))
        if number % 4 == 3:
            mixed = number // 4 + 1
            x, y = x + words[mixed % 3], y + words[(mixed + 1) % 3] + np.uint32(mixed)
    return x, y


def _of_counters(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the words of the counters 0, 1, ... in this shape."""
    words = jax.random.key_data(key)
    counters = jnp.arange(int(np.prod(shape)), dtype=np.uint32).reshape(shape)
    return _hashed((words[0], words[1]), jnp.zeros_like(counters), counters)


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.wrap_key_data(jnp.stack(_of_counters(key, shape), axis=-1), impl="threefry2x32")


def _bits(key: jax.Array, shape: tuple[int, ...], bit_width: int) -> jax.Array:
    first, second = _of_counters(key, shape)
    if bit_width == 64:
        return (first.astype(np.uint64) << 32) | second.astype(np.uint64)
    return first ^ second


def _fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    words = jax.random.key_data(key)
    found = _hashed((words[0], words[1]), jnp.zeros_like(number), number)
    return jax.random.wrap_key_data(jnp.stack(found, axis=-1), impl="threefry2x32")


def operation(equation: Any) -> Callable[..., list]:
    """Return the function of its operands that an equation stands for, written out if it makes a few numbers or keys of one key."""
    if not _is_written_out(equation):
        return alone(equation)
    params = equation.params

    def run(key: jax.Array, *others: jax.Array) -> list:
        with under(equation):
            if equation.primitive.name == "random_fold_in":
                return [_fold_in(key, *others)]
            if equation.primitive.name == "random_split":
                return [_split(key, params["shape"])]
            return [_bits(key, params["shape"], params["bit_width"])]

    return run


def _is_written_out(equation: Any) -> bool:
    name, params = equation.primitive.name, equation.params
    if name not in ("random_split", "random_bits", "random_fold_in") or equation.primitive not in host_primitives():
        return False
    key = equation.invars[0].aval
    if key.shape or not is_threefry(key):
        return False
    if name == "random_fold_in":
        number = equation.invars[1].aval
        return number.shape == () and number.dtype == np.uint32
    if not counts_in_parts(equation):
        return False
    return int(np.prod(params["shape"])) <= FEW and params.get("bit_width", 32) in (32, 64)
