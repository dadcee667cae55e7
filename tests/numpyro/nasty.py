"""Programs with sites that look alike and are not: what a site reads of a vector and its number, by name."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from tests.numpyro.fusing import BACKWARD, CUSTOM, ELSE, JITTED, NESTED, TABLE

# Where a site's number is even it does one thing, else another.
READS: dict[str, Any] = {
    "functions that print alike": lambda i, x: CUSTOM[i % 2, True, 0](x),
    "rules that print alike": lambda i, x: CUSTOM[0, True, i % 2](x),
    "rules that differ": lambda i, x: CUSTOM[0, False, i % 2](x),
    "rules that call each other": lambda i, x: (NESTED if i % 2 else CUSTOM[0, True, 0])(x),
    "functions of their own in the middle": lambda i, x: CUSTOM[int(i in (2, 3)), True, 0](x),
    "backward rules": lambda i, x: BACKWARD[0, i % 2](x),
    "backward values": lambda i, x: BACKWARD[i % 2, 0](x),
    "jit": lambda i, x: JITTED[i % 2](x, x[::-1]),
    "arguments of jit change places": lambda i, x: JITTED[0](*((x, x[::-1]) if i % 2 else (x[::-1], x))),
    "shifts": lambda i, x: jnp.roll(x, i % 2 + 1),
    "powers": lambda i, x: x ** (2 + i % 2),
    "operands change places": lambda i, x: x - x[::-1] if i % 2 else x[::-1] - x,
    "zeros": lambda i, x: jnp.arctan2(-0.0 if i % 2 else 0.0, -1.0 - x * x),
    "types of numbers": lambda i, x: x * (np.float32(0.1) if i % 2 else 0.1),
    "types of tables": lambda i, x: x * (TABLE.astype(np.float32) if i % 2 else TABLE),
    "whole numbers": lambda i, x: x * (np.int8(2) if i % 2 else np.int64(2)) + (np.array([1, 2, 3 + i % 2])),
    "truth values": lambda i, x: jnp.where(np.array([True, False, bool(i % 2)]), x, -x),
    "tables": lambda i, x: (ELSE if i % 2 else TABLE) * x,
    "tables of one content": lambda i, x: TABLE.copy() * x,
    "large tables": lambda i, x: _large(i % 2)[: x.size] * x + jnp.asarray(_large(i % 2))[jnp.argmax(x) + 5000],
    "lookups": lambda i, x: jnp.asarray(ELSE if i % 2 else TABLE)[jnp.argmin(x) if i % 3 else jnp.argmax(x)] * x,
    "lookups outside": lambda i, x: x.at[jnp.array([0, 5, 1])].get(mode="clip" if i % 2 else "fill", fill_value=0.5),
    "sorted": lambda i, x: jnp.sort(x, descending=bool(i % 2)),
    "held": lambda i, x: jax.lax.stop_gradient(x) * x if i % 2 else x * x,
    "products": lambda i, x: jnp.matmul(np.outer(TABLE, ELSE), x, precision="highest" if i % 2 else None),
    "cond": lambda i, x: jax.lax.cond(x[0] > 0, lambda x: (ELSE if i % 2 else TABLE) * x, lambda x: -x, x),
    "while": lambda i, x: (
        x + jax.lax.fori_loop(0, 2, lambda _, c: (ELSE if i % 2 else TABLE) * c, jax.lax.stop_gradient(x))
    ),
    "lax.scan": lambda i, x: jax.lax.scan(lambda c, r: (jnp.sin(c * r), None), x, ELSE if i % 2 else TABLE)[0],
    "scan of many steps": lambda i, x: jax.lax.scan(_turn, (x, i % 2), jnp.arange(7.0) + i % 2)[0][0],
    "mapped": lambda i, x: jax.vmap(lambda y: CUSTOM[i % 2, True, 0](y * jnp.ones(3)).sum())(x),
    "remembered": lambda i, x: jax.checkpoint(lambda x: jnp.sin((ELSE if i % 2 else TABLE) * x))(x),
    "static": lambda i, x: _static(x, 1 + i % 2, ("a", "b")[i % 2]),
    "given away": lambda i, x: _given_away(x * (1 + i % 2)),
    "known zeros": lambda i, x: _knowing(i % 2)(x, TABLE),
    "not differentiated": lambda i, x: _numbered(i % 2, x),
    "counted otherwise": lambda i, x: x + _counted(i % 2),
    "keys of other kinds": lambda i, x: x + jax.random.normal(_key(i), (3,)),
    "a function of keys": lambda i, x: _noisy(x, _key(1 + 2 * i)),
    "labelled": lambda i, x: jax.named_call(lambda x: x * (1 + i % 2), name="same")(x),
    "called outside": lambda i, x: x + jax.pure_callback(lambda: np.asarray(float(i % 2)), _NUMBER),
    "references": lambda i, x: _changed(x, i % 2),
    "gradients inside": lambda i, x: jax.grad(lambda x: CUSTOM[i % 2, True, 0](x).sum())(x),
    "derivatives inside": lambda i, x: jax.jvp(CUSTOM[0, True, i % 2], (x,), (jnp.ones(3),))[1],
}
_NUMBER = jax.ShapeDtypeStruct((), float)


def _large(n: int) -> Any:
    found = np.linspace(-1.0, 1.0, 20_000)
    found[5001] += 0.1 * n
    return found


def _turn(carry: Any, row: Any) -> Any:
    x, count = carry
    return (jnp.tanh(x + row * count), count + 1), None


_static = jax.jit(lambda x, n, kind: x * n if kind == "a" else jnp.cos(x) * n, static_argnums=(1, 2))
_given_away = jax.jit(jnp.cos, donate_argnums=0)


def _knowing(n: int) -> Any:
    f = jax.custom_jvp(lambda x, y: x * y)

    def rule(points: Any, moves: Any) -> Any:
        still = type(moves[1]) is jax.custom_derivatives.SymbolicZero
        return points[0] * points[1], moves[0] * points[1] * (1 + n * still)

    f.defjvp(rule, symbolic_zeros=True)
    return f


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _numbered(n: int, x: Any) -> Any:
    return jnp.sin(x)


@_numbered.defjvp
def _(n: int, points: Any, moves: Any) -> Any:
    return _numbered(n, points[0]), jnp.cos(points[0]) * moves[0] * (1 + n)


def _counted(n: int) -> Any:
    with jax.threefry_partitionable(bool(n)):
        return jax.random.normal(jax.random.key(3), (3,))


def _key(i: int) -> Any:
    kind = "rbg" if i % 2 else "threefry2x32"
    return jax.random.fold_in(jax.random.key(5, impl=kind), i)


@jax.custom_jvp
def _noisy(x: Any, key: Any) -> Any:
    return x + jax.random.normal(key, (3,))


@_noisy.defjvp
def _(points: Any, moves: Any) -> Any:
    return _noisy(*points), moves[0] * 2


def _changed(x: Any, n: int) -> Any:
    held = jax.new_ref(jnp.zeros(3))
    first = held[...]
    held[...] = x * (1 + n)
    return first + held[...] + held[...]


def program(*reads: Any, sites: int = 6) -> tuple:
    """Return a model and a guide of a chain of draws, a state that is reparameterized, and what they read of parameters.

    What several functions read is added up, with weights of their own.
    """

    def together(i: int, x: Any) -> Any:
        return sum(jnp.tanh(read(i, x)) * (1 + 0.3 * k) for k, read in enumerate(reads))

    def model() -> None:
        p, z, h = numpyro.param("p", jnp.array([0.3, -0.4, 0.7])), 0.0, 0.0
        for i in range(sites):
            z = numpyro.sample(f"z{i}", dist.Bernoulli(logits=0.2 - 0.5 * z)) * 1.0
            h = numpyro.sample(f"h{i}", dist.Normal(0.5 * h, 1.0))
            found = together(i, p + z - 0.3 * h)
            numpyro.sample(f"x{i}", dist.Normal(found, 1.0).to_event(1), obs=jnp.array([0.1, 0.5, -0.2]))

    def guide() -> None:
        q, z = numpyro.param("q", jnp.array([-0.5, 0.9, 0.2])), 0.0
        for i in range(sites):
            z = numpyro.sample(f"z{i}", dist.Bernoulli(logits=together(i, q + z).sum())) * 1.0
            numpyro.sample(f"h{i}", dist.Normal(q[1] + z, 0.5))

    return model, guide


def in_scan() -> tuple:
    """Return a program with a scan whose body reads functions that print alike."""

    def run(name: str, model: bool) -> None:
        p = numpyro.param(name, jnp.array([0.3, -0.4, 0.7]) * (1 if model else -1))

        def step(carry: Any, x: Any) -> Any:
            z, n = carry
            odds = CUSTOM[0, True, 0](p + z).sum() - CUSTOM[1, True, 0](p + z).sum() + 0.1 * n
            z = numpyro.sample("z", dist.Bernoulli(logits=odds)) * 1.0
            if model:
                mean = CUSTOM[0, True, 0](p * z) + CUSTOM[0, True, 1](p * z)
                numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x * jnp.ones(3))
            return (z, n + 1), None

        scan(step, (jnp.asarray(0.5), 0), jnp.linspace(-1.0, 1.0, 7))

    return lambda: run("p", True), lambda: run("q", False)
