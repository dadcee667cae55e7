"""Random JAX programs that do nearly the same several times, and whether they give the same fused as plain."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pplgrad.numpyro._compat_jax import as_function, tag
from pplgrad.numpyro._fusion.batched_evaluation import BatchedProgram

TABLE = np.array([0.3, -0.7, 1.1])
ELSE = np.array([0.3, -0.7, 1.2])  # Differs in one element.
# The same numbers once more, numbers of another type that print alike, another one, and whole numbers.
TABLES = [
    TABLE,
    ELSE,
    TABLE.copy(),
    TABLE.astype(np.float32),
    jnp.asarray(TABLE),
    jnp.asarray(ELSE),
    np.array([2, 0, 1]),
]
SCALARS = [0.0, -0.0, 1.0, 1, True, np.float32(1.0), np.float64(1.0), np.int8(1), np.nan, -np.nan]


class Call(NamedTuple):
    """An operation, the numbers of its operands, of its constant, and whether rounds have constants of their own."""

    name: str
    first: int
    second: int
    constant: int
    varies: bool


def table(n: int) -> Any:
    return TABLES[n % len(TABLES)]


def custom(n: int, inner: bool = True, rule: int | None = None) -> Callable:
    """Return a function with a derivative of its own: of table n, inside an inner jit, and of another one in its rule."""
    own, other = table(n), table(n if rule is None else rule)
    value = (jax.jit if inner else lambda f: f)(lambda x: jnp.tanh(own * x))
    slope = (jax.jit if inner else lambda f: f)(lambda x, t: jnp.cos(x) * t * other)
    f = jax.custom_jvp(value)
    f.defjvp(lambda points, moves: (f(*points), slope(points[0], moves[0])))
    return f


def custom_backward(n: int, rule: int) -> Callable:
    """Return a function with a backward derivative of its own."""
    own, other = table(n), table(rule)
    f = jax.custom_vjp(lambda x: jnp.sin(own * x))
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * other * jnp.cos(x),))
    return f


CUSTOM = {(n, inner, rule): custom(n, inner, rule) for n in range(6) for inner in (True, False) for rule in range(2)}
NESTED = jax.custom_jvp(lambda x: CUSTOM[0, True, 0](x) + 1)
NESTED.defjvp(lambda points, moves: (NESTED(*points), moves[0] * CUSTOM[1, True, 0](NESTED(points[0]))))
BACKWARD = {(n, rule): custom_backward(n, rule) for n in range(6) for rule in range(2)}
# With an inner function that is traced once and called several times.
JITTED = {n: jax.jit(lambda x, y, own=table(n): jnp.sin(x * own) - y) for n in range(len(TABLES))}
STATIC = jax.jit(lambda x, n, odd: jnp.roll(x, n) if odd else x * n, static_argnums=(1, 2))


def _scan(x: Any, y: Any, c: int) -> Any:
    last, all_ = jax.lax.scan(lambda h, row: (jnp.tanh(h * row + y), h - row), x, jnp.asarray(table(c) * 1.0))
    return last + all_.sum(0)


def _cond(x: Any, y: Any, c: int) -> Any:
    own = table(c)
    return jax.lax.cond(x[0] > y[1], lambda x: own * x, lambda x: x - own[1], x)


def _loop(x: Any, y: Any, c: int) -> Any:
    own, y = table(c), jax.lax.stop_gradient(y)
    start = (0, jax.lax.stop_gradient(x))
    return x + jax.lax.while_loop(lambda s: s[0] < 1 + c % 3, lambda s: (s[0] + 1, jnp.sin(s[1] * own) + y), start)[1]


def _quarters(x: Any) -> Any:
    """Return numbers of 32 bits that are added without a rounding error."""
    return jnp.asarray(jnp.round(4 * jax.lax.stop_gradient(x)), jnp.float32) * np.float32(0.25)


FLOATS: dict[str, Callable[[Any, Any, int], Any]] = {
    "add": lambda x, y, c: x + y,
    "sub": lambda x, y, c: x - y,
    "div": lambda x, y, c: x / (2 + y * y),
    "scaled": lambda x, y, c: jnp.tanh(x * table(c)),
    "scalar": lambda x, y, c: x + SCALARS[c % 8] * y,
    "signed": lambda x, y, c: x + jnp.arctan2(SCALARS[c % 2], -1.0 - y * y),
    "missing": lambda x, y, c: x + jnp.where(y > 0, jnp.abs(SCALARS[8 + c % 2] * y) > 0, y),
    "softplus": lambda x, y, c: jax.nn.softplus(x),
    "logaddexp": lambda x, y, c: jnp.logaddexp(x, y),
    "relu": lambda x, y, c: jax.nn.relu(x - 0.1 * c) if c % 2 else jax.nn.relu6(x),
    "product": lambda x, y, c: jnp.outer(jnp.asarray(table(c) * 1.0), x) @ y,
    "looked up": lambda x, y, c: jnp.asarray(table(c) * 1.0)[jnp.argmax(x)] * y,
    "parts": lambda x, y, c: jnp.concatenate([x[c % 3 :], y[: c % 3]]),
    "element": lambda x, y, c: x[c % 3] + y[::-1],
    "sorted": lambda x, y, c: jnp.sort(x)[::-1] if c % 2 else jnp.sort(x),
    "summed": lambda x, y, c: jax.lax.cumsum(x, reverse=bool(c % 2)) * y.sum(),
    "added at": lambda x, y, c: x.at[c % 3].add(y[0]),
    "custom": lambda x, y, c: CUSTOM[c % 6, c % 4 > 1, c % 2](x) + y,
    "custom outer": lambda x, y, c: CUSTOM[c % 6, True, 0](x) - y,
    "nested": lambda x, y, c: NESTED(x) if c % 2 else CUSTOM[0, True, 0](x),
    "jit": lambda x, y, c: JITTED[c % len(TABLES)](x, y),
    "static": lambda x, y, c: STATIC(x, 1 + c % 2, c % 3 == 0),
    "cond": _cond,
    "while": _loop,
    "scan": _scan,
    "rounded": lambda x, y, c: _quarters(x) * np.float32(0.5 + c % 2) + y,
}
BACKWARDS = {"backward": lambda x, y, c: BACKWARD[c % 6, c % 2](x) + y}
WHOLES: dict[str, Callable[[Any, Any, int], Any]] = {
    "plus": lambda i, j, c: i + j * (1 + c % 2),
    "modulo": lambda i, j, c: (i * 3 + c) % (jnp.abs(j) + 2),
    "bits": lambda i, j, c: (i ^ j) | (c % 4),
    "whole table": lambda i, j, c: jnp.asarray(np.array([2, 0, 1 + c % 2]))[i % 3] + j,
    "halved": lambda i, j, c: (i >> 1) - j // 2,
}


class State:
    """What a program has computed: floats and whole numbers and truth values of three elements, and a key."""

    def __init__(self, key: Any, floats: Sequence[Any], wholes: Sequence[Any], truths: Sequence[Any]) -> None:
        self.key, self.sites = key, 0
        self.floats, self.wholes, self.truths = list(floats), list(wholes), list(truths)

    def perform(self, call: Call, turn: int) -> None:
        """Do an operation, with the constants of this round if they vary."""
        c = call.constant + (turn if call.varies else 0)

        def of(values: list, number: int) -> Any:
            return values[-1 - number % len(values)]

        x, y = of(self.floats, call.first), of(self.floats, call.second)
        if call.name in FLOATS or call.name in BACKWARDS:
            found = (FLOATS | BACKWARDS)[call.name](x, y, c)
            self.floats.append(jnp.tanh(jnp.broadcast_to(found, (3,)).astype(x.dtype)))
        elif call.name in WHOLES:
            i, j = of(self.wholes, call.first), of(self.wholes, call.second)
            self.wholes.append(WHOLES[call.name](i, j, c) % 7)
        elif call.name == "compared":
            self.truths.append((x > y + 0.1 * (c % 3)) ^ of(self.truths, call.second))
        elif call.name == "chosen":
            self.floats.append(jnp.where(of(self.truths, call.first), x, y * table(c)))
        elif call.name == "float":
            self.floats.append(jnp.sin(of(self.wholes, call.first) * 0.3 + c % 3))
        else:
            self.draw(call.name, x, c)

    def draw(self, kind: str, x: Any, c: int) -> None:
        """Draw as a latent site does."""
        self.key, mine = jax.random.split(self.key)
        if kind == "bernoulli":
            z = jax.random.bernoulli(mine, jax.nn.sigmoid(x + 0.1 * (c % 2))).astype(float)
        elif kind == "categorical":
            z = jax.random.categorical(mine, jnp.stack([x, -x]), axis=0) * 1.0
        else:
            z = x + jax.random.normal(mine, (3,)) * (1 + c % 2)
        z = jax.lax.stop_gradient(z) if kind != "normal" else z
        self.floats.append(tag(f"z{self.sites}", z))
        self.sites += 1


DRAWS = ("bernoulli", "categorical", "normal")
OTHERS = ("compared", "chosen", "float", *DRAWS)
FORWARD = (*FLOATS, *WHOLES, *OTHERS)
REVERSE = (*FORWARD, *BACKWARDS)


def programs(names: Sequence[str], most: int = 5) -> st.SearchStrategy:
    """Return programs of a few operations, done in some rounds."""
    number = st.integers(0, 6)
    calls = st.builds(Call, st.sampled_from(names), number, number, number, st.booleans())
    return st.tuples(st.lists(calls, min_size=1, max_size=most), st.integers(3, 5))


def function_of(calls: Sequence[Call], turns: int) -> Callable:
    """Return a program as a function of a key and a vector, of all that it computes."""

    def run(key: Any, x: Any, more: Any) -> list:
        state = State(key, [x, more["y"]], [more["i"]], [more["b"]])
        for turn in range(turns):
            for call in calls:
                state.perform(call, turn)
        return [state.floats, state.wholes, state.truths]

    return run


def arguments() -> tuple:
    """Return what programs are evaluated at."""
    more = {"y": jnp.array([-0.3, 0.9, 0.1]), "i": jnp.array([3, 0, 5]), "b": jnp.array([True, False, True])}
    return jax.random.key(7), jnp.array([0.4, -0.8, 1.3]), more


def fused(function: Callable, *given: Any, rows: int = 2) -> tuple[Callable, Callable]:
    """Return a function as it is fused and as it was traced, of flat arguments."""
    closed = jax.make_jaxpr(function)(*given)
    together = BatchedProgram(closed, [True] * len(closed.jaxpr.outvars), rows)

    def run(*arguments: Any) -> list:
        found = together(*arguments)
        return [found[place[0]] if place[1] is None else found[place[0]][place[1]] for place in together.places]

    return run, as_function(closed)


def everything(run: Callable, given: Sequence[Any], backwards: bool | None) -> list:
    """Return a function's values, and how they move with the floats among the arguments: forwards or backwards, or not at all."""
    if backwards is None:
        return run(*given)
    moving = [i for i, x in enumerate(given) if jnp.issubdtype(x.dtype, jnp.floating)]

    def of(*points: Any) -> list:
        full = list(given)
        for i, x in zip(moving, points, strict=True):
            full[i] = x
        return run(*full)

    points = [given[i] for i in moving]
    kept = [x for x in of(*points) if jnp.issubdtype(x.dtype, jnp.floating)]

    def smooth(*points: Any) -> list:
        return [x for x in of(*points) if jnp.issubdtype(x.dtype, jnp.floating)]

    ways = [jnp.cos(jnp.arange(x.size) + i).reshape(x.shape).astype(x.dtype) for i, x in enumerate(kept)]
    moves = [jnp.sin(1.0 + jnp.arange(x.size) + i).reshape(x.shape).astype(x.dtype) for i, x in enumerate(points)]
    found = [of(*points)]
    found.append(jax.vjp(smooth, *points)[1](ways) if backwards else jax.jvp(smooth, points, moves)[1])
    return found


def gap(
    function: Callable, given: Sequence[Any], *, ways: Sequence[bool | None] = (False, True), rows: int = 2
) -> float:
    """Return the largest difference between what a function gives fused and plain, its derivatives included."""
    runs = fused(function, *given, rows=rows)
    flat = jax.tree.leaves(tuple(given))
    types = [[(x.shape, x.dtype, x.weak_type) for x in jax.eval_shape(run, *flat)] for run in runs]
    assert types[0] == types[1]

    @jax.jit
    def both(*flat: Any) -> list:
        return [[everything(run, flat, way) for way in ways] for run in runs]

    mine, plain = (jax.tree.leaves(found) for found in both(*flat))
    return max((difference(a, b) for a, b in zip(mine, plain, strict=True)), default=0.0)


def difference(a: Any, b: Any) -> float:
    """Return the largest difference, relative above 1; the same infinities and NaNs are no difference."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype
    if not np.issubdtype(a.dtype, np.floating):
        return float(np.any(a != b))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        found = np.where(same, 0.0, np.abs(a - b) / (1 + np.abs(b)))
    # A number against none, or an infinity.
    return float(np.max(np.where(np.isnan(found), np.inf, found), initial=0.0))
